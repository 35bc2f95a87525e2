"""`GaLore`: optimizer state of low rank."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from lightning_lowrank.measuring.number_source import Detail, refuse_seed
from lightning_lowrank.methods.galore.bases import Basis
from lightning_lowrank.methods.galore.curves import GaLoreNumbers
from lightning_lowrank.methods.galore.matrix import LowRankMatrix, OnRefresh, Policy, Residual
from lightning_lowrank.methods.galore.ranks import Rank, Side, projection_of, ranks_by_tag, refuse_rank
from lightning_lowrank.methods.galore.steps import LowRankSteps, drop_low_rank
from lightning_lowrank.methods.matrices import Patterns, matrices, sides
from lightning_lowrank.methods.method import Method


class GaLore(Method):
    """Trains matrices with an optimizer state of low rank, in the user's own optimizer.

    For each matrix the optimizer gets the projection of the gradient on a subspace, made anew every `update_every`
    steps, and keeps its moments there. Its step goes back into the whole weight, which is never factored. For AdamW and
    a matrix of m rows and n >= m columns, 2 m n numbers of state become m r + 2 n r.

    Optimizer, parameter groups and schedulers stay the user's: for the time of one step a hook puts a matrix of zeros
    in the place of the weight and the projection in the place of its gradient. Any optimizer that treats each entry by
    itself works; which does is tried before training, and so is how it decays weights. Clipping and GradScalers act on
    the full gradient, and monitors see it.

    A step of scale `s` has an effective learning rate of `s lr`. Weight decay is that of the optimizer, of the whole
    weight: coupled decay goes through the projection with the gradient.

    Resumed runs are equal to uninterrupted ones to the bit. A checkpoint of full moments may be resumed with it, and
    one of its own without it after `drop_state`: moments of the matrices begin anew then.

    Writes `galore/captured_median`, `galore/captured_best_median` and `galore/captured_random_median`: the share of the
    gradient's energy in the subspace, what the best subspace of that size has, and what a random one has in the mean;
    and `galore/state_bytes`. Captured energy is no measure of usefulness: see docs/methods/galore.md.

    Cost: two products of a matrix with its basis each step; a refresh takes two such products and a QR decomposition of
    the basis ("subspace"), or a full SVD ("svd"). A report takes an eigendecomposition per matrix.

    Args:
        rank: Of all matrices: a share of the short side up to 1, a whole number, or "measured"; or one for each
            pattern, which then choose the matrices. "measured" begins at a quarter of the short side. The third basis
            gets the largest energy rank of the gradients of the first three, as `RankMonitor` measures it, rounded up
            to parts of 1/32, and a quarter at most. Where that is less, moments begin anew then.
        update_every: Steps between two bases of a matrix.
        scale: Factor of the steps.
        side: What is projected: "auto" the short side, "left" rows, "right" columns, "both" for a state of r x r.
        basis: "subspace": one step of subspace iteration from the last basis. "svd": singular vectors. "random":
            orthonormal and drawn; only a seed is kept, and it is drawn anew each step.
        on_refresh: What becomes of moments: "keep" their coordinates, "reset" them, or "rotate" them with the basis.
        residual: What becomes of what the subspace leaves of a gradient: None, or "fira": a step too, each column of it
            scaled as that of the projection, and its norm limited to grow by 1 % a step. One side only.
        match: Matrices: globs, `re:REGEX`, `type:LAYERCLASS`; all but embeddings and the last linear layer unless
            given.
        exclude: The same, taken away.
        stagger: Refresh one matrix after the other, so that no step does all.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single matrices: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of its range. When training starts: a pattern fits nothing, no optimizer steps what
            it fits, an optimizer does not treat each entry by itself, parameters are sharded, there is a second
            `GaLore`, or the run that is resumed had other matrices or ranks.

    Examples:
        >>> GaLore(rank=128, update_every=200)
        GaLore(rank=128, update_every=200)

    References:
        Zhao et al. (2024), GaLore, arXiv:2403.03507; Liang et al. (2024), Online Subspace Descent, arXiv:2408.12857,
        for subspace iteration; Robert et al. (2024), LDAdam, arXiv:2410.16103, for the rotation of moments; Chen et al.
        (2024), Fira, arXiv:2410.01623, for the residual.
    """

    word = "galore"

    def __init__(
        self,
        rank: Rank | Mapping[str, Rank] = 0.25,
        update_every: int = 200,
        scale: float = 0.25,
        side: Side = "auto",
        basis: Basis = "subspace",
        on_refresh: OnRefresh = "keep",
        residual: Residual = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        stagger: bool = True,
        *,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        for one in rank.values() if isinstance(rank, Mapping) else [rank]:
            refuse_rank(one)
        if isinstance(rank, Mapping) and (not rank or match is not None):
            raise ValueError(
                f"GaLore(rank={rank!r}, match={match!r}): patterns of rank, one at least, choose the matrices"
            )
        if update_every < 1:
            raise ValueError(f"update_every={update_every}: at least 1 optimizer step")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: a factor above 0")
        if residual is not None and side == "both":
            raise ValueError(
                f"GaLore(side='both', residual={residual!r}): it scales columns that the projection leaves whole, and "
                "of both sides none is left; side='auto'"
            )
        refuse_seed(seed)
        policy = Policy(update_every, basis, on_refresh, residual, seed)
        choose = partial(_chosen, rank=rank, side=side, policy=policy, match=match, exclude=exclude, stagger=stagger)
        steps = self._steps = LowRankSteps(choose, scale)
        super().__init__(
            steps, GaLoreNumbers(steps), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name
        )

    @staticmethod
    def drop_state(*optimizers: Optimizer) -> int:
        """Take moments of low rank out of optimizers, in a run that is resumed without it.

        Call it when they have their state again and have not stepped: in a Trainer in `on_train_start`. Moments of the
        matrices begin anew, and all else goes on. Moments of the rank of the short side have the shape of the matrix
        and are not found: clear the state of the optimizer.

        Returns:
            How many parameters had any.
        """
        return sum(map(drop_low_rank, optimizers))

    @property
    def bytes_of_bases(self) -> int:
        """What the bases of all matrices take now."""
        return sum(matrix.num_bytes for matrix in self._steps.matrices.values())


def _chosen(
    module: nn.Module,
    *,
    rank: Rank | Mapping[str, Rank],
    side: Side,
    policy: Policy,
    match: Patterns,
    exclude: Patterns,
    stagger: bool,
) -> tuple[list[LowRankMatrix], dict[str, str]]:
    """Matrices of a module, and why others were left out."""
    choice = matrices(module, list(rank) if isinstance(rank, Mapping) else match, exclude)
    ranks = ranks_by_tag(module, rank, list(choice.matrices))
    found = []
    for i, (tag, parameter) in enumerate(choice.matrices.items()):
        offset = i * policy.update_every // len(choice.matrices) if stagger else 0
        projection = projection_of(side, sides(parameter), ranks[tag])
        samples: list[float] | None = [] if ranks[tag] == "measured" else None
        found.append(LowRankMatrix(tag, parameter, projection, policy, offset, samples))
    return found, choice.left_out
