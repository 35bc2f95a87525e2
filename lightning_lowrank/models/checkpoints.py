"""Checkpoints on disk: names and shapes at once, tensors one at a time, as a module without values."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lowrank.models.unreadable_files import why_unreadable

# Where trainers keep the weights in a dictionary of other things, Lightning first.
NESTED = ("state_dict", "model_state_dict", "model", "module")
# Of a folder, the first that is there.
FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json")

# Those of real numbers that a file of safetensors may have, and torch computes with.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}

Read = Callable[[], Tensor]


class Checkpoint:
    """The floating-point tensors of a file or a folder.

    A `.safetensors` file, a sharded model with its index, and a file of `torch.save` are mapped, so that memory holds
    the tensors that are asked for. Files of `torch.save` are read with `weights_only=True`: code in them never runs.

    Args:
        path: A `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file, an index of shards, or the folder of a
            Hugging Face model or of a peft adapter.

    Attributes:
        path: As given.
        folder: The folder that holds it.
        shapes: Name -> shape, in the order of the file.

    Raises:
        ValueError: There is no such file, it holds no tensors or objects that are not plain, or shards are missing.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": torch.ones(2, 3)}, Path(folder) / "net.pt")
        ...     Checkpoint(Path(folder) / "net.pt").shapes
        {'fc.weight': torch.Size([2, 3])}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = _file(self.path)
        self.folder = file.parent
        self._reads: dict[str, Read] = {}
        self.shapes: dict[str, torch.Size] = {}
        for part, only in _parts(file).items():
            self._add(part, only)
        if not self.shapes:
            raise ValueError(f"{file} has no floating-point tensors")

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in self._reads:
            raise ValueError(f"{self.path} has no tensor {name!r}; it has {_some(self.shapes)}")
        return self._reads[name]()

    def refuse_infinite(self, names: Iterable[str] | None = None, advice: str = "") -> None:
        """Refuse weights that are NaN or infinite; masks, of zeros and minus infinity alone, are none.

        Cost: each tensor is read once.

        Args:
            names: Of tensors, all unless given.
            advice: What works instead.

        Raises:
            ValueError: With the file and the tensors.
        """
        refuse_infinite(
            self.path, ((name, self.tensor(name)) for name in (self.shapes if names is None else names)), advice
        )

    def skeleton(self) -> nn.Module:
        """Modules and parameters of these names and shapes, without values (on the "meta" device)."""
        root = nn.Module()
        shared: dict[Hashable, nn.Parameter] = {}
        for name, shape in self.shapes.items():
            *path, local = name.split(".")
            owner = root
            for part in path:
                owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            empty = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            # Not `register_parameter`: a parameter may have the name of an attribute of modules.
            owner._parameters[local] = shared.setdefault(self._place(name), empty)
        return root

    def _place(self, name: str) -> Hashable:
        """Where a tensor lies: tied ones of a file of `torch.save` lie at one place."""
        read = self._reads[name]
        return read.place if isinstance(read, _Held) and read.place[0] else name

    def _add(self, file: Path, only: set[str] | None) -> None:
        found = _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickle(file)
        missing = [] if only is None else [name for name in only if name not in found]
        if missing:
            raise ValueError(f"{file} lacks {_some(missing)}, which the index lists for it; download the file again")
        for name, (read, shape) in found.items():
            self._reads[name], self.shapes[name] = read, shape


def files_of(path: str | Path) -> list[Path]:
    """The files in which the tensors of a checkpoint lie.

    Raises:
        ValueError: There is no such file, or shards are missing.
    """
    return list(_parts(_file(Path(path))))


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: what is not spoils the sum. Types of 8 bits know no `isfinite`."""
    return bool(tensor.sum(dtype=torch.float64).isfinite())


def refuse_infinite(path: str | Path, tensors: Iterable[tuple[str, Tensor]], advice: str = "") -> None:
    """Refuse tensors of a file that are NaN or infinite, save masks.

    Raises:
        ValueError: With their names.
    """
    if lost := [name for name, tensor in tensors if not is_finite(tensor) and not _is_mask(tensor)]:
        raise ValueError(f"{path} has weights that are not finite, in {_some(lost)}{advice and ': '}{advice}")


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == -math.inf)).all())


class _Held:
    """A tensor of a mapped file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.place = (tensor.data_ptr(), tuple(tensor.shape))

    def __call__(self) -> Tensor:
        return self._tensor


def _file(path: Path) -> Path:
    """The file to begin with."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: only {list(SUFFIXES)} files, and folders with them, can be read")
        return path
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path} is a distributed checkpoint in shards; first convert it to one file with python -m "
            "lightning.pytorch.utilities.consolidate_checkpoint"
        )
    for name in FILES:
        if (path / name).is_file():
            return path / name
    there = sorted(one.name for one in path.iterdir() if one.suffix in SUFFIXES and one.suffix != ".json")
    if len(there) == 1:
        return path / there[0]
    advice = f"give one of its files, {_some(there)}" if there else f"it has no {list(SUFFIXES[:-1])} file at all"
    raise ValueError(f"{path} contains none of {list(FILES)}; {advice}")


def _parts(file: Path) -> dict[Path, set[str] | None]:
    """The files to read, and the names that each has to have."""
    if file.suffix != ".json":
        return {file: None}
    try:
        index: Mapping[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: file.parent / part for name, part in index.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not an index of shards: it has no 'weight_map' of tensors and files") from error
    parts: dict[Path, set[str] | None] = {}
    for name, shard in shards.items():
        names = parts.setdefault(shard, set())
        assert names is not None
        names.add(name)
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ValueError(f"{file.parent} has {len(parts) - len(missing)} of {len(parts)} shards; {missing} are missing")
    return parts


def _of_safetensors(file: Path) -> dict[str, tuple[Read, torch.Size]]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, for it is no mapping
            known = {name: (part.get_dtype(), torch.Size(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {why_unreadable(file, error)}") from error
    begins = _begins(file)
    return {
        name: (partial(_mapped, file, begins[name], DTYPES[dtype], shape), shape)
        for name, (dtype, shape) in known.items()
        if dtype in DTYPES
    }


def _begins(file: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin, in a file whose header was found to be sound."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: Mapping[str, Any] = json.loads(opened.read(size))
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def _mapped(file: Path, begin: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A tensor of a file of safetensors.

    The file is mapped anew: what is mapped counts as memory of the process for as long as it is. `safe_open` would read
    the whole header for each tensor, which takes longer than a small tensor.
    """
    whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    flat = whole[begin : begin + shape.numel() * dtype.itemsize]
    return (flat.clone() if begin % dtype.itemsize else flat).view(dtype).reshape(shape)


def _of_pickle(file: Path) -> dict[str, tuple[Read, torch.Size]]:
    content = loaded(file)
    state = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }
    if odd := [name for name, value in tensors.items() if value.is_meta or value.layout != torch.strided]:
        raise ValueError(
            f"{file} has tensors without values ('meta') or without all entries (sparse), {_some(odd)}; "
            "save them from the CPU, and as dense ones"
        )
    if not tensors:
        raise ValueError(
            f"{file} has no floating-point tensors at the top or in any of {list(NESTED)}; "
            f"its keys are {_some(content)}"
        )
    return {name: (_Held(tensor.detach()), tensor.shape) for name, tensor in tensors.items()}


def loaded(file: Path) -> Mapping[Any, Any]:
    """What `torch.save` wrote, without running code in it.

    Raises:
        ValueError: It is no dictionary, or cannot be read.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6, or torch.save(_use_new_zipfile_serialization=False)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes make of a reader of pickles
        raise ValueError(f"{file} cannot be read as a checkpoint: {why_unreadable(file, error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} contains a {type(content).__name__}; expected a dictionary of tensors")
    return content


def _some(names: Any, most: int = 5) -> str:
    """The first few of many."""
    several = list(names)
    more = f" and {len(several) - most} more" if len(several) > most else ""
    return f"{several[:most]}{more}"
