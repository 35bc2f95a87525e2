"""`RankAdvisor`: which rank each weight is worth, from gradients and accumulated updates of a short run.

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
from lightning_lowrank.methods.method import beside
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.rank_advice import Energies, Method, RankAdvice, added, advise, numbers_of
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

By = Literal["updates", "gradients"]
PAIR = re.compile(r"\.lora(\..*)?$")


@dataclass(frozen=True)
class Options:
    """What advice is asked for."""

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
            raise ValueError(f"by={self.by!r}: one of {list(get_args(By))}")
        if type(self.least) is not int or self.least < 0:
            raise ValueError(f"least={self.least!r}: a rank, from 0 on")


class Directions(NumberSource):
    """Energies of the directions of gradients and accumulated updates, and the ranks that they are worth.

    Args:
        options: What advice is asked for.
        match: Weights, as `LoRA` takes them.
        exclude: The same, taken away.
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
        """Choose the weights that train, and keep what they begin as."""
        wanted = {id(p) for p in matrices(training.module, self._match, self._exclude).matrices.values()}
        found = [site for site in sites(training.module) if wanted & set(map(id, site.parameters))]
        self._sites = [site for site in found if any(p.requires_grad for p in site.parameters)]
        if not self._sites:
            raise ValueError("RankAdvisor: none of the matrices that it may look at is trained; name others by match")
        sharded = next((s.name for s in self._sites if any(isinstance(p, DTensor) for p in s.parameters)), None)
        if sharded is not None:
            raise ValueError(f"RankAdvisor cannot advise on {sharded!r}, which lies in shards on several processes")
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
        """The ranks as they would be now, and how much of the budget has changed hands since the last sample."""
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
        """Read how far the weights are from where they began."""
        for site in self._sites:
            began = [old.to(new.device) for old, new in zip(self._initial[site.name], site.values(), strict=True)]
            self._updates[site.name] = self._energies(site, change(site, began))

    def advice(self, options: Options, rates: Mapping[str, float] | None = None) -> RankAdvice:
        """What was seen so far, as ranks."""
        seen = self._updates if options.by == "updates" else self._gradients
        parts: dict[str, tuple[list[tuple[int, int]], list[list[float]]]] = {}
        for site in self._sites:
            shapes, energies = parts.setdefault(_weight(site), ([], []))
            shapes.extend(self._shapes(site))
            energies.extend(one.nan_to_num(0.0).tolist() for one in seen.get(site.name, []))
        known = {name: Energies(tuple(shapes), added(energies)) for name, (shapes, energies) in parts.items()}
        return advise(known, options.budget, method=options.method, least=options.least, rates=rates)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the start, and what was added up."""
        return {"initial": self._initial, "gradients": self._gradients, "updates": self._updates, "ranks": self._ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on adding up."""
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
    """Which rank each weight is worth under a budget, from a short run of full fine-tuning, or of a larger LoRA.

    It adds up the energies (squared singular values) of gradients on due steps and takes those of the accumulated
    update W_t - W_0, and spends the budget on the directions with the most energy per number, all weights together.
    `advice` has the ranks: `LoRA(r=advisor.advice.patterns)`, `LoraConfig(**advisor.advice.peft())`,
    `GaLore(rank=advisor.advice.patterns)`, `rich.print(advisor.advice)`, `advisor.advice.save("ranks.json")`.

    Captured energy is what the ranks could hold of what full fine-tuning did, and no promise of accuracy: `advice` has
    what uniform ranks capture beside it, and docs/methods/choose-ranks.md what came of it.

    Of a LoRA run it reads the products, without their scaling, under the names of the weights. A rank for each is
    advised under a budget of the numbers that `LoRA` makes: a fused projection has a pair for each part.

    `advice.rates` has learning rates to begin with: "ten_times", ten times the largest of the run; and, where a
    `CurvatureMonitor` with its largest Hessian eigenvalue (level "standard") watches the same run,
    "gradient_descent_below", 2 over the largest curvature that the second factors of LoRA with its default init can
    meet: above it plain gradient descent may diverge. It says nothing of Adam.

    Writes `advisor/rank_median` and `advisor/captured_median`, each weight at "standard", and `advisor/moved`: the
    share of the ranks' numbers that went to another weight since the last sample, 1 at the first one and near 0 where a
    longer run would not change the advice.

    Cost: a copy of the weights it looks at, also in checkpoints; two eigendecompositions of the short side of each on
    due steps.

    Args:
        budget: Numbers that all ranks together may take; or memory, as "8 MB".
        method: Who takes the ranks: "lora" or "galore".
        by: "updates" ranks directions by the accumulated update, "gradients" by gradients, in the mean over due steps.
        least: Rank of each weight that moved at all; `GaLore` keeps full moments of what has none.
        match: Weights: globs, `re:REGEX`, `type:LAYERCLASS`; all but embeddings and the last linear layer unless given.
        exclude: The same, taken away.
        every_n_steps: Cadence in optimizer steps; default 10.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single weights: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of its range; when training starts: a pattern fits nothing, nothing that it fits
            is trained, a weight is sharded, or the budget does not suffice for the least ranks.

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
        """Ranks by what was seen so far; of a run that is over, by all of it."""
        return self._source.advice(self._asked, self._rates)

    def advise(self, budget: int | str, by: By | None = None, least: int | None = None) -> RankAdvice:
        """The same for another budget, by other energies, or with another least rank.

        Raises:
            ValueError: The budget is none, or too small.
        """
        known = self._asked
        other = Options(budget, known.method, by or known.by, known.least if least is None else least)
        return self._source.advice(other, self._rates)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the largest rate of the run."""
        super().on_train_start(trainer, pl_module)
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rates = {"ten_times": 10 * max(rates)} if rates else {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look once more, and at the curvature that another monitor has found."""
        super().on_train_end(trainer, pl_module)
        if trainer.barebones:
            return
        self._source.look()
        found = [_sharpness(one) for one in beside(trainer) if isinstance(one, Monitor)]
        known = [value for value in found if value > 0]
        if known and self._asked.method == "lora":
            self._rates["gradient_descent_below"] = stable_rate(max(known), self.advice)


def stable_rate(sharpness: float, advice: RankAdvice) -> float:
    """Rate below which gradient descent on the second factors of LoRA is stable where the loss is quadratic.

    With B = 0 a change of B by dB changes the weight by dB A, so that no curvature in B is above `sharpness` times the
    squared largest singular value of A: (1 + sqrt(r / N))^2 / 3 for the default init, whose entries have the variance
    1 / (3 N).

    Args:
        sharpness: Largest eigenvalue of the Hessian in the weights.
        advice: With the ranks.
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
