"""The methods that there are, as the tests act with them.

A new one is a line of `METHODS`, with what it refuses in `REFUSED`. That it resumes exactly, in a Trainer and in a
loop, gives everything back, does in several processes what it does in one, can be copied, and lets all monitors watch
is then tested for free (`tests/promises/test_methods.py`).
"""

from collections.abc import Callable
from typing import Any

from lightning_lowrank import GaLore, LoRA, LotteryTicket
from lightning_lowrank.methods.method import Method

# As small as each can be, with everything that happens seldom happening within a few steps.
_GALORE: dict[str, Any] = {"rank": 3, "update_every": 4, "every_n_steps": 3, "match": "*weight*", "detail": "all"}

_LORA: dict[str, Any] = {"r": 2, "every_n_steps": 3, "match": "*weight*", "detail": "all"}

_TICKET: dict[str, Any] = {"rounds": 3, "steps_per_round": 3, "every_n_steps": 3, "detail": "all"}

METHODS: dict[str, Callable[..., Method]] = {
    "galore": lambda **options: GaLore(**_GALORE | options),
    "galore, svd, both sides, rotated": lambda **options: GaLore(
        **_GALORE | {"side": "both", "basis": "svd", "on_refresh": "rotate"} | options
    ),
    "galore, random, reset": lambda **options: GaLore(
        **_GALORE | {"basis": "random", "on_refresh": "reset", "stagger": False} | options
    ),
    "lottery ticket": lambda **options: LotteryTicket(**_TICKET | options),
    "lottery ticket, by layer, rewound to step 2": lambda **options: LotteryTicket(
        **_TICKET | {"rewind_step": 2, "scope": "layer", "prune": 0.4} | options
    ),
    "lottery ticket, early bird": lambda **options: LotteryTicket(
        **_TICKET | {"rounds": 2, "steps_per_round": 8, "early_bird": True, "look_every_n_steps": 1} | options
    ),
    "lora": lambda **options: LoRA(**_LORA | options),
    "lora, pissa, LoRA+, adapters alone": lambda **options: LoRA(
        **_LORA | {"init": "pissa", "learning_rate_ratio": 4.0, "adapter_only": True} | options
    ),
    "lora, orthogonal, merged on save": lambda **options: LoRA(
        **_LORA | {"init": "orthogonal", "rslora": True, "merge_on_save": True} | options
    ),
    "lora, eva, head trained": lambda **options: LoRA(**_LORA | {"init": "eva", "match": None} | options),
}

# What takes the structure of a method out of a module again, of those that change it.
GIVE_BACK: dict[str, Callable[[Any, Any], Any]] = {
    name: lambda method, module: method.merge(module) for name in METHODS if name.startswith("lora")
}

NOT_BY_ENTRY = "what works treats each entry by itself"
# (method, case of `tests.trainings.CASES`) -> what it says before training.
REFUSED: dict[tuple[str, str], str] = {(name, "LBFGS"): NOT_BY_ENTRY for name in METHODS if name.startswith("galore")}

_OF_LORA = {
    "two optimizers by hand": "has frozen parameters alone|all matrices are embeddings or the head",
    "two optimizers in turn": "has frozen parameters alone|all matrices are embeddings or the head",
    "spectral norm": "it is computed by a parametrization|all matrices are",
    "LSTM": "LSTM keeps its weights in one piece of memory",
    "backbone unfrozen": "both say what is frozen",
    "LoRA": "the module has an adapter already",
}
REFUSED |= {(name, case): why for name in GIVE_BACK for case, why in _OF_LORA.items()}
REFUSED |= {(name, "LBFGS"): "LBFGS has one rate for all" for name in METHODS if "LoRA+" in name}
REFUSED |= {
    (name, case): "there is nothing to adapt"
    for name in METHODS
    if "eva" in name
    for case in ("dropout and batch norm", "validation")
}
