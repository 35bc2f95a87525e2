"""The methods that there are, as the tests act with them.

A new one is a line of `METHODS`, with what it refuses in `REFUSED`. That it resumes exactly, in a Trainer and in a
loop, gives everything back, does in several processes what it does in one, can be copied, and lets all monitors watch
is then tested for free (`tests/promises/test_methods.py`).
"""

from collections.abc import Callable
from typing import Any

from lightning_lowrank import AdaLoRA, GaLore, LoRA, LotteryTicket, LowRankFactorize, ReLoRA, SubspaceTraining
from lightning_lowrank.methods.method import Method

# As small as each can be, with everything that happens seldom happening within a few steps.
_GALORE: dict[str, Any] = {"rank": 3, "update_every": 4, "every_n_steps": 3, "match": "*weight*", "detail": "all"}

_LORA: dict[str, Any] = {"r": 2, "every_n_steps": 3, "match": "*weight*", "detail": "all"}
_RELORA: dict[str, Any] = _LORA | {"every": 3, "rewarm": 2}

_FACTORIZE: dict[str, Any] = {"rank": 3, "every_n_steps": 3, "match": "*weight*", "detail": "all"}

_SUBSPACE: dict[str, Any] = {"basis": "random", "k": 3, "every_n_steps": 3, "detail": "all"}

_TICKET: dict[str, Any] = {"rounds": 3, "steps_per_round": 3, "every_n_steps": 3, "detail": "all"}

METHODS: dict[str, Callable[..., Method]] = {
    "galore": lambda **options: GaLore(**_GALORE | options),
    "galore, measured, svd, both sides, rotated": lambda **options: GaLore(
        **_GALORE | {"rank": "measured", "side": "both", "basis": "svd", "on_refresh": "rotate"} | options
    ),
    "galore, random, reset, fira": lambda **options: GaLore(
        **_GALORE | {"basis": "random", "on_refresh": "reset", "residual": "fira", "stagger": False} | options
    ),
    "subspace": lambda **options: SubspaceTraining(**_SUBSPACE | options),
    "subspace, weights alone, biases whole": lambda **options: SubspaceTraining(
        **_SUBSPACE | {"match": "*weight*", "train_also": "*bias*", "seed": 4} | options
    ),
    "lottery ticket": lambda **options: LotteryTicket(**_TICKET | options),
    "lottery ticket, by layer, rewound to step 2": lambda **options: LotteryTicket(
        **_TICKET | {"rewind_step": 2, "scope": "layer", "prune": 0.4} | options
    ),
    "lottery ticket, early bird": lambda **options: LotteryTicket(
        **_TICKET | {"rounds": 2, "steps_per_round": 8, "early_bird": True, "look_every_n_steps": 1} | options
    ),
    "lottery ticket, neurons": lambda **options: LotteryTicket(**_TICKET | {"units": "neuron", "prune": 0.4} | options),
    "lora": lambda **options: LoRA(**_LORA | options),
    "lora, pissa, LoRA+, adapters alone": lambda **options: LoRA(
        **_LORA | {"init": "pissa", "learning_rate_ratio": 4.0, "adapter_only": True} | options
    ),
    "lora, orthogonal, merged on save": lambda **options: LoRA(
        **_LORA | {"init": "orthogonal", "rslora": True, "merge_on_save": True} | options
    ),
    "relora": lambda **options: ReLoRA(**_RELORA | options),
    "relora, some reset, after a warm start": lambda **options: ReLoRA(
        **_RELORA | {"reset": "magnitude:0.5", "warm_start_steps": 2} | options
    ),
    "lora, by peft, corda": lambda **options: LoRA(
        **_LORA | {"init": "corda", "match": None, "backend": "peft"} | options
    ),
    "adalora": lambda **options: AdaLoRA(
        **{"total_steps": 8, "r": 1, "initial_r": 3, "last_steps": 2, "every_n_steps": 3, "detail": "all"} | options
    ),
    "lora, eva, head trained": lambda **options: LoRA(**_LORA | {"init": "eva", "match": None} | options),
    "factorize": lambda **options: LowRankFactorize(**_FACTORIZE | options),
    "factorize, soft, spectral, bounded": lambda **options: LowRankFactorize(
        **_FACTORIZE | {"orthogonality": "soft", "weight": 0.1, "init": "spectral", "max_update": 0.05} | options
    ),
    "factorize, stiefel": lambda **options: LowRankFactorize(
        **_FACTORIZE | {"rank": "energy:0.5", "orthogonality": "stiefel"} | options
    ),
    "factorize, parametrized": lambda **options: LowRankFactorize(
        **_FACTORIZE | {"mode": "parametrize", "orthogonality": "stiefel"} | options
    ),
}

