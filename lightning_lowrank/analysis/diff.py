"""What training changed from one checkpoint to another, matrix by matrix.

Shape letters:  M rows, N columns of a matrix   S its short side   K directions kept
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Num
from numpy.typing import NDArray
from torch import Tensor

from lightning_lowrank.analysis.matrices import Place
from lightning_lowrank.maths.spectra.decompose import SKETCH_ABOVE, decompose
from lightning_lowrank.maths.spectra.order_statistics import order_statistics
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.maths.spectra.spectrum import Spectrum
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.statistics import find

# Top directions that are compared; the paper on intruders takes ten.
TOP = 10
# Cosine to every direction of A below which a top direction of B is an intruder.
INTRUDER = 0.5
# Standard deviations of the cosine of two independent matrices, within which nothing says that they are related.
UNRELATED = 6.0

OF_CHANGE = ("stable_rank", "effective_rank", "relative_stable_rank", "relative_effective_rank")


@dataclass(frozen=True)
class Difference:
    """How one matrix of B differs from that of A.

    Attributes:
        name: Name of the matrix in A, or in B if A lacks it.
        shape: Rows and columns.
        verdict: "not moved", "moved", "re-initialised", "rounded", "not finite", "reshaped", "renamed NAME", "only in
            A", "only in B".
        values: What was measured, by name; see `differences`.
        orders: Frobenius norm and order statistics of the singular values of the change, for the spectrum in the tab.
        dtypes: Those of A and B if they differ.
    """

    name: str
    shape: tuple[int, int]
    verdict: str
    values: Mapping[str, float] = field(default_factory=dict)
    orders: NDArray[np.float64] | None = None
    dtypes: tuple[str, ...] = ()


class _Factors(NamedTuple):
    """Singular directions of a matrix, largest first: all, or the top ones of a large matrix."""

    left: Float[Tensor, "M K"]
    values: Float[Tensor, " K"]
    right: Float[Tensor, "N K"]
    whole: bool


def differences(
    a: Checkpoint,
    b: Checkpoint,
    in_a: Iterable[Place],
    in_b: Iterable[Place],
    *,
    top: int = TOP,
    energy: float = 0.9,
) -> Iterator[Difference]:
    """Compare every matrix of two checkpoints, in the order of A.

    `values` contains these quantities of the change `D = B - A`:

    - `change_norm` and `change_over_weight`: its Frobenius norm, absolute and relative to that of A;
    - `change_stable_rank` and `change_effective_rank`, and both relative to a Gaussian matrix of the same shape
      (`change_relative_...`);
    - `change_in_top_left` and `change_in_top_right`: the share of its energy in the `top` left (right) singular
      directions of A. `..._chance` is the value for a random change, `top / M` and `top / N`; `..._over_chance` is the
      ratio;
    - `top_left_overlap` and `top_right_overlap`: the mean squared cosine of the principal angles between the `top`
      directions of A and of B, with the same chance values;
    - `intruders`: how many of the `top` left directions of B have a cosine below 0.5 to every left direction of A. NaN
      for matrices larger than 1500 x 1500, where only some directions are computed and ranks are estimates with an
      `..._error`;
    - `cosine` of A and B as vectors;
    - `lora_rank`: the smallest rank that holds the share `energy` of the energy of D;
    - `rounding_over_weight`, if A and B have different dtypes: the change by rounding the finer one to the other dtype,
      relative to its norm.

    If a side has at most `top` directions, they hold everything: overlap and `..._over_chance` are NaN. The verdict is
    "rounded" if one matrix equals the other in a coarser dtype. It is "re-initialised" if the cosine is within six
    standard deviations, `1 / sqrt(M N)` each, of 0, like that of independent matrices.

    Cost: three singular value decompositions per matrix up to 1500 x 1500; sketches for larger ones.

    Args:
        in_a: The `places` of A.
        in_b: The `places` of B.
        top: Number of directions to compare.
        energy: Share that `lora_rank` keeps, above 0 and up to 1.

    Raises:
        ValueError: The checkpoints have no matrix of the same name and shape, or an argument is out of range.

    References:
        Shuttleworth et al. (2024), "LoRA vs full fine-tuning: an illusion of equivalence", Algorithm 1, for intruders.
    """
    if top < 1 or not 0 < energy <= 1:
        raise ValueError(f"top={top} must be at least 1, and energy={energy} above 0 and at most 1")
    first, second = ({place.site.name: place for place in found} for found in (in_a, in_b))
    renamed = _renamed(a, b, first, second)
    common = [name for name in first if name in second and first[name].site.shape == second[name].site.shape]
    if not common and not renamed:
        raise ValueError(
            f"{a.path} and {b.path} have no matrix of the same name and shape: the first has {_shapes(first)}, the "
            f"second has {_shapes(second)}"
        )
    for name, place in first.items():
        if name in common:
            yield from _of_place(a, b, place, second[name], top, energy)
        else:
            verdict = "reshaped" if name in second else f"renamed {renamed[name]}" if name in renamed else "only in A"
            yield from (Difference(label, _sides(place), verdict) for label in place.site.labels)
    for name, place in second.items():
        if name not in first and name not in renamed.values():
            yield from (Difference(label, _sides(place), "only in B") for label in place.site.labels)


def _of_place(a: Checkpoint, b: Checkpoint, in_a: Place, in_b: Place, top: int, energy: float) -> Iterator[Difference]:
    for (label, one), (_, other) in zip(in_a.matrices(a), in_b.matrices(b), strict=True):
        found = difference(label, one.double(), other.double(), top=top, energy=energy)
        yield found if one.dtype == other.dtype else _in_other_dtypes(found, one, other)


def _in_other_dtypes(found: Difference, a: Num[Tensor, "M N"], b: Num[Tensor, "M N"]) -> Difference:
    """The same, beside what rounding does by itself: where that is all, nothing was trained."""
    names = tuple(str(one.dtype).removeprefix("torch.") for one in (a, b))
    if found.verdict in ("not moved", "not finite"):
        return replace(found, dtypes=names)
    fine, coarse = (a, b) if torch.finfo(a.dtype).eps < torch.finfo(b.dtype).eps else (b, a)
    exact, rounded = fine.double(), fine.to(coarse.dtype).double()
    size = {"rounding_over_weight": float((rounded - exact).norm() / exact.norm())}
    if torch.equal(rounded, coarse.double()):
        kept = {name: found.values[name] for name in ("change_norm", "change_over_weight")}
        return Difference(found.name, found.shape, "rounded", kept | size, dtypes=names)
    return replace(found, values={**found.values, **size}, dtypes=names)


def difference(
    name: str, a: Num[Tensor, "M N"], b: Num[Tensor, "M N"], *, top: int = TOP, energy: float = 0.9
) -> Difference:
    """How one matrix differs from another of its shape; see `differences`."""
    shape = (a.shape[0], a.shape[1])
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return Difference(name, shape, "not finite")
    change = b - a
    norm, before = float(torch.linalg.vector_norm(change)), float(torch.linalg.vector_norm(a))
    sizes = {"change_norm": norm, "change_over_weight": norm / before if before else math.inf if norm else 0.0}
    if norm == 0:
        return Difference(name, shape, "not moved", sizes)
    after = float(torch.linalg.vector_norm(b))
    cosine = float((a * b).sum()) / (before * after) if before and after else math.nan
    related = not abs(cosine) < UNRELATED / math.sqrt(a.numel())
    (spectrum,) = decompose([change], "values").spectra
    values = sizes | {"cosine": cosine} | _of_change(spectrum, energy) | _directions(a, b, change, top)
    orders = order_statistics(spectrum).double().numpy()
    return Difference(name, shape, "moved" if related else "re-initialised", values, orders)


def _of_change(spectrum: Spectrum, energy: float) -> dict[str, float]:
    """Ranks of the change."""
    enough = "numerical_rank" if energy == 1 else f"energy_rank_{1 - energy:.12g}"
    asked = {f"change_{name}": find(name) for name in OF_CHANGE} | {"lora_rank": find(enough)}
    found = {name: estimate(statistic, spectrum) for name, statistic in asked.items()}
    errors = {} if spectrum.whole else {f"{name}_error": float(error) for name, (_, error) in found.items()}
    return {name: float(value) for name, (value, _) in found.items()} | errors


def _directions(
    a: Float[Tensor, "M N"], b: Float[Tensor, "M N"], change: Float[Tensor, "M N"], top: int
) -> dict[str, float]:
    """Where the change lies, and how far the top directions turned."""
    before, after, most = _factors(a, top), _factors(b, top), float(change.square().sum())
    k = min(top, *a.shape)
    if not float(before.values[0]) or not float(after.values[0]):
        return {}  # a matrix of zeros has no directions
    values = {}
    for side, one, other, moved in (
        ("left", before.left, after.left, change),
        ("right", before.right, after.right, change.T),
    ):
        kept, turned = one[:, :k], other[:, :k]
        share, chance = float((kept.T @ moved).square().sum()) / most, k / len(one)
        values[f"change_in_top_{side}"], values[f"change_in_top_{side}_chance"] = share, chance
        whole = k == len(one)  # all directions that there are hold everything
        values[f"change_in_top_{side}_over_chance"] = math.nan if whole else share / chance
        values[f"top_{side}_overlap"] = math.nan if whole else float((kept.T @ turned).square().sum()) / k
    cosines = (before.left.T @ after.left[:, :k]).abs().amax(0)
    values["intruders"] = float((cosines < INTRUDER).sum()) if before.whole else math.nan
    return values


def _factors(matrix: Float[Tensor, "M N"], top: int) -> _Factors:
    """All singular directions, or the top ones of a matrix that is too large for it."""
    if min(matrix.shape) <= SKETCH_ABOVE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return _Factors(left, values, right.T, whole=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=2 * top, niter=4)
    return _Factors(left, values, right, whole=False)


def _renamed(a: Checkpoint, b: Checkpoint, first: Mapping[str, Place], second: Mapping[str, Place]) -> dict[str, str]:
    """Names that only A has -> names that only B has, of matrices that are related."""
    gone, new = ([n for n in one if n not in other] for one, other in ((first, second), (second, first)))
    found: dict[str, str] = {}
    for name in gone:
        alike = [other for other in new if second[other].site.shape == first[name].site.shape]
        free = [other for other in alike if other not in found.values()]
        best = max(free, key=lambda other: _cosine(a, b, first[name], second[other]), default=None)
        if best is not None and _cosine(a, b, first[name], second[best]) > 0.5:
            found[name] = best
    return found


def _cosine(a: Checkpoint, b: Checkpoint, one: Place, other: Place) -> float:
    """Of what two tensors have at up to 65,536 places."""
    left, right = (c.tensor(p.names[0]).flatten() for c, p in ((a, one), (b, other)))
    every = max(1, len(left) // 65536)
    left, right = left[::every].double(), right[::every].double()
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0)) if len(left) == len(right) else 0.0


def _sides(place: Place) -> tuple[int, int]:
    return place.site.shape[-2], place.site.shape[-1]


def _shapes(found: Mapping[str, Place]) -> str:
    several = [f"{name} {tuple(place.site.shape)}" for name, place in found.items()]
    return ", ".join(several[:4]) + (f" and {len(several) - 4} more" if len(several) > 4 else "")
