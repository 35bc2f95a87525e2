"""Files that a command must not write over."""

from collections.abc import Iterable
from pathlib import Path

# Of checkpoints; what else a folder has is not read.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_read(file: Path, sources: Iterable[Path]) -> bool:
    """Whether a file exists and is one of the sources, or holds tensors of one that is a folder or an index."""
    if not file.is_file():
        return False
    known = list(sources)
    if file.suffix in SUFFIXES and any(one.is_dir() or one.suffix == ".json" for one in known):
        known += [part for one in known for part in _parts(one)]
    return any(one.is_file() and one.samefile(file) for one in known)


def _parts(source: Path) -> list[Path]:
    from lightning_lowrank.models.checkpoints import files_of  # not at the top: it takes torch

    try:
        return files_of(source)
    except ValueError:  # no checkpoint
        return []
