"""`LowRankFactorize`: training with weights of low rank."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from lightning_lowrank.measuring.number_source import Detail, refuse_seed
from lightning_lowrank.methods.factorize.act import Factorization
from lightning_lowrank.methods.factorize.choice import Mode, Rank, Settings, When, share_of
from lightning_lowrank.methods.factorize.conversion import dense_state, densify
from lightning_lowrank.methods.factorize.curves import FactorNumbers
from lightning_lowrank.methods.factorize.factors import Init
from lightning_lowrank.methods.factorize.orthogonality import Orthogonality, OrthogonalSteps
from lightning_lowrank.methods.factorize.waiting import Waiting
from lightning_lowrank.methods.matrices import Patterns
from lightning_lowrank.methods.method import Method, beside


class LowRankFactorize(Method):
    """Trains weights of low rank, as factors: `W = A diag(s) B`, in two thin layers in the place of one.

    Of a weight of m x n numbers, r (m + n + 1) are left, and so of gradients, optimizer state and multiply-adds. The
    model does not begin as it was: what the rank leaves out of the weight is gone, and the table at the start says how
    much energy is kept. Frozen weights are left alone.

    Factors are made in `setup`, before `configure_optimizers`; in a loop of your own call `prepare(model)` before its
    optimizer is made. Layers keep their class as a base and all else that they have: the factors of `net.0.weight` are
    `net.0.weight_A` `[outputs, r]`, `net.0.weight_s` `[r]` and `net.0.weight_B` `[r, inputs]`, and `net.0.weight` is
    their product. They stay until `densify(module)`, which gives keys and classes back.

    Factors of which both are orthonormal have a product whose singular values are all 1. The scale `s` between them is
    what lets them represent any weight of the rank.

    A rank that is "measured", or `when="stable_rank_converged"`, needs a run that is dense at first: its optimizer then
    goes on with the factors in the same parameter groups, their moments anew.

    Writes, per weight, `factorize_update_norm`, the spectral norm of what one step changes of the product;
    `factorize_orthogonality_gap`, the larger of the spectral norms of A'A - I and B B' - I; `factorize_rank`, and
    `factorize_stable_rank` and `factorize_effective_rank` of the product; and `factorize/num_parameters` of the module.

    Cost: an SVD of each weight, once. A Stiefel step takes two QR decompositions of thin factors per weight, a bound
    and a report four and an SVD of 2r x 2r.

    Args:
        rank: Of all weights: a whole number, a share of the short side below 1, "energy:0.95" for as many directions as
            hold that share of the squared Frobenius norm, or "measured": the same of what the first three samples of a
            dense run have changed; or one for each pattern, which then choose the weights. Unless given 0.25 from the
            start, and the stable rank, rounded up, once that has settled.
        init: "svd": the best approximation of the weight. "spectral": orthonormal factors that are drawn, with the top
            singular values of the weight.
        orthogonality: "soft": the gradient of `weight (|A'A - I|^2 + |B B' - I|^2)` is added, after unscaling and
            clipping. "stiefel": factors are orthonormal after each step. None: factors are free.
        weight: Of the soft penalty.
        mode: "module": two thin layers. "parametrize": the weight is computed at each reading, whoever reads it; saves
            optimizer state and not much else.
        when: "start", or "stable_rank_converged": when the stable ranks of all weights have stayed within 5 % over five
            samples.
        match: Weights: globs, `re:REGEX`, `type:LAYERCLASS`; all but embeddings and the last linear layer unless given.
        exclude: The same, taken away.
        max_update: Bound on `factorize_update_norm`: a step that goes further is shortened.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves and of samples of the dense run, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single weights: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of its range. Before training: a pattern fits nothing or what cannot be factorized;
            no weight would be smaller; no optimizer has the factors; the module is factorized in another way; the
            checkpoint is of a run without factors; factors are to be orthonormal in half precision or under LBFGS; a
            dense run is to be factorized on several processes, with `WeightAveraging` or `barebones=True`.

    Examples:
        >>> LowRankFactorize(rank=16, orthogonality="stiefel")
        LowRankFactorize(rank=16, orthogonality='stiefel')

    References:
        Khodak et al. (2021), Initialization and Regularization of Factorized Neural Layers, arXiv:2105.01029, who call
        init="svd" spectral initialization; Edelman, Arias & Smith (1998), SIAM J. Matrix Anal. Appl. 20(2), for the
        tangent space. On the spectral norm of the effective update: arXiv:2602.12429.
    """

    word = "factorize"

    def __init__(
        self,
        rank: Rank | Mapping[str, Rank] | None = None,
        init: Init = "svd",
        orthogonality: Orthogonality | None = None,
        weight: float = 1e-4,
        mode: Mode = "module",
        when: When = "start",
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        max_update: float | None = None,
        *,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        settings = settings_of(rank, init, mode, when, match, exclude, seed)
        for argument, value in (("weight", weight), ("max_update", max_update)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{argument}={value!r}: a number above 0")
        act = Factorization(settings, OrthogonalSteps(orthogonality, weight, max_update), Waiting(when, every_n_steps))
        self._settings = settings
        super().__init__(act, FactorNumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the factors, before `configure_optimizers`; refuse what would not follow a change in mid-run."""
        if self._settings.is_deferred and stage == "fit":
            averaging = any(isinstance(c, WeightAveraging) for c in beside(trainer))
            trouble = "WeightAveraging, which has a dense copy" if averaging else "barebones=True, which calls nobody"
            if averaging or trainer.barebones:
                raise ValueError(
                    f"LowRankFactorize: weights are replaced in mid-run, and not with {trouble} after a batch: give "
                    "ranks and when='start'"
                )
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert isinstance(self._act, Factorization)
            self._act.settle(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Without the module's `log`, which Lightning hangs on: torch pickles no module with parametrizations."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @staticmethod
    def densify(module: nn.Module) -> nn.Module:
        """Multiply the factors out: keys and classes are those of the dense module.

        Returns:
            The module.

        Raises:
            ValueError: It has no factors.
        """
        return densify(module)

    @staticmethod
    def dense_state_dict(module: nn.Module) -> dict[str, Any]:
        """The state dict that a module would have after `densify`; the module stays as it is."""
        return dense_state(module, module.state_dict())


def settings_of(
    rank: Rank | Mapping[str, Rank] | None,
    init: Init,
    mode: Mode,
    when: When,
    match: Patterns,
    exclude: Patterns,
    seed: int,
) -> Settings:
    """What was asked for, as words and numbers.

    Raises:
        ValueError: Something is out of its range.
    """
    refuse_seed(seed)
    if isinstance(rank, Mapping) and (not rank or match is not None):
        raise ValueError(
            f"LowRankFactorize(rank={rank!r}, match={match!r}): patterns of rank, one at least, choose the weights"
        )
    usual = 0.25 if rank is None and when == "start" else rank
    ranks: Any = tuple(usual.items()) if isinstance(usual, Mapping) else ((None, usual),)
    for _, one in ranks:
        if one is not None or isinstance(usual, Mapping):
            _refuse_rank(one)
    return Settings(ranks, init, mode, when, _several(match), _several(exclude), seed)


def _refuse_rank(rank: object) -> None:
    try:
        if (type(rank) is int and rank >= 1) or (type(rank) is float and 0 < rank < 1) or rank == "measured":
            return
        if isinstance(rank, str) and rank.startswith("energy:") and 0 < share_of(rank) <= 1:
            return
    except ValueError:
        pass
    raise ValueError(
        f"rank={rank!r}: a whole number from 1 on, a share of the short side between 0 and 1, 'energy:0.95' or "
        "'measured'"
    )


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