# What takes the structure of a method out of a module again, of those that change it.
GIVE_BACK: dict[str, Callable[[Any, Any], Any]] = (
    {name: lambda method, module: method.merge(module) for name in METHODS if "lora" in name}
    | {name: lambda method, module: method.merge(module) for name in METHODS if name.startswith("subspace")}
    | {name: lambda method, module: method.densify(module) for name in METHODS if name.startswith("factorize")}
)

NOT_BY_ENTRY = "use an optimizer that updates each entry independently"
# (method, case of `tests.trainings.CASES`) -> what it says before training.
REFUSED: dict[tuple[str, str], str] = {(name, "LBFGS"): NOT_BY_ENTRY for name in METHODS if name.startswith("galore")}

REFUSED |= {
    ("lottery ticket, neurons", case): "found no neurons"
    for case in (
        "dropout and batch norm",
        "validation",
        "two optimizers by hand",
        "two optimizers in turn",
        "tied weights",
        "spectral norm",
        "LSTM",
        "LoRA",
    )
}

REFUSED["lottery ticket, neurons", "backbone unfrozen"] = "all weights that it could prune are frozen"

_OF_LORA = {
    "two optimizers by hand": "has only frozen parameters|all matrices are embeddings or the head",
    "two optimizers in turn": "has only frozen parameters|all matrices are embeddings or the head",
    "spectral norm": "a parametrization, a norm or a mask computes it|all matrices are",
    "LSTM": "LSTM stores its weights in one block of memory",
    "backbone unfrozen": "both decide what is frozen",
    "LoRA": "the module already has an adapter",
}
REFUSED |= {(name, case): why for name in METHODS if "lora" in name for case, why in _OF_LORA.items()}
for _name in (name for name in METHODS if name.startswith("relora")):  # all else trains
    del REFUSED[_name, "two optimizers by hand"], REFUSED[_name, "two optimizers in turn"]
REFUSED |= {(name, "LBFGS"): "LBFGS has one learning rate" for name in METHODS if "LoRA+" in name or "relora" in name}
REFUSED |= {
    (name, case): "there is nothing to adapt"
    for name in METHODS
    if "eva" in name or "corda" in name or "adalora" in name
    for case in ("dropout and batch norm", "validation")
}
REFUSED |= {
    (name, "tied weights"): "there is nothing to adapt" for name in METHODS if "by peft" in name or "adalora" in name
}

_OF_SUBSPACE = {
    "spectral norm": "no weight is left to train",
    "backbone unfrozen": "both decide what is frozen",
    "LoRA": "the module has an adapter",
}
REFUSED |= {(name, case): why for name in METHODS if name.startswith("subspace") for case, why in _OF_SUBSPACE.items()}

_FACTORIZED = [name for name in METHODS if name.startswith("factorize")]
_OF_FACTORIZE = {
    "spectral norm": "a parametrization, a norm or a mask computes it",
    "LSTM": "LSTM stores its weights in one block of memory",
    "LoRA": "the module has an adapter",
}
REFUSED |= {(name, case): why for name in _FACTORIZED for case, why in _OF_FACTORIZE.items()}
REFUSED |= {
    (name, "fused attention"): "uses the weight without calling the layer"
    for name in _FACTORIZED
    if "parametrized" not in name
}
REFUSED |= {(name, "tied weights"): "layers share it" for name in _FACTORIZED if "parametrized" in name}
REFUSED |= {
    (name, case): why
    for name in _FACTORIZED
    if "stiefel" in name or "parametrized" in name
    for case, why in (("bf16-true", "too coarse for orthonormal columns"), ("LBFGS", "LBFGS searches along lines"))
}
