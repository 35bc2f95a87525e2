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
from lightning_lowrank.methods.galore.ranks import Rank, Side, is_full, projection_of, ranks_by_tag, refuse_rank
from lightning_lowrank.methods.galore.steps import LowRankSteps, drop_low_rank
from lightning_lowrank.methods.matrices import Patterns, matrices, sides
from lightning_lowrank.methods.method import Method


class GaLore(Method):
    """Train matrices with an optimizer state of low rank, in the user's own optimizer.

    The optimizer gets, for each matrix, the projection of the gradient on a subspace, and keeps its moments there. The
    subspace is renewed every `update_every` steps. The step is mapped back to the full weight, which is never
    factorized. With AdamW and a matrix of m rows and n >= m columns, the state of 2 m n numbers becomes m r + 2 n r.

    Optimizer, parameter groups and schedulers stay the user's. During each step, a hook replaces the weight by a matrix
    of zeros and its gradient by the projection. Any optimizer that updates each entry independently works. This and the
    kind of weight decay are tested before training. Clipping and GradScalers act on the full gradient, and monitors see
    the full gradient.

    With `scale=s`, the effective learning rate of the matrices is `s lr`. Weight decay is that of the optimizer, on the
    full weight. Coupled decay is projected together with the gradient.

    A resumed run is bit for bit equal to an uninterrupted one. You can resume a checkpoint with full moments with this
    callback. You can also resume one of its own checkpoints without it after `drop_state`; the moments of the matrices
    then start from zero.

    Curves of the captured share of gradient energy: `galore/captured_median` for the subspace in use,
    `galore/captured_best_median` for the best one of that size, and `galore/captured_random_median` for a random one,
    on average. Also `galore/state_bytes`. Captured energy does not measure usefulness: see docs/methods/galore.md.

    Cost: two products of a matrix with its basis at each step. A refresh takes two such products and a QR decomposition
    of the basis ("subspace"), or a full SVD ("svd"). A report takes an eigendecomposition of each matrix.

    Args:
        rank: Rank of all matrices: a share of the short side up to 1, a whole number, or "measured". A mapping from
            patterns to ranks chooses the matrices, too. A matrix whose short side is not above a whole number is left
            alone and named. "measured" begins with a quarter of the short side. The third
            basis gets the largest energy rank of the gradients at the first three bases, as `RankMonitor` measures it.
            This rank is rounded up to a multiple of 1/32 of the short side, and it is at most a quarter. If it is
            smaller than before, the moments start from zero.
        update_every: Steps between two bases of a matrix.
        scale: Factor of the steps.
        side: What is projected: "auto" the short side, "left" rows, "right" columns, "both" for a state of r x r.
        basis: "subspace": one step of subspace iteration from the last basis. "svd": singular vectors. "random": a
            random orthonormal basis, drawn again at each step, so that only a seed is stored.
        on_refresh: What happens to moments when the basis changes: "keep" their coordinates, "reset" them to zero, or
            "rotate" them with the basis.
        residual: What happens to the part of a gradient outside of the subspace: None drops it. "fira" also makes a
            step of it: each column is scaled like that of the projection, and the norm may grow by at most 1 % per
            step. One side only.
        match: Matrices to project: globs, `re:REGEX` or `type:LAYERCLASS`. Default: all except embeddings and the last
            linear layer.
        exclude: Patterns of matrices to leave out.
        stagger: Refresh the matrices at different steps, so that no single step refreshes all.
        seed: Seed for random bases.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single matrices: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of range. When training starts: a pattern matches nothing, no optimizer has the
            matched matrices, or an optimizer does not update each entry independently. Also if no matrix has a short
            side above the rank, or parameters are sharded. Also if there is a second `GaLore`, or if the resumed run
            had other matrices or ranks.

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
                f"GaLore(rank={rank!r}, match={match!r}): a mapping of patterns to ranks chooses the matrices; it "
                "must not be empty, and match must not be given"
            )
        if update_every < 1:
            raise ValueError(f"update_every={update_every} must be at least 1 optimizer step")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be a number above 0")
        if residual is not None and side == "both":
            raise ValueError(
                f"GaLore(side='both', residual={residual!r}): it scales the columns along the side that is not "
                "projected, but 'both' projects both sides; use side='auto'"
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
        """Remove moments of low rank from optimizers, in a run that is resumed without this callback.

        Call it after the optimizers have loaded their state and before they step: in a Trainer, in `on_train_start`.
        The moments of the matrices then start from zero, and everything else continues. It cannot detect moments whose
        rank equals the short side, since they have the shape of the matrix; for these, clear the optimizer's state.

        Returns:
            The number of parameters that had such moments.
        """
        return sum(map(drop_low_rank, optimizers))

    @property
    def bytes_of_bases(self) -> int:
        """Bytes of the current bases of all matrices."""
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
    full = {
        tag: f"rank {ranks[tag]} is not below its short side, {min(sides(parameter))}"
        for tag, parameter in choice.matrices.items()
        if is_full(sides(parameter), ranks[tag])
    }
    kept = {tag: parameter for tag, parameter in choice.matrices.items() if tag not in full}
    if not kept:
        raise ValueError(f"GaLore(rank={rank!r}) saves nothing: {full}; use a smaller rank, or a share such as 0.25")
    found = []
    for i, (tag, parameter) in enumerate(kept.items()):
        offset = i * policy.update_every // len(kept) if stagger else 0
        projection = projection_of(side, sides(parameter), ranks[tag])
        samples: list[float] | None = [] if ranks[tag] == "measured" else None
        found.append(LowRankMatrix(tag, parameter, projection, policy, offset, samples))
    return found, {**choice.left_out, **full}
