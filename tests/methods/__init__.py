"""The methods that there are, as the tests act with them.

A new one is a line of `METHODS`, with what it refuses in `REFUSED`. That it resumes exactly, in a Trainer and in a
loop, gives everything back, does in several processes what it does in one, can be copied, and lets all monitors watch
is then tested for free (`tests/promises/test_methods.py`).
"""

from collections.abc import Callable
from typing import Any

from lightning_lowrank import GaLore
from lightning_lowrank.methods.method import Method

# As small as each can be, with everything that happens seldom happening within a few steps.
_GALORE: dict[str, Any] = {"rank": 3, "update_every": 4, "every_n_steps": 3, "match": "*weight*", "detail": "all"}

METHODS: dict[str, Callable[..., Method]] = {
    "galore": lambda **options: GaLore(**_GALORE | options),
    "galore, svd, both sides, rotated": lambda **options: GaLore(
        **_GALORE | {"side": "both", "basis": "svd", "on_refresh": "rotate"} | options
    ),
    "galore, random, reset": lambda **options: GaLore(
        **_GALORE | {"basis": "random", "on_refresh": "reset", "stagger": False} | options
    ),
}

# What takes the structure of a method out of a module again, of those that change it.
GIVE_BACK: dict[str, Callable[[Any, Any], Any]] = {}

NOT_BY_ENTRY = "what works treats each entry by itself"
# (method, case of `tests.trainings.CASES`) -> what it says before training.
REFUSED: dict[tuple[str, str], str] = {(name, "LBFGS"): NOT_BY_ENTRY for name in METHODS if name.startswith("galore")}
