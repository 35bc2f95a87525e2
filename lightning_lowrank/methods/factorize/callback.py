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
from lightning_lowrank.methods.method import Method
from lightning_lowrank.watching.trainer import beside


class LowRankFactorize(Method):
    """Train weights of low rank as factors: `W = A diag(s) B`, as two thin layers instead of one.

    A weight with m x n parameters becomes r (m + n + 1) parameters; gradients, optimizer state and multiply-adds shrink
    in the same way. The model changes at the start, since a rank below the full one loses part of the weight. The table
    at the start shows how much of its energy is kept. Frozen weights are left alone.

    Factors are created in `setup`, before `configure_optimizers`. In your own loop, call `prepare(model)` before you
    create its optimizer. Layers keep their class as a base class, and their other attributes. The factors of
    `net.0.weight` are `net.0.weight_A` `[outputs, r]`, `net.0.weight_s` `[r]` and `net.0.weight_B` `[r, inputs]`;
    `net.0.weight` is their product. They stay until `densify(module)`, which restores keys and classes.

    If both A and B are orthonormal, all singular values of their product are 1. The scale `s` between them can then
    represent any weight of this rank.

    With `rank="measured"` or `when="stable_rank_converged"`, the run begins with dense weights. Later its optimizer
    continues with the factors in the same parameter groups and with new moments.

    Curves of each weight: `factorize_update_norm`, the spectral norm of the product's change in one step;
    `factorize_orthogonality_gap`, the larger spectral norm of A'A - I and B B' - I; and `factorize_rank`. Also
    `factorize_stable_rank` and `factorize_effective_rank` of the product, and `factorize/num_parameters` of the module.

    Cost: one SVD of each weight at the start. For each weight, a Stiefel step takes two QR decompositions of thin
    factors. A bound or a report takes four and an SVD of 2r x 2r.

    Args:
        rank: Rank of all weights: a whole number, a share of the short side below 1, "energy:0.95", or "measured".
            "energy:0.95" takes as many directions as contain this share of the squared Frobenius norm. "measured" does
            the same for the change in the first three samples of a dense run. A mapping from patterns to ranks chooses
            the weights, too. Default: 0.25 from the start, or the stable rank, rounded up, once that has converged.
        init: "svd": the best approximation of the weight. "spectral": random orthonormal factors with the top singular
            values of the weight.
        orthogonality: "soft": adds the gradient of `weight (|A'A - I|^2 + |B B' - I|^2)`, after unscaling and clipping.
            "stiefel": keeps factors orthonormal after each step. None: leaves factors free.
        weight: Weight of the soft penalty.
        mode: "module": two thin layers. "parametrize": computes the weight at each access, for any kind of layer; it
            saves optimizer state and little else.
        when: "start", or "stable_rank_converged": once the stable ranks of all weights have stayed within 5 % over five
            samples.
        match: Weights to factorize: globs, `re:REGEX` or `type:LAYERCLASS`. Default: all except embeddings and the last
            linear layer.
        exclude: Patterns of weights to leave out.
        max_update: Bound on `factorize_update_norm`; a larger step is shortened.
        seed: Seed for random factors.
        every_n_steps: Optimizer steps between points of the curves, and between samples of the dense run.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single weights: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of range. Before training: a pattern matches nothing or a weight that cannot be
            factorized; no weight would get smaller; or no optimizer has the factors. Also if the module is factorized
            with other settings, or the checkpoint is from a run without factors. Orthonormal factors are refused in
            half precision and with LBFGS. Factorizing in mid-run is refused with several processes, `WeightAveraging`
            or `barebones=True`.

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
                raise ValueError(f"{argument}={value!r} must be a number above 0")
        act = Factorization(settings, OrthogonalSteps(orthogonality, weight, max_update), Waiting(when, every_n_steps))
        self._settings = settings
        super().__init__(act, FactorNumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the factors before `configure_optimizers`; refuse callbacks that cannot follow a change in mid-run."""
        if self._settings.is_deferred and stage == "fit":
            averaging = any(isinstance(c, WeightAveraging) for c in beside(trainer))
            trouble = (
                "WeightAveraging, which keeps a dense copy" if averaging else "barebones=True, which calls no callbacks"
            )
            if averaging or trainer.barebones:
                raise ValueError(
                    "LowRankFactorize: the weights would be replaced during training, which does not work with "
                    f"{trouble} after a batch. Give ranks and when='start'"
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
        """Multiply the factors out; keys and classes are then those of the dense module.

        Returns:
            The module.

        Raises:
            ValueError: The module has no factors.
        """
        return densify(module)

    @staticmethod
    def dense_state_dict(module: nn.Module) -> dict[str, Any]:
        """The state dict that a module would have after `densify`; the module does not change."""
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
    """The options as checked settings.

    Raises:
        ValueError: An option is out of range.
    """
    refuse_seed(seed)
    if isinstance(rank, Mapping) and (not rank or match is not None):
        raise ValueError(
            f"LowRankFactorize(rank={rank!r}, match={match!r}): a mapping of patterns to ranks chooses the weights; "
            "it must not be empty, and match must not be given"
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
        f"rank={rank!r} must be a whole number of at least 1, a share of the short side between 0 and 1, "
        "'energy:0.95' or 'measured'"
    )


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
