"""`RouterMonitor`: how evenly the routers of a mixture of experts share out the tokens."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lowrank.distributed.shards import unspent, whole
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.marchenko_pastur import null
from lightning_lowrank.maths.spectra.spectrum import ratio, svd, working_dtype
from lightning_lowrank.measuring.gathering import gather
from lightning_lowrank.measuring.number_source import Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.parameter_source import weights
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.models.names import fitting, tags
from lightning_lowrank.models.routers import Router, router, routers, routing
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.taps import Listener
from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.statistics.stable_rank import stable_rank
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

DETAILS: dict[str, Detail] = {
    **dict.fromkeys(("effective_experts", "load_variation", "entropy"), "core"),
    **dict.fromkeys(("idle_share", "dropped_share", "gate_stable_rank"), "standard"),
    **dict.fromkeys(("effective_experts_chance", "load_variation_chance", "gate_stable_rank_chance"), "all"),
    **dict.fromkeys(("experts", "tokens"), "all"),
}
UNITS = {"entropy": "nats", "experts": "experts", "tokens": "tokens"} | dict.fromkeys(
    ("effective_experts", "effective_experts_chance"), "experts"
)


class Routers(NumberSource):
    """Loads and scores of routers over all tokens of a step.

    Args:
        match: Routers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; by default all that are recognised.
        exclude: Patterns of what to leave out, as for `match`.
        top_k: Number of experts per token, for routers that do not give it.
        capacity: Largest load of an expert, in units of an even share; tokens beyond it count as dropped.

    Raises:
        ValueError: `top_k` or `capacity` is out of range; in `plan`: a pattern matches nothing, there is no router, or
            the number of experts is unknown.
    """

    name = "router"
    level = "functions"

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        top_k: int | None = None,
        capacity: float | None = None,
    ) -> None:
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k={top_k!r} must be a number of experts of at least 1")
        if capacity is not None and not 0 < capacity < float("inf"):
            raise ValueError(
                f"capacity={capacity!r} must be a number above 0, such as 1.25 for a quarter more than an even share"
            )
        self._match, self._exclude, self._top_k, self._capacity = match, exclude, top_k, capacity
        self.quantities = [
            Quantity(f"router_{name}", UNITS.get(name, "1"), per_site=True, detail=detail)
            for name, detail in DETAILS.items()
        ]
        self._listener = Listener(self._add)
        self._routers: dict[str, Router] = {}
        self._gates: dict[str, Site] = {}
        # Of each router the places of each expert, then sums of entropies, tokens, places, and places that were lost.
        self._sums: dict[str, Tensor] = {}

    def plan(self, training: Training) -> None:
        """Choose the routers."""
        layers = {name: layer for name, layer in training.module.named_modules() if name}
        # The projection of an attention is never called as a layer.
        inner = {id(layer.out_proj) for layer in layers.values() if isinstance(layer, nn.MultiheadAttention)}
        chosen = set(routers(training.module)) if self._match is None else fitting("match", self._match, layers)
        chosen -= set() if self._exclude is None else fitting("exclude", self._exclude, layers)
        if not chosen:
            raise ValueError(
                "RouterMonitor finds no router; match the layers that return logits of experts. Layers: "
                f"{list(layers)[:10]}"
            )
        names = tags(layers)
        found: dict[str, Router] = {}
        for name in (name for name in layers if name in chosen and id(layers[name]) not in inner):
            known = router(name, training.module, self._top_k)
            if known is None or (known.top_k is None and isinstance(known.layer, nn.Linear)):
                missing = "experts there are" if known is None else "experts a token uses; give top_k=..."
                raise ValueError(
                    f"RouterMonitor: {name!r}, a {type(layers[name]).__name__}, does not say how many {missing}"
                )
            found[names[name]] = known
        self._listener.plan(training.module, {name: known.layer for name, known in found.items()}, "routers")
        if {name: id(known.layer) for name, known in found.items()} != self._ids():
            gates = {id(p): site for site in sites(training.module, min_size=1) for p in site.parameters}
            own = {name: dict(training.module.named_parameters()).get(k.gate or "") for name, k in found.items()}
            self._gates = {name: gates[id(p)] for name, p in own.items() if id(p) in gates}
        self._routers = found

    def labels(self) -> list[str]:
        """One per router."""
        return list(self._routers)

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._listener.attach(self.timed)

    def batch_over(self) -> None:
        """Stop listening."""
        self._listener.detach()
        self.trouble = self._listener.take_error() or self.trouble

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Over all tokens of the step, of all processes: sums first, then entropies."""
        heard = team.all_gather_object(list(self._sums))
        names = [name for name in self._routers if all(name in one for one in heard)]
        sums = [self._sums[name] for name in names]
        self.detach()
        ranks = self._of_gates(team)
        if not names:
            return []
        own = torch.cat(sums)
        pooled = team.all_reduce(own if team.sees_data else torch.zeros_like(own)).split([len(part) for part in sums])
        return [self._numbers(name, part, ranks) for name, part in zip(names, pooled, strict=True)]

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._listener.detach()
        self._sums = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_routers": {}, "_gates": {}, "_sums": {}}

    def _ids(self) -> dict[str, int]:
        return {name: id(known.layer) for name, known in self._routers.items()}

    def _add(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        known = self._routers[name]
        said = routing(known, _whole(output))
        logits = said.logits.to(working_dtype(said.logits.device))
        scores = logits.sigmoid() if known.sigmoid else logits.softmax(-1)
        shares = ratio(scores, scores.sum(-1, keepdim=True))
        places = said.assigned.to(logits).sum(0)
        lost = said.num_places - places.sum()
        if self._capacity is not None:
            lost = lost + (places - self._capacity * said.num_places / known.num_experts).clamp(min=0).sum()
        tokens, num_places = (logits.new_full((), count) for count in (len(logits), said.num_places))
        sums = torch.cat([places, torch.stack([torch.special.entr(shares).sum(), tokens, num_places, lost])])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _of_gates(self, team: Team) -> dict[str, Tensor]:
        """Stable ranks of the gates, which whoever has one whole tells the others."""
        readings = [weights(site) for site in self._gates.values()]
        if not readings:
            return {}
        labels = {reading.labels[0]: name for reading, name in zip(readings, self._gates, strict=True)}
        owners = team.assign([float(reading.shape.numel()) for reading in readings])
        mine = {
            labels[one.labels[0]]: stable_rank(one.value if not isinstance(one.value, Tensor) else svd(one.value))
            for taken in gather(readings, owners, team, spectra_only=True, beside=False)
            for one in taken
        }
        device = readings[0].like[0].device
        nothing = torch.zeros((), dtype=working_dtype(device), device=device)
        ranks = torch.stack([mine.get(name, nothing).to(nothing).sum() for name in self._gates])
        there = torch.stack([nothing + (name in mine) for name in self._gates])
        ranks, there = team.all_reduce(torch.stack([ranks, there]))
        return dict(zip(self._gates, (ranks / there).unbind(), strict=True))

    def _numbers(self, name: str, sums: Tensor, ranks: dict[str, Tensor]) -> Numbers:
        num_experts = self._routers[name].num_experts
        places, (entropy, tokens, num_places, lost) = sums[:num_experts], sums[num_experts:]
        shares = ratio(places, places.sum())
        variation = (shares * num_experts - 1).square().mean().sqrt()
        # Of a router that draws the experts of each token: a place is taken with probability `taken`.
        taken = num_places / tokens / num_experts
        chance = ((1 - taken).clamp(min=0) / (taken * tokens)).sqrt()
        values = {
            "effective_experts": torch.special.entr(shares).sum().exp(),
            "load_variation": variation,
            "entropy": entropy / tokens,
            "idle_share": (places == 0).to(places).mean(),
            "dropped_share": lost / num_places,
            "effective_experts_chance": num_experts * (-chance.square() / 2).exp(),
            "load_variation_chance": chance,
            "experts": torch.full_like(tokens, num_experts),
            "tokens": tokens,
        }
        if name in ranks:
            rows, columns = self._gates[name].shape[-2:]
            values["gate_stable_rank"] = ranks[name]
            values["gate_stable_rank_chance"] = torch.full_like(tokens, _chance(rows, columns))
        sound = sums.isfinite().all()
        return Numbers(name, {f"router_{key}": torch.where(sound, value, torch.nan) for key, value in values.items()})


class RouterMonitor(Monitor):
    """How evenly the routers of a mixture of experts distribute tokens, and how certain their choices are.

    A collapsed router sends all tokens to a few experts; the others cost memory and learn nothing. Counts of all
    micro-batches and processes are added up before logarithms are taken, because the mean of the entropies of parts is
    not the entropy of the whole.

    Writes medians over routers of `router/effective_experts`, `router/load_variation` and `router/entropy`. From
    "standard" on, also single routers, shares of idle experts and of dropped tokens, and the stable rank of the gates.

    Cost per sample: a softmax over the logits, a count, and one Gram matrix of each gate.

    Args:
        every_n_steps: Cadence in optimizer steps; default 50.
        match: Routers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`. By default those recognised by their
            class, as in the transformers library, and linear layers named `gate` or `router` beside `experts`.
        exclude: Patterns of what to leave out, as for `match`.
        top_k: Number of experts per token, for routers that do not give it.
        capacity: Largest load of an expert, in units of an even share of a batch; tokens beyond it count as dropped. By
            default only tokens that the router itself drops are counted.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single routers: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.
        alerts: Alert rules; none by default.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is out of range; when training starts: a pattern matches nothing, or there is no router.

    Examples:
        >>> RouterMonitor(every_n_steps=10).recorders[0].quantities[:3]
        ['router_effective_experts', 'router_load_variation', 'router_entropy']

    References:
        Shazeer et al. (2017), Outrageously Large Neural Networks, Section 4 (variation of loads). Fedus et al. (2022),
        Switch Transformers, Section 2.2 (capacity).
    """

    word = "router"

    def __init__(
        self,
        every_n_steps: int | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        top_k: int | None = None,
        capacity: float | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = None,
        max_overhead: float | None = None,
    ) -> None:
        probes = probe_of(Routers(match, exclude, top_k, capacity), cadence(every_n_steps, max_overhead, 50))
        super().__init__(probes, detail=detail, per_site=per_site, alerts=alerts, name=name)

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """None, since an even load depends on the number of experts."""
        return []


def _whole(output: Any) -> Any:
    """The same with its tensors whole."""
    if isinstance(output, Tensor):
        return whole(unspent(output.detach()))
    return tuple(map(_whole, output)) if isinstance(output, tuple | list) else output


@lru_cache(maxsize=1024)
def _chance(rows: int, columns: int) -> float:
    """Stable rank of Gaussian entries."""
    return float(np.from_dlpack(stable_rank(null((rows, columns)))))  # on the CPU: no wait for the device
