"""Many models on disk as updates: inner products and sums of them, one stretch of one tensor at a time.

Shape letters:  N models   K sums   P parameters of a tensor   R rank of a pair
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.analysis.matrices import first
from lightning_lowrank.models.adapter_folders import CONFIG, WEIGHTS, AdapterFolder, Pair, read_adapter
from lightning_lowrank.models.checkpoints import Checkpoint, files_of, is_finite
from lightning_lowrank.models.names import fitting

# Numbers in float64 that are in memory at a time.
STRETCH = 2**22
FACTOR = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")


class Models(ABC):
    """Updates of several models of one architecture.

    Attributes:
        paths: Of the models.
        shapes: Of the tensors that are looked at, by name.
    """

    paths: Sequence[str]
    shapes: Mapping[str, torch.Size]

    @property
    @abstractmethod
    def num_bytes(self) -> list[int]:
        """Bytes of the files with the weights of each model."""

    @property
    @abstractmethod
    def are_updates(self) -> bool:
        """They are what training changed, and not weights themselves."""

    def refuse_infinite(self) -> None:
        """Refuse models that are NaN or infinite, as adapters are when they are read.

        Raises:
            ValueError: One is.
        """

    @abstractmethod
    def gram(self, name: str) -> Float[Tensor, "N N"]:
        """Inner products of the updates of one tensor.

        Raises:
            ValueError: One is not finite.
        """

    @abstractmethod
    def tensor(self, model: int, name: str) -> Float[Tensor, "..."]:
        """The update of one tensor of one model, in float64."""

    def updates(self, name: str) -> Iterator[Float[Tensor, "..."]]:
        """The updates of one tensor, model by model."""
        return (self.tensor(i, name) for i in range(len(self.paths)))

    @abstractmethod
    def sums(self, name: str, weights: Float[Tensor, "K N"]) -> Iterator[Float[Tensor, "K _"]]:
        """Weighted sums of the updates of one tensor, stretch by stretch of the flat tensor."""

    @abstractmethod
    def is_related(self, num_models: int) -> bool:
        """Whether the first of the models come from one initialisation, as far as their weights say."""


class Checkpoints(Models):
    """Whole models; their updates are differences to a base, or the weights themselves.

    Args:
        paths: Files or folders.
        bases: Of each model, None where the weights themselves count.
        match: Only tensors whose name fits one of these patterns.
        exclude: Not these.

    Raises:
        ValueError: A file cannot be read, or a model has another architecture than the first.
    """

    def __init__(
        self,
        paths: Sequence[str],
        bases: Sequence[str | None],
        match: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        self.paths = list(paths)
        opened = {base: Checkpoint(base) for base in dict.fromkeys(bases) if base is not None}
        self._files = [Checkpoint(path) for path in paths]
        self._bases = [None if base is None else opened[base] for base in bases]
        several = [file.shapes for file in self._files]
        selected = _selected(several, match, exclude)
        self.shapes = _chosen(several, selected)
        if factors := [name for name in self.shapes if FACTOR.search(name)]:
            raise ValueError(
                f"{paths[0]} has factors of LoRA, such as {first(factors, 2)}. Factors are not unique: merge them into "
                f"the weights, or give folders of peft with {CONFIG}"
            )
        for file in (*self._files[1:], *opened.values()):
            _refuse_stranger(file, self._files[0], self.shapes)
        _refuse_more(self.paths, several, selected)

    @property
    def num_bytes(self) -> list[int]:
        """Bytes of files, without what else a folder has."""
        return [sum(part.stat().st_size for part in files_of(path)) for path in self.paths]

    @property
    def are_updates(self) -> bool:
        """There is a base."""
        return self._bases[0] is not None

    def refuse_infinite(self) -> None:
        """Read all that is chosen."""
        for file in self._files:
            file.refuse_infinite(self.shapes)

    def gram(self, name: str) -> Float[Tensor, "N N"]:
        """Inner products, in float64."""
        total = torch.zeros(len(self.paths), len(self.paths), dtype=torch.float64)
        for rows in self._stretches(name):
            total += rows @ rows.T
        if not bool(total.isfinite().all()):
            files = [*self._files, *dict.fromkeys(base for base in self._bases if base is not None)]
            lost = [str(file.path) for file in files if not is_finite(file.tensor(name))]
            raise ValueError(
                f"{name!r} is not finite in {first(lost)}; leave out the files, or the tensor with --exclude"
            )
        return total

    def tensor(self, model: int, name: str) -> Float[Tensor, "..."]:
        """One update."""
        base, found = self._bases[model], self._files[model].tensor(name).double()
        return found if base is None else found - base.tensor(name).double()

    def sums(self, name: str, weights: Float[Tensor, "K N"]) -> Iterator[Float[Tensor, "K _"]]:
        """Weighted sums."""
        for rows in self._stretches(name):
            yield weights @ rows[: weights.shape[1]]

    def is_related(self, num_models: int) -> bool:
        """Cosines of the weights are beyond six standard deviations of independent ones."""
        files = self._files[: min(8, num_models)]
        inner, count = torch.zeros(len(files) - 1, dtype=torch.float64), 0
        for name in self.shapes:
            rows = torch.stack([_standard(file.tensor(name)) for file in files])
            if bool(rows.any(1).all()):  # in each of them the entries differ
                inner, count = inner + rows[1:] @ rows[0], count + rows.shape[1]
        return count > 0 and bool((inner / count > 6 / count**0.5).all())

    def _stretches(self, name: str) -> Iterator[Float[Tensor, "N _"]]:
        """Updates of a tensor, a part of it at a time: files are mapped, and only that part is read.

        All parts are in the same memory: the next one takes the place of the last.
        """
        flat = [file.tensor(name).flatten() for file in self._files]
        starts = {id(base): base.tensor(name).flatten() for base in self._bases if base is not None}
        length = len(flat[0])
        space = torch.empty(len(flat), min(length, max(1, STRETCH // len(flat))), dtype=torch.float64)
        for begin in range(0, length, space.shape[1]):
            part = slice(begin, min(begin + space.shape[1], length))
            rows = space[:, : part.stop - begin]
            for row, one, base in zip(rows, flat, self._bases, strict=True):
                row.copy_(one[part])
                if base is not None:
                    row -= starts[id(base)][part]
            yield rows


class Adapters(Models):
    """LoRA adapters of one base, as the products B A: factors are looked at through inner products of products alone.

    Args:
        paths: Folders of peft.
        match: Only weights whose name fits one of these patterns.
        exclude: Not these.

    Attributes:
        left_out: Parameters that were trained whole, which are no product.
        bases: What each says it is for.

    Raises:
        ValueError: A folder is none of a LoRA adapter, or one adapts other weights than the first.
    """

    def __init__(
        self, paths: Sequence[str], match: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self._folders = [read_adapter(path) for path in paths]
        shapes = [_shapes(folder) for folder in self._folders]
        selected = _selected(shapes, match, exclude)
        self.shapes = _chosen(shapes, selected)
        for path, others in zip(paths, shapes, strict=True):
            if wrong := [name for name, shape in self.shapes.items() if others.get(name) != shape]:
                raise ValueError(
                    f"{path} and {paths[0]} adapt different weights, such as {first(wrong)}; leave them out with "
                    "--exclude"
                )
        _refuse_more(self.paths, shapes, selected)
        self.left_out = sorted({name for folder in self._folders for name in folder.whole})
        self.bases = [folder.base for folder in self._folders]

    @property
    def num_bytes(self) -> list[int]:
        """Bytes of files, without what else a folder has."""
        return [(Path(path) / WEIGHTS).stat().st_size for path in self.paths]

    @property
    def are_updates(self) -> bool:
        """Adapters always are."""
        return True

    def gram(self, name: str) -> Float[Tensor, "N N"]:
        """`<B_i A_i, B_j A_j> = sum((B_i' B_j) * (A_i A_j'))`: cores of ranks, no product is formed."""
        pairs = self._pairs(name)
        a = torch.cat([_wide(pair.a) for pair in pairs])
        b = torch.cat([pair.scaling * pair.b.double() for pair in pairs], 1)
        owner = torch.cat([torch.full((pair.rank,), i) for i, pair in enumerate(pairs)])
        gram = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
        for i in range(len(pairs)):
            own = owner == i
            cores = ((a @ a[own].T) * (b.T @ b[:, own])).sum(1)
            gram[:, i].index_add_(0, owner, cores)
        return gram

    def tensor(self, model: int, name: str) -> Float[Tensor, "..."]:
        """One product, in the shape of the weight."""
        pair = self._pairs(name)[model]
        product = pair.scaling * (pair.b.double() @ _wide(pair.a))
        return (product.T if _is_flipped(self._folders[model], pair) else product).reshape(self.shapes[name])

    def sums(self, name: str, weights: Float[Tensor, "K N"]) -> Iterator[Float[Tensor, "K _"]]:
        """Weighted sums of products."""
        total = torch.zeros(len(weights), self.shapes[name].numel(), dtype=torch.float64)
        for i in range(weights.shape[1]):
            total += weights[:, i : i + 1] * self.tensor(i, name).flatten()
        yield total

    def is_related(self, num_models: int) -> bool:
        """They are all for one base."""
        return True

    def _pairs(self, name: str) -> list[Pair]:
        path = name.removesuffix(".weight")
        return [folder.pairs[path] for folder in self._folders]


def models_of(
    paths: Sequence[str],
    bases: Sequence[str | None],
    match: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Models:
    """Checkpoints, or adapters where all are adapters.

    Raises:
        ValueError: A path is given twice, or is also a base, some are adapters and some are not, or a file cannot be
            read.
    """
    places: set[Path] = set()
    for path in paths:
        if Path(path).resolve() in places:
            raise ValueError(f"{path} is given twice; give each model once")
        places.add(Path(path).resolve())
    if start := next((base for base in set(bases) if base is not None and Path(base).resolve() in places), None):
        raise ValueError(f"{start} is given as a model and as a base, from which it does not differ; give it as a base")
    adapters = [path for path in paths if is_adapter(Path(path))]
    if not adapters:
        return Checkpoints(paths, bases, match, exclude)
    if len(adapters) < len(paths):
        others = [path for path in paths if path not in adapters]
        Checkpoint(others[0])  # refuses what is neither
        raise ValueError(f"{first(adapters)} are LoRA adapters and {first(others)} are not; give only one kind")
    if any(base is not None for base in bases):
        raise ValueError("adapters are already updates; leave out --base and --control-base")
    return Adapters(paths, match, exclude)


def is_adapter(path: Path) -> bool:
    """A folder of peft."""
    return (path / CONFIG).is_file()


def _selected(
    several: Sequence[Mapping[str, torch.Size]], match: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    """Names of tensors that are asked for, of those that any of the models has."""
    known = dict.fromkeys((name for shapes in several for name in shapes), nn.Module())
    wanted = set(known) if match is None else fitting("match", match, known)
    unwanted = set() if exclude is None else fitting("exclude", exclude, known)
    return wanted - unwanted


def _chosen(several: Sequence[Mapping[str, torch.Size]], selected: Collection[str]) -> dict[str, torch.Size]:
    """Shapes of the tensors of the first model that are asked for, and that are not empty."""
    kept = {name: shape for name, shape in several[0].items() if name in selected and shape.numel()}
    if not kept:
        raise ValueError(f"match and exclude leave no tensor of {first(list(several[0]))}")
    return kept


def _refuse_more(paths: Sequence[str], several: Sequence[Mapping[str, torch.Size]], selected: Collection[str]) -> None:
    """Refuse models that have tensors, asked for, which the first model lacks."""
    for path, shapes in zip(paths, several, strict=True):
        if others := [name for name in shapes if name in selected and name not in several[0]]:
            raise ValueError(f"{path} has {first(others)}, which {paths[0]} lacks; leave it out with --exclude")


def _refuse_stranger(file: Checkpoint, model: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    if wrong := differing(file.shapes, shapes):
        raise ValueError(
            f"{file.path} has another architecture than {model.path}: {first(wrong, 4)}; leave out the differing "
            "tensors with --exclude"
        )


def differing(
    shapes: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]
) -> list[tuple[str, tuple[int, ...] | str]]:
    """Tensors that are missing or have another shape, with that shape."""
    return [
        (name, tuple(shapes[name]) if name in shapes else "missing")
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]


def shapes_of(path: str) -> Mapping[str, torch.Size]:
    """Shapes of the tensors of a model, or of the weights of an adapter.

    Raises:
        ValueError: It cannot be read.
    """
    return _shapes(read_adapter(path)) if is_adapter(Path(path)) else Checkpoint(path).shapes


def _standard(tensor: Tensor) -> Float[Tensor, " Q"]:
    """Up to 65,536 entries with mean 0 and variance 1; zeros where all are equal."""
    flat = tensor.flatten()[:65536].double()
    away = flat - flat.mean()
    spread = away.square().mean().sqrt()
    return away / spread if float(flat.min()) < float(flat.max()) else torch.zeros_like(flat)


def _shapes(folder: AdapterFolder) -> dict[str, torch.Size]:
    """Of the weights that an adapter is for."""
    found = {}
    for path, pair in folder.pairs.items():
        inner = pair.a.shape[1:]
        found[f"{path}.weight"] = torch.Size(
            (*inner, len(pair.b)) if _is_flipped(folder, pair) else (len(pair.b), *inner)
        )
    return found


def _is_flipped(folder: AdapterFolder, pair: Pair) -> bool:
    """Whether a weight has its inputs as rows: the table of an embedding, or a matrix of `Conv1D` in transformers."""
    return pair.of_embedding or (folder.inputs_as_rows and pair.a.ndim == 2)


def _wide(a: Tensor) -> Float[Tensor, "R P"]:
    return a.double().flatten(1)
