"""Sources whose sites are parameters of the module, and readings that several of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lowrank.measuring.source import MatrixSource, Reading
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.training import Training
from lightning_lowrank.models.views import View

HALF = (torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class ParameterSource(MatrixSource):
    """A source whose sites are parameters of the module.

    Args:
        match: Parameters to read: globs on the full name, `re:REGEX`, `type:LAYERCLASS`, one or several; all matrices
            unless given.
        exclude: Patterns of what to leave out, as for `match`.
        min_size: Shortest side of a matrix to read.
        heads: Split attention weights by head.
        views: Your own einops patterns by parameter name (glob); the right side ends in `rows columns`.
    """

    match: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    min_size: int = 2
    heads: bool = False
    views: Mapping[str, str | View] | None = None

    def __post_init__(self) -> None:
        self.sites: list[Site] = []
        self._seen: tuple[tuple[str, int, bool], ...] = ()

    def plan(self, training: Training) -> None:
        """Choose the sites, anew only when parameters came or went."""
        # With names: a parametrization keeps the parameter and changes where it is, as a lazy module keeps it and gives
        # it a shape.
        named = training.module.named_parameters()
        seen = tuple((name, id(parameter), is_lazy(parameter)) for name, parameter in named)
        if seen != self._seen:
            patterns: dict[str, Any] = {"match": self.match, "exclude": self.exclude}
            self.sites = sites(training.module, **patterns, min_size=self.min_size, heads=self.heads, views=self.views)
            self._seen = seen

    def labels(self) -> list[str]:
        """One name per matrix, in the order of the module's parameters."""
        return [label for site in self.sites if self.reads(site) for label in site.labels]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of all sites, frozen ones included."""
        return {label: (site.shape[-2], site.shape[-1]) for site in self.sites for label in site.labels}

    def units(self) -> dict[str, torch.Size]:
        """Shapes of the sites that it reads."""
        return {site.labels[0]: site.shape for site in self.sites if self.reads(site)}

    def reads(self, site: Site) -> bool:
        """Whether it has something to read there, as things are now."""
        return True


def weights(site: Site, values: Sequence[Tensor] | None = None) -> Reading:
    """The matrices of a site, at values of its parameters; at those of now unless given."""
    return Reading(site.labels, site.shape, site.values() if values is None else values, site.weight, site.parameters)


def change(site: Site, before: Sequence[Tensor], now: Sequence[Tensor] | None = None) -> Reading:
    """The change of a site's matrices; nothing to read if their earlier values are unknown.

    Args:
        site: It.
        before: Values of its parameters.
        now: Those of now, where they are not the parameters'.
    """
    count = len(site.parameters) if before else 0
    values = site.values() if now is None else now

    def made(*parts: Tensor) -> Tensor:
        return difference(site.weight(*parts[:count]), site.weight(*parts[count:]))

    if site.linear:  # each process subtracts what it has
        parts = attempt(lambda: [difference(*pair) for pair in zip(values, before, strict=bool(before))])
        dtype = torch.promote_types(site.parameters[0].dtype, torch.float32)
        rounded = any(value.dtype in HALF for value in values)
        return Reading(
            site.labels, site.shape, parts, site.view, site.parameters, dtype, weights(site, before), rounded
        )
    parts = [*values, *before] if before else ()
    return Reading(site.labels, site.shape, parts, made, site.parameters * 2, weight=weights(site, before))


def attempt(read: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The reading. If it fails, there is none; this is counted and does not affect other sites."""
    try:
        return read()
    except Exception:
        return ()


def difference(now: Tensor, before: Tensor) -> Tensor:
    """The change, in at least float32; in half precision the difference would be rounded once more."""
    if now.shape != before.shape:  # a single row would be subtracted from each
        raise ValueError(f"a tensor of shape {tuple(before.shape)} now has the shape {tuple(now.shape)}")
    return now.to(torch.promote_types(now.dtype, torch.float32)) - before
