"""Large sharded matrices, part by part where they lie.

Shape letters:  M rows, N columns of what this process has of a matrix
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Num
from torch import Tensor

from lightning_lowrank.distributed.shards import held, is_sharded, local, sharded_axes
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.scaling.by_rank import rank_scaling_in_parts
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.models.sites import Site

# Entries of a parameter from which on less is sent, and kept, if counts are added up than if its matrices are put
# together.
LARGE = 2**20


@dataclass(frozen=True)
class ShardedPart:
    """The part of a matrix on this process; empty if another process has the same part.

    Attributes:
        label: Of the matrix.
        entries: The weights.
        rows: Their numbers in the whole matrix, on the CPU.
        columns: Likewise.
        shape: Of the whole matrix.
    """

    label: str
    entries: Num[Tensor, "M N"]
    rows: Int[Tensor, " M"]
    columns: Int[Tensor, " N"]
    shape: tuple[int, int]


def lies_apart(site: Site) -> bool:
    """Whether its matrices are large, sharded, and whole rows of one parameter that is a matrix itself."""
    (parameter, *others) = site.parameters
    if others or not site.linear or parameter.ndim != 2 or parameter.numel() < LARGE or not is_sharded(parameter):
        return False
    axes, _ = sharded_axes(parameter)
    return axes <= {0, 1} and _keeps_rows(site)


def parts(site: Site) -> Iterator[ShardedPart]:
    """One for each matrix of a site that lies apart."""
    (parameter,) = site.parameters
    here, columns = (_numbers(stretches) for stretches in held(parameter))
    entries = local(parameter)[: len(here), : len(columns)]
    *_, rows, width = site.shape
    # Where each row of the parameter stands, in one matrix after the other.
    order = site.view(torch.arange(parameter.shape[0])[:, None]).flatten()
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[here]
    for i, label in enumerate(site.labels):
        chosen = places // rows == i
        some = entries if bool(chosen.all()) else entries[chosen.to(entries.device)]
        yield ShardedPart(label, some, places[chosen] % rows, columns, (rows, width))


def counted_apart(
    part: ShardedPart, direction: str, team: Team, *, max_neurons: int | None, generator: torch.Generator
) -> Scaling:
    """What `multifractal_spectrum` is of the whole matrix, as a batch of one. All processes have to come here, with
    their parts.
    """
    entries, nodes = (part.entries, part.rows) if direction == "in" else (part.entries.mT, part.columns)
    count, fan = part.shape if direction == "in" else part.shape[::-1]
    nodes = nodes.to(entries.device)
    if max_neurons is not None:
        drawn = torch.randperm(count, generator=generator, device=generator.device)[:max_neurons].to(entries.device)
        # Those that are drawn have their place among them for a number, others -1. How many of them are here the device
        # is asked once.
        anew = nodes.new_full((count,), -1).scatter_(0, drawn, torch.arange(len(drawn), device=drawn.device))[nodes]
        (here,) = torch.nonzero(anew >= 0, as_tuple=True)
        entries, nodes, count = entries[here], anew[here], len(drawn)
    return rank_scaling_in_parts(entries, nodes, (count, fan), team.all_reduce)[None]


def _keeps_rows(site: Site) -> bool:
    try:
        return site.view.shape(site.name, (site.parameters[0].shape[0], 1)) == (*site.shape[:-1], 1)
    except ValueError:  # it divides the columns
        return False


def _numbers(stretches: Sequence[range]) -> Int[Tensor, " _"]:
    return torch.tensor([i for stretch in stretches for i in stretch], dtype=torch.long)
