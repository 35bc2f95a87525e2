"""How the step changes what each head of attention compares, and how it attends."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype
from lightning_lowrank.measuring.gathering import gather
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, NumberSource, Quantity
from lightning_lowrank.measuring.parameter_source import change
from lightning_lowrank.measuring.source import Batch, Reading, Step
from lightning_lowrank.measuring.sources.updates import Updates
from lightning_lowrank.models.attention import Attention, Finder
from lightning_lowrank.models.names import fitting
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.training import Training, device_of
from lightning_lowrank.models.views import View
from lightning_lowrank.monitors.attention.calls import Calls
from lightning_lowrank.monitors.attention.measurement import RANKS, UPDATES, ByHead, Parts, ranks_of, scores_of
from lightning_lowrank.monitors.attention.scores import ROWS

DETAILS: dict[str, Detail] = {
    **{f"{update}_{rank}": "core" if update == UPDATES[0] else "standard" for update in UPDATES for rank in RANKS},
    **{f"{update}_{rank}_chance": "all" for update in UPDATES for rank in RANKS},
}
OF_SCORES: dict[str, Detail] = {
    **{"attention_max_logit": "standard", "attention_entropy": "core", "attention_sink_share": "core"},
    **dict.fromkeys(("attention_entropy_chance", "attention_sink_share_chance", "attention_rows"), "all"),
}
SCORE_UNITS = {"attention_entropy": "nats", "attention_entropy_chance": "nats", "attention_rows": "rows"}
# Of the largest score of all heads.
LARGEST = "attention_largest_logit"
PLAIN = View("m n -> m n")
HOW = (
    "name its weights: layouts={'*.qkv.weight': 'qkv heads d'} for a fused layer, or layouts={'*.theta.weight': "
    "'q heads d', '*.phi.weight': 'k heads d'} for two. If the number of heads is unknown, give "
    "heads={'*.qkv.weight': 8}"
)
UNHEARD = (
    "no call of scaled_dot_product_attention and no softmax over scores of this number of heads was seen there. A "
    "fast path, a compiled function or a custom kernel hides it"
)


class AttentionHeads(NumberSource):
    """Ranks of one step's update of `Wq' Wk`, and statistics of rows of attention scores, for each head.

    Args:
        match: Attention layers: globs on the module's name, `re:REGEX`, `type:LAYERCLASS`; all by default.
        exclude: Patterns of what to leave out, as for `match`.
        layouts: Axes of a layer's output by pattern of its weight, if they are unknown.
        heads: Number of heads by pattern of weight, if it is unknown.
        scores: Whether to observe calls of attention, too.
        num_rows: Number of rows of scores to use for each call and head.

    Raises:
        ValueError: An option is out of range. In `plan`: there is no attention with known queries and keys, a pattern
            matches nothing, heads do not divide, or attention is inside a compiled module.
    """

    name = "attention"
    level = "subnetworks"
    shared = True
    _attentions: list[Attention]
    _left_out: dict[str, str]
    # By weight, and by site what has been read of it.
    _sites: dict[str, Site]
    _read: dict[str, Reading]
    _seen: tuple[tuple[str, int, bool, bool], ...]
    _device: torch.device

    def __init__(
        self,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        *,
        layouts: Mapping[str, str] | None = None,
        heads: Mapping[str, int] | None = None,
        scores: bool = True,
        num_rows: int = 64,
    ) -> None:
        if type(num_rows) is not int or not 1 <= num_rows <= 1_000_000:
            raise ValueError(f"num_rows={num_rows!r} must be a number of rows from 1 to 1,000,000")
        if any(type(count) is not int or count < 1 for count in (heads or {}).values()):
            raise ValueError(
                f"heads={heads!r}: expected a mapping from patterns of weights to numbers of heads, each at least 1"
            )
        self._match, self._exclude = match, exclude
        self._layouts, self._heads = dict(layouts or {}), dict(heads or {})
        self._updates, self._calls = Updates(min_size=1), Calls(num_rows) if scores else None
        details = DETAILS | (OF_SCORES if scores else {})
        self.quantities = [
            Quantity(name, SCORE_UNITS.get(name, "1" if name in OF_SCORES else "directions"), True, detail=detail)
            for name, detail in details.items()
        ] + ([Quantity(LARGEST, detail="core")] if scores else [])
        self._forget()

    def plan(self, training: Training) -> None:
        """Choose the heads; choose again only if parameters were added, removed, frozen or unfrozen."""
        module = training.module
        seen = tuple((name, id(p), p.requires_grad, is_lazy(p)) for name, p in module.named_parameters())
        if seen == self._seen:
            return
        finder = Finder(module, self._layouts, self._heads)
        self._attentions, self._left_out = self._chosen(finder), finder.untold
        by_parameter = {id(p): site for site in sites(module, min_size=1) for p in site.parameters}
        parts = {part.weight: part for one in self._attentions for part in (one.queries, one.keys)}
        self._sites = {name: _whole(by_parameter[id(part.parameter)]) for name, part in parts.items()}
        self._updates.sites = list({site.name: site for site in self._sites.values()}.values())
        self._device, self._seen = device_of(module), seen
        if self._calls is not None:
            modules = {one.name: finder.modules[one.path] for one in self._attentions}
            self._calls.plan(module, modules, {one.name: one.heads for one in self._attentions})

    def labels(self) -> list[str]:
        """The heads, and the whole model."""
        return [*(label for one in self._attentions for label in one.labels), *([WHOLE_MODEL] if self._calls else [])]

    def note(self) -> str:
        """Number of heads, and what is left out."""
        count = sum(one.heads for one in self._attentions)
        left = [f"{name!r} ({why})" for name, why in self._left_out.items()]
        return f"of {count} heads of {len(self._attentions)} attentions" * bool(count) + (
            f"; left out, for queries and keys cannot be told: {', '.join(left[:5])}" if left else ""
        )

    def batch_begins(self, batch: Batch) -> None:
        """Start listening."""
        self._updates.batch_begins(batch)
        if self._calls is not None:
            self._calls.attach(self.timed, batch.seed + batch.index)

    def gradients_final(self, step: Step) -> list[Any]:
        """Keep the weights; frozen ones do not change."""
        for site in self._updates.sites:
            if not self._updates.reads(site) and site.name not in self._read:
                self._read[site.name] = _lasting(change(site, [value.clone() for value in site.values()]))
        self._updates.gradients_final(step)
        return []

    def step_done(self, step: Step) -> list[Any]:
        """Compute the change."""
        self._read |= {reading.labels[0]: _lasting(reading) for reading in self._updates.step_done(step)}
        return []

    def batch_over(self) -> None:
        """Stop listening."""
        if self._calls is not None:
            self._calls.detach()

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of this process's share of the attention layers; rows of scores come from all processes."""
        costs = [float(one.heads * one.queries.parameter.numel()) for one in self._attentions]
        owners = dict(zip(self._attentions, team.assign(costs), strict=True))
        values, largest = self._scores(team)
        with full_precision(self._device):
            ranks = ranks_of(self._parts(team, owners))
        self._read = {}
        labels = [label for one, owner in owners.items() if owner == team.rank for label in one.labels]
        of_model = [Numbers(WHOLE_MODEL, {LARGEST: largest})] if largest is not None and team.rank == 0 else []
        return [*(Numbers(label, ranks.get(label, {}) | values.get(label, {})) for label in labels), *of_model]

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self._read = {}
        self._updates.detach()
        if self._calls is not None:
            self._calls.detach()
            self._calls.take()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is no lasting state; search for heads again."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        return vars(self) | {"_updates": Updates(min_size=1)} | _nothing()

    def _forget(self) -> None:
        vars(self).update(_nothing())

    def _chosen(self, finder: Finder) -> list[Attention]:
        """Those that the patterns fit.

        Raises:
            ValueError: There is none.
        """
        found = finder.found()
        if not found and not any(map(is_lazy, finder.module.parameters())):  # those may still turn out to be anything
            why = "; ".join(f"of {name!r}, {reason}" for name, reason in list(finder.untold.items())[:3])
            there = f"with known queries and keys: {why}" if why else f"among {list(finder.weights)[:10]}"
            raise ValueError(f"AttentionMonitor finds no attention {there}; {HOW}")
        layers = {one.name: finder.modules[one.path] for one in found}
        names = set(layers) if self._match is None or not found else fitting("match", self._match, layers)
        names -= set() if self._exclude is None or not found else fitting("exclude", self._exclude, layers)
        if found and not names:
            raise ValueError(f"exclude={self._exclude!r} leaves out all attention layers: {list(layers)[:10]}")
        return [one for one in found if one.name in names]

    def _parts(self, team: Team, owners: Mapping[Attention, int]) -> dict[Attention, Parts]:
        """Weights and their changes, of attentions that are this process's to measure."""
        measures: dict[str, int] = {}
        for one, owner in owners.items():
            for part in (one.queries, one.keys):
                measures.setdefault(self._sites[part.weight].name, owner)
        readings = [self._read[name] for name in measures if name in self._read]
        rounds = gather(readings, [measures[r.labels[0]] for r in readings], team, spectra_only=False, beside=True)
        found = {one.labels[0]: (one.weight, one.value) for taken in rounds for one in taken}
        return {one: parts for one in owners if (parts := self._cut(one, found)) is not None}

    def _cut(self, one: Attention, found: Mapping[str, tuple[Any, Any]]) -> Parts | None:
        """By head, None where one of the weights could not be read."""
        both = [found.get(self._sites[part.weight].name) for part in (one.queries, one.keys)]
        if None in both or not one.trained:
            return None
        (queries, of_queries), (keys, of_keys) = both  # type: ignore[misc]
        return one.queries(queries), one.keys(keys), one.queries(of_queries), one.keys(of_keys)

    def _scores(self, team: Team) -> tuple[ByHead, Tensor | None]:
        """By head, of all processes together, and the largest of all; in one collective."""
        if self._calls is None:
            return {}, None
        heard, self.trouble = self._calls.take()
        silent = next((one.name for one in self._attentions if one.name not in heard), None)
        if silent is not None and self.trouble is None and self._attentions:
            self.trouble = ValueError(f"scores of {silent!r} are unknown: {UNHEARD}")
        dtype = working_dtype(self._device)
        nothing = {one.name: torch.zeros(6, one.heads, dtype=dtype, device=self._device) for one in self._attentions}
        own = torch.cat([heard.get(name, zeros) for name, zeros in nothing.items()], -1)
        everyone = own.new_zeros(team.size, *own.shape)
        if team.sees_data:
            everyone[team.rank] = torch.where(own[ROWS] > 0, own, 0.0)
        values, largest = scores_of(team.all_reduce(everyone))
        labels = [label for one in self._attentions for label in one.labels]
        columns = torch.stack(list(values.values())).unbind(-1)
        return {
            label: dict(zip(values, column.unbind(), strict=True))
            for label, column in zip(labels, columns, strict=True)
        }, largest


def _nothing() -> dict[str, Any]:
    """What is known of a model before it is looked at."""
    known: dict[str, Any] = {"_attentions": [], "_left_out": {}, "_sites": {}, "_read": {}, "_seen": ()}
    return known | {"_device": torch.device("cpu")}


def _whole(site: Site) -> Site:
    """The same with its weight as it is for the one matrix."""
    shape = site.parameters[0].shape if site.computation is None else site.computation.shape
    return replace(site, view=PLAIN, labels=(site.name,), shape=shape, product=None)


def _lasting(reading: Reading) -> Reading:
    """The same with parts that nothing else writes to."""
    return replace(reading, parts=[part.clone() for part in reading.parts]) if len(reading.parts) > 1 else reading
