"""`RankAdvisor`: a rank for each weight, from gradients and accumulated updates of a short run.

Shape letters:  M rows, N columns of a matrix   S short side
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.parameter_source import change
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.measuring.sources.gradients import gradient
from lightning_lowrank.methods.matrices import Patterns, matrices
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.rank_advice import Energies, Method, RankAdvice, added, advise, numbers_of
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of
from lightning_lowrank.watching.trainer import beside

By = Literal["updates", "gradients"]
PAIR = re.compile(r"\.lora(\..*)?$")


@dataclass(frozen=True)
class Options:
    """Options of the advice."""

    budget: int | str
    method: Method
    by: By
    least: int

    def __post_init__(self) -> None:
        """Refuse what is no question.

        Raises:
            ValueError: Something is out of its range.
        """
        numbers_of(self.budget, self.method)
        if self.by not in get_args(By):
            raise ValueError(f"by={self.by!r} must be one of {list(get_args(By))}")
        if type(self.least) is not int or self.least < 0:
            raise ValueError(f"least={self.least!r} must be a whole number of at least 0")


class Directions(NumberSource):
    """Energies of the directions of gradients and accumulated updates, and the ranks that follow.

    Args:
        options: Options of the advice.
        match: Weights, as `LoRA` takes them.
        exclude: Patterns of weights to leave out.
    """

    name = "advisor"
    of_parameters = True

    def __init__(self, options: Options, match: Patterns, exclude: Patterns) -> None:
        self._options, self._match, self._exclude = options, match, exclude
        sites = [Quantity(f"advisor_{name}", per_site=True, detail="core") for name in ("rank", "captured")]
        self.quantities = [Quantity("advisor_moved", detail="core"), *sites]
        self._sites: list[Site] = []
        self._initial: dict[str, Sequence[Tensor]] = {}
        # Of each site the energies of its matrices, summed over gradients; the latest of updates.
        self._gradients: dict[str, list[Tensor]] = {}
        self._updates: dict[str, list[Tensor]] = {}
        self._ranks: dict[str, int] = {}

    def plan(self, training: Training) -> None:
        """Choose the trained weights, and keep their initial values."""
        wanted = {id(p) for p in matrices(training.module, self._match, self._exclude).matrices.values()}
        found = [site for site in sites(training.module) if wanted & set(map(id, site.parameters))]
        self._sites = [site for site in found if any(p.requires_grad for p in site.parameters)]
        if not self._sites:
            raise ValueError("RankAdvisor: none of the chosen matrices is trained; choose others with match")
        sharded = next((s.name for s in self._sites if any(isinstance(p, DTensor) for p in s.parameters)), None)
        if sharded is not None:
            raise ValueError(f"RankAdvisor cannot advise on {sharded!r}, which is sharded over several processes")
        # Refused now, where the least ranks are above the budget.
        several = {
            _weight(site): Energies(tuple(self._shapes(site)), (1.0,) * self._options.least) for site in self._sites
        }
        advise(several, self._options.budget, method=self._options.method, least=self._options.least)
        self._initial |= {
            site.name: [value.clone() for value in site.values()]
            for site in self._sites
            if site.name not in self._initial
        }

    def labels(self) -> list[str]:
        """The whole model, and each weight."""
        return [WHOLE_MODEL, *dict.fromkeys(map(_weight, self._sites))]

    def gradients_final(self, step: Step) -> list[object]:  # type: ignore[override]
        """Add up the energies of gradients."""
        for site in self._sites:
            if step.owns(site):
                found = self._energies(site, gradient(site, step.scale))
                before = self._gradients.get(site.name) or [torch.zeros_like(one) for one in found]
                self._gradients[site.name] = [one + more for one, more in zip(before, found, strict=True)]
        return []

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """The current ranks, and the share of the budget that moved since the last sample."""
        self.look()
        advice = self.advice(self._options)
        moved, self._ranks = _moved(advice, self._ranks), dict(advice.ranks)
        each = {
            name: {"advisor_rank": float(rank), "advisor_captured": advice.share(name)}
            for name, rank in advice.ranks.items()
        }
        found = {WHOLE_MODEL: {"advisor_moved": moved}, **each}
        return [
            Numbers(name, {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()})
            for name, values in found.items()
        ]

    def look(self) -> None:
        """Measure the distance of the weights from their initial values."""
        for site in self._sites:
            began = [old.to(new.device) for old, new in zip(self._initial[site.name], site.values(), strict=True)]
            self._updates[site.name] = self._energies(site, change(site, began))

    def advice(self, options: Options, rates: Mapping[str, float] | None = None) -> RankAdvice:
        """Ranks from the samples so far."""
        seen = self._updates if options.by == "updates" else self._gradients
        parts: dict[str, tuple[list[tuple[int, int]], list[list[float]]]] = {}
        for site in self._sites:
            shapes, energies = parts.setdefault(_weight(site), ([], []))
            shapes.extend(self._shapes(site))
            energies.extend(one.nan_to_num(0.0).tolist() for one in seen.get(site.name, []))
        known = {name: Energies(tuple(shapes), added(energies)) for name, (shapes, energies) in parts.items()}
        return advise(known, options.budget, method=options.method, least=options.least, rates=rates)

    def state_dict(self) -> dict[str, Any]:
        """Initial weights, and the sums."""
        return {"initial": self._initial, "gradients": self._gradients, "updates": self._updates, "ranks": self._ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the sums."""
        self._initial, self._gradients, self._updates, self._ranks = (
            dict(state.get(name, {})) for name in ("initial", "gradients", "updates", "ranks")
        )

    def _energies(self, site: Site, reading: Reading) -> list[Float[Tensor, " S"]]:
        """Squared singular values of each matrix; zeros where there is nothing to read."""
        if not reading.parts:
            return [torch.zeros(min(shape), dtype=torch.float64) for shape in self._shapes(site)]
        read = reading.make(*reading.parts)
        assert isinstance(read, Tensor)
        spectra = decompose(self._matrices(site, read), "values", sketch_above=sys.maxsize).spectra
        return [spectrum.values.double().square().cpu() for spectrum in spectra]

    def _matrices(self, site: Site, read: Num[Tensor, "*B M N"]) -> list[Num[Tensor, "M N"]]:
        """Those that get a rank each: parts of a fused weight for LoRA, all of it for GaLore."""
        several = list(read.reshape(-1, *read.shape[-2:]))
        return [torch.cat(several)] if self._options.method == "galore" else several

    def _shapes(self, site: Site) -> list[tuple[int, int]]:
        *batch, rows, columns = site.shape
        count = math.prod(batch)
        return [(count * rows, columns)] if self._options.method == "galore" else count * [(rows, columns)]


