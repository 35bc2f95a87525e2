"""Why a file cannot be read as a checkpoint, in plain words: what torch says of it is seldom of use."""

import re
import zipfile
from fnmatch import filter as matching
from pathlib import Path

POINTER = b"version https://git-lfs"
ZIP = b"PK\x03\x04"
# Of files that torch.save wrote before version 1.6.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
AGAIN = "copy or download it again"
STATE = "torch.save(model.state_dict(), ...)"


def why_unreadable(file: Path, error: Exception) -> str:
    """What is wrong with a file that the reader of its ending could not read.

    Args:
        file: With the ending `.safetensors`, or with one of `torch.save`.
        error: What the reader raised.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except OSError as lost:
        return f"{lost.strerror}"
    if not head:
        return "it is empty"
    if head.startswith(POINTER):
        return "it is a pointer of Git LFS, not the file itself; fetch that with git lfs pull"
    return _of_safetensors(head, error) if file.suffix == ".safetensors" else _of_torch(file, head, error)


def _of_safetensors(head: bytes, error: Exception) -> str:
    if head.startswith((ZIP, LEGACY)):
        return "it is a file of torch.save; rename it to end in .pt"
    if _is_safetensors(head):
        return f"it is cut off or damaged; {AGAIN} ({error})"
    return "it is not a file of safetensors"


def _of_torch(file: Path, head: bytes, error: Exception) -> str:
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it has more than tensors and plain values, such as {found[1]}, and loading that would run code. Save it "
            f"without, as {STATE} does"
        )
    if head.startswith(ZIP):
        return _of_zip(file)
    if head.startswith(LEGACY):
        return f"it is cut off or damaged; {AGAIN}"
    if _is_safetensors(head):
        return "it is a file of safetensors; rename it to end in .safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return f"it was written by pickle, which can run code when it is read. Save only the weights: {STATE}"
    return f"it is no checkpoint: {STATE} writes one"


def _of_zip(file: Path) -> str:
    if not zipfile.is_zipfile(file):
        return f"it is cut off; {AGAIN}"
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if matching(names, "*/constants.pkl"):
        return "it is a program of TorchScript. Save only the weights: torch.save(program.state_dict(), ...)"
    return f"it is damaged; {AGAIN}" if matching(names, "*/data.pkl") else f"it is no checkpoint: {STATE} writes one"


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header in JSON, and the header."""
    return head[8:9] == b"{"
