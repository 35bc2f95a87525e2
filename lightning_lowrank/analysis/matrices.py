"""The matrices of a checkpoint, the same that a monitor finds in the module, read one at a time.

Shape letters:  M rows, N columns of a matrix
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Num
from torch import Tensor, nn

from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.views import View

# Recurrent layers: how many gates there are in what their classes call these weights.
_GATES = {4: View("(ifgo d) n -> ifgo d n"), 3: View("(rzn d) n -> rzn d n")}
_RECURRENT = re.compile(r"(?P<layer>.*)weight_[ih]h(?P<rest>(_l\d+(_reverse)?)?)")


@dataclass(frozen=True)
class Place:
    """The place of some matrices in a checkpoint.

    Attributes:
        site: Their names, and the view that builds them.
        names: Names of the tensors in the file that they are built from.
    """

    site: Site
    names: tuple[str, ...]

    def matrices(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Num[Tensor, "M N"]]]:
        """The matrices, each with its name."""
        read = self.site.weight(*map(checkpoint.tensor, self.names))
        yield from zip(self.site.labels, read.reshape(-1, *read.shape[-2:]), strict=True)


def places(
    checkpoint: Checkpoint,
    module: nn.Module | None = None,
    *,
    views: Mapping[str, str | View] | None = None,
    **chosen: Any,
) -> list[Place]:
    """The places of a checkpoint's matrices.

    Args:
        module: The module of the checkpoint, on any device, "meta" included; its classes tell how fused weights are
            split. Without it, names and shapes decide: torch's packed attention and gates of recurrent layers are
            split, other fused weights stay whole.
        views: The user's own views, which take precedence.
        chosen: `match`, `exclude`, `min_size` and `heads`, as `RankMonitor` takes them.

    Raises:
        ValueError: A pattern matches nothing, there is no matrix, or the module has other parameters than the file.
    """
    implied = {} if module is not None else _implied(checkpoint.shapes)
    if module is None:
        module = checkpoint.skeleton()
    else:
        refuse_another(module, checkpoint)
    known: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in checkpoint.shapes:
            known.setdefault(id(parameter), name)
    found = sites(module, views={**implied, **(views or {})}, **chosen)
    if not found:
        raise ValueError(
            f"{checkpoint.path} contains no matrix; its tensors are {first(list(checkpoint.shapes.items()))}"
        )
    return [Place(site, tuple(known[id(parameter)] for parameter in site.parameters)) for site in found]


def refuse_another(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise an error if the checkpoint does not fit the module.

    Raises:
        ValueError: The message has the missing names and the shapes that differ.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    missing = [name for name in shapes if name not in checkpoint.shapes]
    other = {
        name: (tuple(checkpoint.shapes[name]), tuple(shape))
        for name, shape in shapes.items()
        if name not in missing and checkpoint.shapes[name] != shape
    }
    if missing or other:
        raise ValueError(
            f"{checkpoint.path} does not fit this model: it lacks {first(missing)}"
            + (f"; shapes in the file and in the model are {first(list(other.items()))}" if other else "")
            + f"; the file has {first(list(checkpoint.shapes))}"
        )


def first(names: Sequence[Any], most: int = 5) -> str:
    """The first few of many names, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def _implied(shapes: Mapping[str, Sequence[int]]) -> dict[str, View]:
    """Views that names and shapes imply, where the classes of the layers are unknown."""
    found = {name: view for name in shapes if (view := _view(name, shapes)) is not None}
    return {f"re:^{re.escape(name)}$": view for name, view in found.items()}


def _view(name: str, shapes: Mapping[str, Sequence[int]]) -> View | None:
    shape = shapes[name]
    if len(shape) != 2:
        return None
    if name.rpartition(".")[2] == "in_proj_weight" and shape[0] == 3 * shape[1]:
        return View("(qkv d) n -> qkv d n")
    recurrent = _RECURRENT.fullmatch(name)
    hidden = shapes.get(f"{recurrent['layer']}weight_hh{recurrent['rest']}") if recurrent else None
    if hidden is None or len(hidden) != 2 or not hidden[1] or hidden[0] % hidden[1]:
        return None
    return _GATES.get(hidden[0] // hidden[1])