class RankAdvisor(Monitor):
    """Advise a rank for each weight under a budget, from a short run of full fine-tuning or of LoRA with a larger rank.

    It adds up the energies (squared singular values) of gradients on due steps, and measures those of the accumulated
    update W_t - W_0. It then spends the budget on the directions with the most energy per parameter, over all weights.
    `advice` has the ranks: `LoRA(r=advisor.advice.patterns)`, `LoraConfig(**advisor.advice.peft())`,
    `GaLore(rank=advisor.advice.patterns)`, `rich.print(advisor.advice)`, `advisor.advice.save("ranks.json")`.

    Captured energy says how much of full fine-tuning the ranks could represent; it promises no accuracy. `advice` also
    says how much uniform ranks capture, and docs/methods/choose-ranks.md has results of trainings.

    In a LoRA run it reads the products without their scaling, under the names of the weights. The budget then counts
    the parameters that `LoRA` creates: a fused projection has one pair for each part.

    `advice.rates` has learning rates to start with. "ten_times" is ten times the largest rate of the run.
    "gradient_descent_below" needs a `CurvatureMonitor("standard")` in the same run. It is 2 over the largest curvature
    that the second factors of LoRA with its default init can have; above it, plain gradient descent may diverge. It
    does not apply to Adam.

    Curves: `advisor/rank_median` and `advisor/captured_median`, at "standard" also of each weight; and `advisor/moved`,
    the share of the ranks' parameters that moved to another weight since the last sample. It is 1 at the first sample,
    and near 0 once a longer run would not change the advice.

    Cost: a copy of the weights, also in checkpoints, and two eigendecompositions of the short side of each weight on
    due steps.

    Args:
        budget: Budget for all ranks together: a count of parameters, or memory such as "8 MB".
        method: The method that will use the ranks: "lora" or "galore".
        by: "updates" ranks directions by the accumulated update, "gradients" by gradients averaged over due steps.
        least: Smallest rank of a weight that changed; `GaLore` keeps full moments for weights without a rank.
        match: Weights: globs, `re:REGEX` or `type:LAYERCLASS`. Default: all except embeddings and the last linear
            layer.
        exclude: Patterns of weights to leave out.
        every_n_steps: Optimizer steps between two samples; default 10.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single weights: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        max_overhead: Largest increase of training time, 0.01 for 1 %. A `Budget` then chooses the cadence.

    Raises:
        ValueError: An option is out of range. When training starts: a pattern matches nothing or no trained weight, a
            weight is sharded, or the budget is too small for the least ranks.

    Examples:
        >>> RankAdvisor(budget=200_000)
        RankAdvisor(budget=200000)
    """

    word = "advisor"

    def __init__(
        self,
        budget: int | str,
        method: Method = "lora",
        by: By = "updates",
        least: int = 1,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        every_n_steps: int | None = None,
        *,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        max_overhead: float | None = None,
    ) -> None:
        self._asked = Options(budget, method, by, least)
        self._source = Directions(self._asked, match, exclude)
        self._rates: dict[str, float] = {}
        schedule = cadence(every_n_steps, max_overhead, 10)
        super().__init__(probe_of(self._source, schedule), detail=detail, per_site=per_site, name=name)

    @property
    def advice(self) -> RankAdvice:
        """Ranks from the samples so far; after a run, from all of it."""
        return self._source.advice(self._asked, self._rates)

    def advise(self, budget: int | str, by: By | None = None, least: int | None = None) -> RankAdvice:
        """Ranks for another budget, other energies or another least rank.

        Raises:
            ValueError: The budget is invalid or too small.
        """
        known = self._asked
        other = Options(budget, known.method, by or known.by, known.least if least is None else least)
        return self._source.advice(other, self._rates)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the largest learning rate of the run."""
        super().on_train_start(trainer, pl_module)
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rates = {"ten_times": 10 * max(rates)} if rates else {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a last sample, and read the curvature that another monitor has found."""
        super().on_train_end(trainer, pl_module)
        if trainer.barebones:
            return
        self._source.look()
        found = [_sharpness(one) for one in beside(trainer) if isinstance(one, Monitor)]
        known = [value for value in found if value > 0]
        if known and self._asked.method == "lora":
            self._rates["gradient_descent_below"] = stable_rate(max(known), self.advice)


