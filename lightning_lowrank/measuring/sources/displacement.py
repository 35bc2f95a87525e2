"""Displacement: how far the weights are from where they began."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_lowrank.distributed.shards import like, local, whole
from lightning_lowrank.measuring.parameter_source import ParameterSource, attempt, change, difference
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.models.sites import Site
from lightning_lowrank.models.training import Training


@dataclass(kw_only=True)
class Displacement(ParameterSource):
    """Weights minus those at the start of the fit, or of the resumed run: W_t - W_0, before the step.

    `weight_ratio` divides by W_0, for every kind of layer.

    It keeps W_0 of the matched sites in its dtype, on its device and in the checkpoint. This takes as many bytes as the
    weights, logged as `lowrank/displacement_bytes` and reported at the start. For sharded weights, each process keeps
    its shards, and a checkpoint has them whole.
    """

    name = "displacement"
    of_changes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._initial: dict[str, Sequence[Tensor]] = {}

    def plan(self, training: Training) -> None:
        """Choose the sites and keep the weights of new ones."""
        super().plan(training)
        new = [site for site in self.sites if site.name not in self._initial]
        self._initial |= {site.name: attempt(partial(_copied, site)) for site in new}

    def gradients_final(self, step: Step) -> list[Reading]:
        """The displacement, before the step."""
        return [self._moved(site) for site in self.sites if step.owns(site)]

    def facts(self) -> dict[str, float]:
        """Memory of the copy on this process."""
        return {
            "bytes": float(sum(local(t).numel() * t.element_size() for kept in self._initial.values() for t in kept))
        }

    def state_dict(self) -> dict[str, Any]:
        """W_0, whole."""
        return {name: [whole(tensor) for tensor in kept] for name, kept in self._initial.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load W_0 of the resumed run."""
        self._initial = dict(state)

    def _moved(self, site: Site) -> Reading:
        self._initial[site.name] = start = attempt(partial(self._start, site))
        if site.computation is None or not start:
            # Of stored weights it is the distance itself; only of the optimizer's own step an estimate.
            return replace(change(site, start), rounded=False)
        began = Reading(site.labels, site.shape, start, site.view)
        return Reading(site.labels, site.shape, [*site.values(), *start], partial(_from_start, site), weight=began)

    def _start(self, site: Site) -> Sequence[Tensor]:
        """What was kept of a site, placed as its weights are; a layer that was replaced by one of another size begins
        anew.
        """
        now, start = _kept(site), self._initial[site.name]
        if start and [t.shape for t in start] != [t.shape for t in now]:
            return _copied(site)
        return [like(old, new) for old, new in zip(start, now, strict=bool(start))]


def _copied(site: Site) -> list[Tensor]:
    return [tensor.clone() for tensor in _kept(site)]


def _kept(site: Site) -> Sequence[Tensor]:
    """What the distance is measured from: a computed weight as it was computed, since the computation may begin, change
    and end in the run, as pruning does.
    """
    return site.values() if site.computation is None else [site.effective()]


def _from_start(site: Site, *parts: Tensor) -> Tensor:
    return difference(site.weight(*parts[:-1]), site.view(parts[-1]))
