"""Many models on disk as updates: inner products and sums of them, one stretch of one tensor at a time.

Shape letters:  N models   K sums   P parameters of a tensor   R rank of a pair
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_lowrank.analysis.matrices import first
from lightning_lowrank.models.adapter_folders import CONFIG, AdapterFolder, Pair, read_adapter
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.names import fitting

# Numbers in float64 that are in memory at a time.
STRETCH = 2**22


class Models(ABC):
    """Updates of several models of one architecture.

    Attributes:
        paths: Of the models.
        shapes: Of the tensors that are looked at, by name.
        num_bytes: Of each file on disk.
    """

    paths: Sequence[str]
    shapes: Mapping[str, torch.Size]

    @property
    def num_bytes(self) -> list[int]:
        """Bytes of each model on disk."""
        return [size_on_disk(Path(path)) for path in self.paths]

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
        self.shapes = _chosen(self._files[0].shapes, match, exclude)
        for file in (*self._files[1:], *opened.values()):
            _refuse_stranger(file, self._files[0], self.shapes)
        for file in self._files[1:]:
            if others := [n for n in _chosen(file.shapes, match, exclude) if n not in self.shapes]:
                raise ValueError(f"{file.path} has {first(others)}, which {paths[0]} lacks; leave it out by exclude")

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
            lost = [self.paths[i] for i in (~total.diagonal().isfinite()).nonzero().flatten().tolist()]
            raise ValueError(
                f"{name!r} is not finite in {first(lost)}; leave out the models, or the tensors with --exclude"
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
        rows = torch.stack([torch.cat([_standard(file.tensor(name)) for name in self.shapes]) for file in files])
        alike = torch.nn.functional.cosine_similarity(rows[0], rows[1:])
        return bool((alike > 6 / rows.shape[1] ** 0.5).all())

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

    Raises:
        ValueError: A folder is none of a LoRA adapter, or one adapts other weights than the first.
    """

    def __init__(
        self, paths: Sequence[str], match: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self._folders = [read_adapter(path) for path in paths]
        shapes = [_shapes(folder) for folder in self._folders]
        self.shapes = _chosen(shapes[0], match, exclude)
        for path, others in zip(paths, shapes, strict=True):
            wrong = [name for name, shape in self.shapes.items() if others.get(name) != shape]
            if wrong or set(others) - set(shapes[0]):
                raise ValueError(
                    f"{path} and {paths[0]} adapt different weights, such as "
                    f"{first(wrong or sorted(set(others) - set(shapes[0])))}"
                )
        self.left_out = sorted({name for folder in self._folders for name in folder.whole})

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
        return _product(self._pairs(name)[model]).reshape(self.shapes[name])

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
        ValueError: A path is given twice, some are adapters and some are not, or a file cannot be read.
    """
    twice = [path for i, path in enumerate(paths) if Path(path).resolve() in {Path(p).resolve() for p in paths[:i]}]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; give each model once")
    adapters = [path for path in paths if is_adapter(Path(path))]
    if not adapters:
        return Checkpoints(paths, bases, match, exclude)
    if len(adapters) < len(paths):
        others = [path for path in paths if path not in adapters]
        raise ValueError(f"{first(adapters)} are LoRA adapters and {first(others)} are not; give only one kind")
    if any(base is not None for base in bases):
        raise ValueError("adapters are already updates; leave out --base and --control-base")
    return Adapters(paths, match, exclude)


def is_adapter(path: Path) -> bool:
    """A folder of peft."""
    return (path / CONFIG).is_file()


def base_of(path: Path) -> str | None:
    """The base that an adapter names."""
    found = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return None if found is None else str(found)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    files: Iterable[Path] = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files if file.suffix != ".json")


def _chosen(
    shapes: Mapping[str, torch.Size], match: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, torch.Size]:
    known = dict.fromkeys(shapes, nn.Module())
    wanted = set(known) if match is None else fitting("match", match, known)
    unwanted = set() if exclude is None else fitting("exclude", exclude, known)
    kept = {name: shape for name, shape in shapes.items() if name in wanted - unwanted and shape.numel()}
    if not kept:
        raise ValueError(f"match and exclude leave no tensor of {first(list(shapes))}")
    return kept


def _refuse_stranger(file: Checkpoint, model: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    wrong = {
        n: tuple(file.shapes[n]) if n in file.shapes else "missing" for n in shapes if file.shapes.get(n) != shapes[n]
    }
    if wrong:
        raise ValueError(
            f"{file.path} has another architecture than {model.path}: {first(list(wrong.items()), 4)}; leave "
            "out the differing tensors with --exclude"
        )


def shapes_of(path: str) -> Mapping[str, torch.Size]:
    """Shapes of the tensors of a model, or of the weights of an adapter.

    Raises:
        ValueError: It cannot be read.
    """
    return _shapes(read_adapter(path)) if is_adapter(Path(path)) else Checkpoint(path).shapes


def _standard(tensor: Tensor) -> Float[Tensor, " Q"]:
    """Up to 65,536 entries with mean 0 and variance 1, none where all are equal."""
    flat = tensor.flatten()[:65536].double()
    spread = flat.std(correction=0)
    return (flat - flat.mean()) / spread if spread > 0 else flat[:0]


def _shapes(folder: AdapterFolder) -> dict[str, torch.Size]:
    """Of the weights that an adapter is for: of an embedding its table has the inputs as rows."""
    found = {}
    for path, pair in folder.pairs.items():
        inner = pair.a.shape[1:]
        found[f"{path}.weight"] = torch.Size((*inner, len(pair.b)) if pair.of_embedding else (len(pair.b), *inner))
    return found


def _wide(a: Tensor) -> Float[Tensor, "R P"]:
    return a.double().flatten(1)


def _product(pair: Pair) -> Float[Tensor, "M P"]:
    product = pair.scaling * (pair.b.double() @ _wide(pair.a))
    return product.T if pair.of_embedding else product
