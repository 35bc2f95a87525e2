"""The monitors that there are, as the tests watch with them.

A new one is a line of `MONITORS`, with what it refuses in `REFUSED`. That it changes nothing, resumes, outlives faults
and lack of memory, can be copied, waits for no device, works in several processes and beside every other is then tested
for free (`tests/promises`).
"""

from collections.abc import Callable
from typing import Any

from lightning_lowrank import (
    ActivationMonitor,
    AttentionMonitor,
    ConcentrationMonitor,
    CoordinateCheckMonitor,
    CurvatureMonitor,
    DormantUnitsMonitor,
    GradientAnatomyMonitor,
    LossMonitor,
    Monitor,
    MultifractalMonitor,
    NoiseScaleMonitor,
    NTKMonitor,
    RankAdvisor,
    RankMonitor,
    RepresentationMonitor,
    RouterMonitor,
    TrajectorySubspace,
)
from lightning_lowrank.monitors.rank import OF_PARAMETERS, SOURCES
from tests.trainings import CASES, COMPILED, LOSSES

STATISTICS = ("effective_rank", "stable_rank", "spectrum_drift", "subspace_overlap", "weight_ratio")
OPERATORS = ("hessian", "gauss_newton", "empirical_fisher", "monte_carlo_fisher")

# As small as each can be with everything that it measures. Alerts are off: layers of the cases are odd on purpose.
_USUAL: dict[str, Any] = {"every_n_steps": 5, "per_site": True, "detail": "all", "alerts": None}

# In the order that `nn.MultiheadAttention` has of itself.
TOLD = {r"re:(qkv\.|in_proj_)weight$": "qkv heads d"}

MONITORS: dict[str, Callable[..., Monitor]] = {
    "rank": lambda **options: RankMonitor(tuple(SOURCES), STATISTICS, **_USUAL | options),
    "curvature": lambda **options: CurvatureMonitor(
        **_USUAL | {"level": "standard", "operators": OPERATORS, "top_k": 1} | options
    ),
    "ntk": lambda **options: NTKMonitor(
        **_USUAL | {"kernel": "full", "num_examples": 4, "num_projections": 4, "top_k": 1} | options
    ),
    "multifractal": lambda **options: MultifractalMonitor(**_USUAL | options),
    "anatomy": lambda **options: GradientAnatomyMonitor(**_USUAL | {"max_rows": 16} | options),
    "concentration": lambda **options: ConcentrationMonitor(**_USUAL | options),
    "dormant units": lambda **options: DormantUnitsMonitor(**_USUAL | options),
    "noise scale": lambda **options: NoiseScaleMonitor(**_USUAL | options),
    "loss": lambda **options: LossMonitor(**_USUAL | options),
    "representation": lambda **options: RepresentationMonitor(**_USUAL | options),
    "attention": lambda **options: AttentionMonitor(**_USUAL | {"layouts": TOLD} | options),
    "activation": lambda **options: ActivationMonitor(**_USUAL | options),
    "coordinate check": lambda **options: CoordinateCheckMonitor(**_USUAL | options),
    "router": lambda **options: RouterMonitor(**_USUAL | {"match": "type:Linear", "top_k": 1} | options),
    "advisor": lambda **options: RankAdvisor(
        **{"budget": 100_000, "least": 0, "match": "*weight*", "every_n_steps": 5, "per_site": True, "detail": "all"}
        | options
    ),
    "trajectory": lambda **options: TrajectorySubspace(**_USUAL | {"every_n_steps": 2, "max_snapshots": 8} | options),
}

# The same monitors at work in other ways: watched for neutrality too.
VARIANTS: dict[str, Callable[..., Monitor]] = {
    "rank of parameters": lambda **options: RankMonitor(
        tuple(OF_PARAMETERS), **_USUAL | {"histograms": True, "name": "parameters"} | options
    ),
    "rank, spread": lambda **options: RankMonitor(
        tuple(OF_PARAMETERS), STATISTICS, **_USUAL | {"spread": 3, "name": "spread"} | options
    ),
    "curvature, light": lambda **options: CurvatureMonitor("light", **_USUAL | {"name": "light"} | options),
    "curvature, full, fixed": lambda **options: CurvatureMonitor(
        "full", OPERATORS, **_USUAL | {"top_k": 1, "batch": "fixed", "every_n_steps": 20, "name": "full"} | options
    ),
    "ntk as in training": lambda **options: MONITORS["ntk"](
        **{"train_mode": True, "every_n_steps": 10, "name": "train"} | options
    ),
    "neuromfa": lambda **options: MultifractalMonitor(
        "neuromfa", **_USUAL | {"name": "network", "max_neurons": 20, "num_repeats": 2, "every_n_steps": 10} | options
    ),
    "directions": lambda **options: ConcentrationMonitor(
        ["direction"], **_USUAL | {"densities": [], "name": "directions"} | options
    ),
}

# Those that run a step again, or may have to.
REPLAYING = ("curvature", "ntk", "noise scale")
TWICE, NTKS = ("curvature", "curvature, full, fixed"), ("ntk", "ntk as in training")
BY_HAND = r"manual optimization.*loss_fn"
# Cases whose activations are functions.
WITHOUT_ACTIVATIONS = (
    *("dropout and batch norm", "validation", "two optimizers by hand", "two optimizers in turn", "tied weights"),
    *("spectral norm", "activation checkpointing", "reentrant checkpoint", "fused attention", "LSTM"),
)
WITHOUT_ATTENTION = tuple(case for case in CASES if case != "fused attention")
ENCODER = r"fast path that nn\.TransformerEncoderLayer takes.*match layers outside of it"
# (monitor, case of `tests.trainings.CASES` or `COMPILED`) -> what it says before training.
REFUSED: dict[tuple[str, str], str] = {
    ("anatomy", "spectral norm"): "not complex, sharded or parametrised",
    ("rank", "fused attention"): ENCODER,
    **{(name, case): BY_HAND for name in REPLAYING for case in LOSSES},
    **{("dormant units", case): "finds no activation layer" for case in WITHOUT_ACTIVATIONS},
    **{("dormant units", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("attention", case): "layouts: .*fits nothing" for case in (*WITHOUT_ATTENTION, *COMPILED)},
    ("coordinate check", "spectral norm"): "finds no linear layer with a weight of its own",
    **{("coordinate check", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("router", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("activation", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("representation", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("anatomy", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("rank", what): "hooks inside a compiled module never run" for what in COMPILED},
}
# Those that can watch a model of any kind.
ANY = {name: make for name, make in MONITORS.items() if (name, "plain") not in REFUSED}
# (monitor, case) in which some numbers cannot be had, which are counted as failures.
INCOMPLETE: dict[tuple[str, str], str] = {
    **{
        (name, case): "the loss in the place of the step is none of torch's"
        for name in (*TWICE, *NTKS)
        for case in LOSSES
    },
    **{(name, "spectral norm"): "torch holds its vectors fixed: second derivatives are wrong" for name in TWICE},
    **{(name, "reentrant checkpoint"): "has no second derivative" for name in (*TWICE, "curvature, light")},
}


def watchers(case: str, *names: str, **options: Any) -> dict[str, Monitor]:
    """The monitors of these names, or all, as they can watch a case: with a loss function where the step has none."""
    both = MONITORS | VARIANTS
    asked = [name for name in names or both if (name, case) not in REFUSED or REFUSED[name, case] == BY_HAND]
    given = {"loss_fn": LOSSES[case]} if case in LOSSES else {}
    return {name: both[name](**options | (given if name.startswith(REPLAYING) else {})) for name in asked}
