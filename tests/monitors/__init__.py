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
    Every,
    GradientAnatomyMonitor,
    LossMonitor,
    Monitor,
    MultifractalMonitor,
    NoiseScaleMonitor,
    NTKMonitor,
    Probe,
    RankAdvisor,
    RankMonitor,
    RepresentationMonitor,
    RouterMonitor,
    TrajectorySubspace,
    UpdateSizes,
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
        **{
            "budget": 100_000,
            "least": 0,
            "match": "re:.*(weight|lora)",
            "every_n_steps": 5,
            "per_site": True,
            "detail": "all",
        }
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
    "classes": lambda **options: RepresentationMonitor(
        **_USUAL | {"classifier": "net.head", "name": "classes"} | options
    ),
    "sizes of updates": lambda **options: _sizes(**_USUAL | options),
}


def _sizes(every_n_steps: int, **options: Any) -> Monitor:
    names = [quantity.name for quantity in UpdateSizes.quantities]
    return Monitor([Probe("update_size", UpdateSizes(), names, Every(every_n_steps))], **options)


# The layer that puts out a logit for each class; `net.2` of the cases that are not here.
CLASSIFIERS = {
    **dict.fromkeys(("dropout and batch norm", "validation", "tied weights", "fused attention", "LSTM"), "net.head"),
    **dict.fromkeys(("activation checkpointing", "reentrant checkpoint"), "net.second"),
    **dict.fromkeys(("two optimizers by hand", "two optimizers in turn"), "critic"),
    **{"spectral norm": "net", "backbone unfrozen": "head", "LoRA": "net.base_model.model.2.base_layer"},
    "layer": "net.1",
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
ENCODER = r"fast path of nn\.TransformerEncoderLayer in eval mode.*match layers outside of it"
# (monitor, case of `tests.trainings.CASES` or `COMPILED`) -> what it says before training.
REFUSED: dict[tuple[str, str], str] = {
    ("anatomy", "spectral norm"): "not complex, sharded or parametrised",
    ("rank", "fused attention"): ENCODER,
    **{(name, case): BY_HAND for name in REPLAYING for case in LOSSES},
    **{("dormant units", case): "finds no activation layer" for case in WITHOUT_ACTIVATIONS},
    **{("dormant units", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("attention", case): "layouts: .*matches nothing" for case in (*WITHOUT_ATTENTION, *COMPILED)},
    ("coordinate check", "spectral norm"): "finds no linear layer .* with an untied weight",
    **{("coordinate check", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("router", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("activation", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("representation", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("anatomy", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("rank", what): "hooks inside a compiled module never run" for what in COMPILED},
    **{("classes", what): "hooks inside a compiled module never run" for what in COMPILED},
    ("classes", "spectral norm"): "has a parametrised weight, which may change when it is read",
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
    **{("classes", case): "critics have no classes" for case in LOSSES},
    ("classes", "backbone unfrozen"): "a batch of eight in which no class is twice has no spread within classes",
}


def watchers(case: str, *names: str, **options: Any) -> dict[str, Monitor]:
    """The monitors of these names, or all, as they can watch a case: with a loss function where the step has none."""
    asked = [name for name in names or MONITORS | VARIANTS if REFUSED.get((name, case), BY_HAND) == BY_HAND]
    given = {name: {"loss_fn": LOSSES[case]} for name in asked if name.startswith(REPLAYING) and case in LOSSES}
    return {name: watcher(name, case, **options | given.get(name, {})) for name in asked}


def watcher(name: str, case: str, **options: Any) -> Monitor:
    """One of them, as it is for a case, whether or not it can watch that."""
    told = {"classifier": CLASSIFIERS.get(case, "net.2")} if name == "classes" else {}
    return (MONITORS | VARIANTS)[name](**options | told)
