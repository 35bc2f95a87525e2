"""The difference of two checkpoints as pairs of low rank, and pairs added to a checkpoint.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Num
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_lowrank.analysis.matrices import Place, first
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.models.adapter_folders import AdapterFolder, Pair
from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.reports.rank_advice import Energies, added

# Tables of embeddings where no class says so.
EMBEDDING = re.compile(r"(.*embed[^.]*|(.*\.)?w[tp]e)\.weight")


@dataclass(frozen=True, eq=False)
class Extracted:
    """The change of one weight as a pair.

    Attributes:
        name: Name of the weight.
        shape: Outputs and inputs.
        pair: None at rank 0.
        error: Norm of the part of the change that the pair lacks, relative to the change.
        error_over_weight: The same, relative to the norm of the weight.
    """

    name: str
    shape: tuple[int, int]
    pair: Pair | None
    error: float
    error_over_weight: float

    @property
    def path(self) -> str:
        """Path of the layer."""
        return self.name.removesuffix(".weight")


def change_energies(a: Checkpoint, b: Checkpoint, found: Iterable[Place]) -> Iterator[tuple[str, Energies]]:
    """Energies of the directions in which training moved each weight; parts that share a rank are added."""
    for place in found:
        if any(b.shapes.get(name) != a.shapes[name] for name in place.names):
            continue
        pairs = zip(place.matrices(a), place.matrices(b), strict=True)
        moved = [(label, after.double() - before.double()) for (label, before), (_, after) in pairs]
        spectra = decompose([matrix for _, matrix in moved], "values", sketch_above=sys.maxsize).spectra
        shapes = tuple((matrix.shape[0], matrix.shape[1]) for _, matrix in moved)
        yield place.site.name, Energies(shapes, added([one.values.square().tolist() for one in spectra]))


def extracted(
    a: Checkpoint,
    b: Checkpoint,
    names: Sequence[str],
    *,
    energy: float = 0.9,
    ranks: Mapping[str, int] | None = None,
    module: nn.Module | None = None,
) -> Iterator[Extracted]:
    """The best pair of each weight, by its singular value decomposition.

    Args:
        names: Names of weights that both have.
        energy: Share of the energy of each change that its pair keeps. Ignored if ranks are given.
        ranks: Rank for each name of a weight; the others get no pair.
        module: Its classes tell which weights have their inputs as rows.

    Raises:
        ValueError: The energy is out of range, or the ranks name a weight that is not in `names`.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must be above 0 and at most 1")
    if unknown := sorted(set(ranks or {}) - set(names)):
        raise ValueError(
            f"the ranks name {first(unknown)}, which did not change; the changed weights are {first(list(names))}"
        )
    for name in names:
        flip = has_inputs_as_rows(name, module)
        before, after = (_wide(c.tensor(name), flip) for c in (a, b))
        change = after - before
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        kept = values.square().cumsum(0) / values.square().sum()
        enough = int((kept < energy).sum()) + 1 if float(values[0]) else 0
        rank = min(enough if ranks is None else ranks.get(name, 0), len(values))
        root = values[:rank].sqrt()
        first_factor = (root[:, None] * right[:rank]).reshape(rank, *change.shape[1:]).float()
        second_factor = (left[:, :rank] * root).float()
        rest = change.flatten(1) - second_factor.double() @ first_factor.double().flatten(1)
        lost, norms = float(rest.norm()), [float(t.norm()) for t in (change, after)]
        pair = Pair(first_factor, second_factor, of_embedding=_is_embedding(name, module)) if rank else None
        yield Extracted(name, (len(change), prod(change.shape[1:])), pair, *(lost / norm for norm in norms))


def moved(a: Checkpoint, b: Checkpoint, module: nn.Module | None = None) -> tuple[list[str], list[str]]:
    """Names of tensors that differ: weights that can have a pair, and all others, including those of another shape."""
    common = [name for name, shape in a.shapes.items() if b.shapes.get(name) == shape]
    changed = [name for name in common if not torch.equal(a.tensor(name), b.tensor(name))]
    pairs = [name for name in changed if _may_have_pair(name, a.shapes[name], module)]
    return pairs, [name for name in a.shapes if name not in pairs and (name in changed or name not in common)]