def stable_rate(sharpness: float, advice: RankAdvice) -> float:
    """Learning rate below which gradient descent on the second factors of LoRA is stable if the loss is quadratic.

    If B = 0, a change of B by dB changes the weight by dB A. No curvature in B is therefore above `sharpness` times the
    squared largest singular value of A. For the default init, whose entries have variance 1 / (3 N), this square is
    about (1 + sqrt(r / N))^2 / 3.

    Args:
        sharpness: Largest eigenvalue of the Hessian with respect to the weights.
        advice: Advice with the ranks.
    """
    pairs = ((rank, n) for name, rank in advice.patterns.items() for _, n in advice.energies[name].shapes)
    largest = max(((1 + math.sqrt(rank / n)) ** 2 / 3 for rank, n in pairs), default=math.nan)
    return 2 / (sharpness * largest)


def _sharpness(monitor: Monitor) -> float:
    """The largest eigenvalue of the Hessian that it found last; NaN where it found none."""
    values = monitor.latest.values if monitor.latest is not None else {}
    return max(values.get("hessian_lambda_max", {}).values(), default=math.nan)


def _weight(site: Site) -> str:
    """The weight that a site is, or that a LoRA pair is added to."""
    return PAIR.sub(".weight", site.name) if site.product is not None else site.name


def _moved(advice: RankAdvice, before: Mapping[str, int]) -> float:
    """Share of the numbers that were not advised before; all at first, none where nothing is advised."""
    new = {name: max(0, rank - before.get(name, 0)) for name, rank in advice.ranks.items()}
    return advice.cost_of(new) / max(1, advice.spent)
