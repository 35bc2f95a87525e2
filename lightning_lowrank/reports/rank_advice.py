"""Which rank each weight is worth, under a budget: as a table, JSON, and in the words of who takes ranks.

Shape letters:  M rows, N columns of a matrix
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from lightning_lowrank.maths.allocation import allocate

# Who takes the ranks: what a direction costs, and bytes of memory for each number of it. LoRA trains both factors, each
# number with a gradient and two moments; GaLore keeps a basis and two moments of the projection.
Method = Literal["lora", "galore"]
BYTES: Mapping[Method, int] = {"lora": 16, "galore": 4}
MEMORY = re.compile(r"(?P<size>\d+(\.\d+)?)\s*(?P<unit>kB|MB|GB)")
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Energies:
    """How the energy of what moved a weight spreads over directions.

    Attributes:
        shapes: Rows and columns of each matrix of the weight: of one, unless it is fused.
        values: Squared singular values, largest first; of several matrices the sums of the first ones, the second ones
            and so on, as each gets the same rank.
    """

    shapes: tuple[tuple[int, int], ...]
    values: tuple[int | float, ...]

    def cost(self, method: Method) -> int:
        """Numbers that one direction takes."""
        lora, more = sum(map(sum, self.shapes)), sum(map(max, self.shapes))
        return lora if method == "lora" else lora + more


@dataclass(frozen=True)
class RankAdvice:
    """A rank for each weight; together they meet a budget.

    Attributes:
        energies: Measured energies, by name of the weight.
        ranks: Advised ranks, by name; 0 for weights that should not be adapted.
        budget: The budget, in parameters.
        method: The method that will use the ranks.
        rates: Learning rates that the run suggests, by rule; see `RankAdvisor`.
    """

    energies: Mapping[str, Energies]
    ranks: Mapping[str, int]
    budget: float
    method: Method = "lora"
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        """Number of parameters that the ranks need."""
        return self.cost_of(self.ranks)

    @property
    def uniform(self) -> dict[str, int]:
        """Ranks that are the same everywhere, capped by the shapes: the largest for the parameters that the advised
        ranks use.
        """
        rank = 0
        while self.cost_of(found := self._uniform(rank + 1)) <= self.budget and found != self._uniform(rank):
            rank += 1
        return self._uniform(rank)

    @property
    def patterns(self) -> dict[str, int]:
        """Argument of `LoRA(r=...)` and `GaLore(rank=...)`."""
        return {name: rank for name, rank in self.ranks.items() if rank}

    def cost_of(self, ranks: Mapping[str, int]) -> int:
        """Number of parameters that ranks need."""
        return sum(rank * self.energies[name].cost(self.method) for name, rank in ranks.items())

    def captured(self, ranks: Mapping[str, int]) -> float:
        """Share of all energy that ranks capture; NaN if there is none."""
        whole = math.fsum(e for one in self.energies.values() for e in one.values)
        kept = math.fsum(e for name, rank in ranks.items() for e in self.energies[name].values[:rank])
        return kept / whole if whole else math.nan

    def share(self, name: str) -> float:
        """Share of the energy of one weight that its rank captures; NaN if there is none."""
        values = self.energies[name].values
        whole = math.fsum(values)
        return math.fsum(values[: self.ranks[name]]) / whole if whole else math.nan

    def peft(self, within: str = "") -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`; alpha is the rank, so that every scaling is 1.

        Args:
            within: The part of the module that peft gets, such as "model".
        """
        prefix = f"{within}." if within else ""
        ranks = {_layer(name.removeprefix(prefix)): rank for name, rank in self.patterns.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": usual,
            "target_modules": "|".join(re.escape(path) for path in ranks),
            "rank_pattern": others,
            "alpha_pattern": dict(others),
        }

    def json(self) -> dict[str, Any]:
        """All numbers in the form of JSON."""
        return {
            "method": self.method,
            "budget": self.budget,
            "spent": self.spent,
            "captured": _number(self.captured(self.ranks)),
            "captured_by_uniform": _number(self.captured(self.uniform)),
            "ranks": dict(self.ranks),
            "uniform": self.uniform,
            "captured_of_each": {name: _number(self.share(name)) for name in self.ranks},
            "rates": dict(self.rates),
            "peft": self.peft(),
        }

    def text(self) -> str:
        """What a JSON file of it contains."""
        return json.dumps(self.json(), indent=2, allow_nan=False) + "\n"

    def save(self, file: str | Path) -> None:
        """Write a JSON file."""
        Path(file).write_text(self.text())

    def __rich__(self) -> Table:
        """The table that `rich.print` shows."""
        table = Table(title=self._title(), title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("weight", overflow="fold", min_width=16)
        for heading in ("shape", "rank", "uniform", "captured", "numbers"):
            table.add_column(heading, justify="right")
        uniform = self.uniform
        for name, rank in self.ranks.items():
            one = self.energies[name]
            shape = ", ".join(dict.fromkeys(f"{m}x{n}" for m, n in one.shapes))
            row = (f"{self.share(name):.3f}", str(rank * one.cost(self.method)))
            table.add_row(name, shape, str(rank), str(uniform[name]), *row)
        return table

    def _title(self) -> str:
        advised, even = self.captured(self.ranks), self.captured(self.uniform)
        title = (
            f"{self.spent} of {self.budget:g} parameters capture {advised:.3f} of the energy; uniform ranks "
            f"capture {even:.3f}"
        )
        rates = ", ".join(f"{rule} {rate:.3g}" for rule, rate in self.rates.items())
        return f"{title}\nlearning rates: {rates}" if rates else title

    def _uniform(self, rank: int) -> dict[str, int]:
        return {name: min(rank, len(one.values)) for name, one in self.energies.items()}


def advise(
    energies: Mapping[str, Energies],
    budget: int | str,
    *,
    method: Method = "lora",
    least: int = 1,
    rates: Mapping[str, float] | None = None,
) -> RankAdvice:
    """Ranks that capture the most energy under a budget; see `allocate`.

    Args:
        energies: Of each weight.
        budget: Budget for all ranks together, in parameters or as memory such as "8 MB". For "lora" a parameter takes
            16 bytes: both factors, their gradients and two moments in float32. For "galore" it takes 4 bytes of state.
        method: Who takes the ranks.
        least: Rank of every weight that moved at all.
        rates: Learning rates to hand on.

    Raises:
        ValueError: The budget is no such thing, or too small.
    """
    numbers = numbers_of(budget, method)
    costs = {name: one.cost(method) for name, one in energies.items()}
    ranks = allocate({name: one.values for name, one in energies.items()}, costs, numbers, least=least)
    return RankAdvice(energies, ranks, numbers, method, rates or {})


def numbers_of(budget: int | str, method: Method) -> float:
    """A budget as a number of parameters.

    Raises:
        ValueError: It is no whole number from 1 on, and no memory; or nobody takes ranks under that name.
    """
    if method not in list(BYTES):
        raise ValueError(f"method={method!r} must be one of {list(BYTES)}")
    if isinstance(budget, str):
        found = MEMORY.fullmatch(budget)
        if found is not None:
            return float(found["size"]) * UNITS[found["unit"]] / BYTES[method]
        budget = int(budget) if budget.isdecimal() else budget
    if type(budget) is not int or budget < 1:
        raise ValueError(
            f"budget={budget!r} must be a whole number of parameters, such as 200000, or memory, such as '8 MB'"
        )
    return float(budget)


def added(energies: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Energies of several matrices that get one rank: those of the first directions together, and so on."""
    longest = max(map(len, energies), default=0)
    return tuple(math.fsum(one[k] for one in energies if k < len(one)) for k in range(longest))


def _layer(name: str) -> str:
    """The path of the layer that has a weight."""
    return name.rpartition(".")[0]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