def with_adapter(
    base: Checkpoint, adapter: AdapterFolder, within: str = "", module: nn.Module | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint with an adapter merged into them, each in its own dtype.

    Args:
        within: The part of the model that the adapter is for.
        module: Its classes tell which weights have their inputs as rows. Without it, shapes decide, and for square
            weights those of the others and what the adapter says.

    Raises:
        ValueError: The checkpoint lacks a weight of the adapter, has it in another shape, or has square weights of
            which nobody knows how they lie.
    """
    prefix = f"{within}." if within else ""
    pairs = {f"{prefix}{path}.weight": pair for path, pair in adapter.pairs.items()}
    whole = {prefix + name: tensor for name, tensor in adapter.whole.items()}
    if missing := [name for name in (*pairs, *whole) if name not in base.shapes]:
        raise ValueError(
            f"the adapter is for {first(missing)}, which {base.path} lacks; it has {first(list(base.shapes))}. If "
            "the adapter is for a part of the model, give --within"
        )
    fit = {name: _fits(base.shapes[name], pair) for name, pair in pairs.items()}
    if wrong := [name for name, ways in fit.items() if not ways]:
        raise ValueError(f"the shapes of the adapter do not fit {base.path}: {first(wrong)}")
    flips = _flips(fit, pairs, adapter.inputs_as_rows, module)
    for name in base.shapes:
        tensor = base.tensor(name)
        if name in pairs:
            tensor = _added(tensor, pairs[name], flips[name])
        yield name, whole[name].to(tensor) if name in whole else tensor


def _flips(
    fit: Mapping[str, set[bool]], pairs: Mapping[str, Pair], says_so: bool, module: nn.Module | None
) -> dict[str, bool]:
    """Which weights have their inputs as rows."""
    sure = {name: ways == {True} for name, ways in fit.items() if len(ways) == 1}
    sure |= {name: True for name in fit if pairs[name].of_embedding}
    square = [name for name in fit if name not in sure]
    if module is not None:
        return sure | {name: has_inputs_as_rows(name, module) for name in square}
    # They lie as the others do; peft says so too, as far as its one word goes for all layers.
    others = {flip for name, flip in sure.items() if not pairs[name].of_embedding} | ({True} if says_so else set())
    if square and len(others) == 2:
        raise ValueError(
            f"square weights such as {first(square)} may have their inputs as rows or as columns, and the adapter's "
            "other weights have both; give --model, whose classes tell"
        )
    return sure | dict.fromkeys(square, others == {True})


def has_inputs_as_rows(name: str, module: nn.Module | None) -> bool:
    """Whether a weight belongs to an embedding or to transformers' `Conv1D`."""
    return _is_embedding(name, module) or (module is not None and is_transposed(_owner(name, module)))


def _is_embedding(name: str, module: nn.Module | None) -> bool:
    if module is None:
        return EMBEDDING.fullmatch(name) is not None
    return isinstance(_owner(name, module), nn.Embedding)


def _may_have_pair(name: str, shape: torch.Size, module: nn.Module | None) -> bool:
    if not name.endswith(".weight") or len(shape) < 2 or min(shape[0], shape[1:].numel()) < 2:
        return False
    owner = None if module is None else _owner(name, module)
    return not isinstance(owner, _ConvTransposeNd) and getattr(owner, "groups", 1) == 1


def _owner(name: str, module: nn.Module) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _wide(weight: Tensor, flip: bool) -> Num[Tensor, "M N *places"]:
    """A weight as outputs by inputs."""
    return (weight.mT if flip else weight).double()


def _fits(shape: torch.Size, pair: Pair) -> set[bool]:
    """Whether a pair fits a weight with its outputs as rows (False), with its inputs as rows (True), or both."""
    rows, columns = len(pair.b), pair.a.shape[1:].numel()
    own = (shape[0], shape[1:].numel())
    return {flip for flip, size in ((False, (rows, columns)), (True, (columns, rows))) if size == own}


def _added(weight: Tensor, pair: Pair, flip: bool) -> Tensor:
    delta = pair.scaling * (pair.b.double() @ pair.a.double().flatten(1))
    return (weight.double() + (delta.mT if flip else delta).reshape(weight.shape)).to(weight.dtype)
