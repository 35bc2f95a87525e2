"""Where a command may write, asked before anything is computed."""

from collections.abc import Iterable
from pathlib import Path

# Of checkpoints; what else a folder has is not read.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def writable(given: str, ending: str = "", option: str = "output") -> Path:
    """A file that is to be written.

    Raises:
        ValueError: Its name has another ending, it is a folder, or its folder does not exist.
    """
    file, refused = Path(given), f"--{option}={given} cannot be written: "
    if file.suffix != ending and ending:
        raise ValueError(f"{refused}it is a file of {ending[1:]}, and its name must end in {ending}")
    if file.is_dir():
        raise ValueError(f"{refused}it is a folder; give the name of a file")
    if not file.parent.is_dir():
        raise ValueError(f"{refused}there is no folder {file.parent}")
    return file


def tensors_file(given: str) -> Path:
    """A file of safetensors that is to be written.

    Raises:
        ValueError: Its name has another ending, it is a folder, or its folder does not exist.
    """
    return writable(given, ".safetensors")


def folder(given: str) -> Path:
    """A folder that is to be made, unless it is there.

    Raises:
        ValueError: There is a file in its place, or in that of a folder above it.
    """
    there = next(one for one in (Path(given), *Path(given).parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"--output={given} cannot be made a folder: {there} is a file")
    return Path(given)


def is_read(file: Path, sources: Iterable[Path]) -> bool:
    """Whether a file exists and is one of the sources, or holds numbers of one that is a folder or an index."""
    if not file.is_file():
        return False
    known = list(sources)
    if file.suffix in SUFFIXES and any(one.is_dir() or one.suffix == ".json" for one in known):
        known += [part for one in known for part in _parts(one)]
    if "tfevents" in file.name:  # of a run in a folder of runs
        return any(one.resolve() in (file.resolve(), *file.resolve().parents) for one in known)
    return any(one.is_file() and one.samefile(file) for one in known)


def _parts(source: Path) -> list[Path]:
    from lightning_lowrank.models.checkpoints import files_of  # not at the top: it takes torch

    try:
        return files_of(source)
    except ValueError:  # no checkpoint
        return []
