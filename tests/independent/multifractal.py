"""Masses around neurons by sorting and counting, their moments by sums, exponents by fitted lines: numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any, NamedTuple

import numpy as np

from tests.independent.ranks import Found, matrices
from tests.independent.trainings import Run, Step

ORDERS = np.round(np.arange(-30, 31) / 10, 1)
THRESHOLD, DRAWS = 150, 24
OF_THE_NETWORK = ("asymmetry", "scaling_fit", "decades", "kept_share")
COMPARED = ("alpha0", "width", "dispersion", "valid")
NEEDS_SPECTRUM = ("alpha0", "width", "width_over_floor", "c2_excess", "box_dimension", "asymmetry")


class Drawn(NamedTuple):
    """What is expected of a number that is drawn, and how far from it draws are."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Drawn":
        """From some draws."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class Masses:
    """Of neurons that count, at the radii of the fits.

    Attributes:
        noise: Variance of the logarithm of counts of neurons that are all alike.
        of_all: Neurons that there are.
        own: Shares are of each neuron's own connections.
    """

    masses: np.ndarray
    abscissa: np.ndarray
    noise: np.ndarray
    of_all: int
    own: bool

    def slope(self, curve: np.ndarray) -> float:
        return float(np.polyfit(self.abscissa, curve, 1)[0])


def numbers(found: Masses, orders: np.ndarray = ORDERS) -> dict[str, float]:
    """Everything that is said of a network."""
    kept = {"kept_share": len(found.masses) / found.of_all}
    if found.masses.shape[1] < 5 or len(found.masses) < 2:
        return dict.fromkeys(ALL, np.nan) | kept | {"valid": 0.0}
    largest = found.masses[:, -1:] if found.own else found.masses[:, -1:].mean()
    logs = np.log(found.masses / largest)
    partition = [np.log(np.exp(q * logs).sum(0)) for q in orders]
    tilted = [(np.exp(q * logs) * logs).sum(0) / np.exp(q * logs).sum(0) for q in orders]
    alpha = np.array([found.slope(curve) for curve in tilted])
    alpha0 = found.slope(logs.mean(0))
    floor = found.slope(found.noise)
    excess = np.log(found.masses).var(0, ddof=1) - found.noise
    fits = [
        np.corrcoef(found.abscissa, curve)[0, 1] ** 2
        for q, curve in zip(orders, partition, strict=True)
        if abs(q) >= 0.5
    ]
    is_concave = (np.diff(alpha) <= 1e-9 * (1 + np.abs(alpha[1:]))).all()
    box = np.log(np.exp(-logs).sum(0))
    values = {
        "dispersion": excess.mean(),
        "dispersion_chance": _chance(found.noise, len(found.masses)),
        "alpha0": alpha0,
        "width": alpha.max() - alpha.min(),
        "width_floor": 6 * abs(floor),
        "width_over_floor": (alpha.max() - alpha.min()) / (6 * abs(floor)),
        "c2_excess": found.slope(logs.var(0, ddof=1)) - floor,
        "box_dimension": -found.slope(box),
        "asymmetry": np.log((alpha0 - alpha[-1]) / (alpha[0] - alpha0)) if is_concave else np.nan,
        "scaling_fit": min(fits),
        "decades": np.ptp(found.abscissa) / np.log(10),
        "valid": float(is_concave),
    }
    blank = {} if is_concave else dict.fromkeys(NEEDS_SPECTRUM, np.nan)
    return {name: float(value) for name, value in (values | kept | blank).items()}


ALL = ("dispersion", "dispersion_chance", "alpha0", "width", "width_floor", "width_over_floor", "c2_excess")
ALL += ("box_dimension", "asymmetry", "scaling_fit", "decades", "kept_share", "valid")


def _chance(noise: np.ndarray, neurons: int) -> float:
    """3.5 deviations out in Wilson and Hilferty's chi-squared law; nested counts share the smaller variance."""
    variance = 2 * np.mean([[min(a, b) ** 2 for b in noise] for a in noise]) / (neurons - 1)
    spread = variance / (9 * noise.mean() ** 2)
    return noise.mean() * ((1 - spread + 3.5 * spread**0.5) ** 3 - 1)


def by_rank(matrix: np.ndarray) -> Masses:
    """Of rows, at entries of the matrix that so many others are not smaller than."""
    sizes = np.abs(matrix.astype(np.float32))
    live = sizes[sizes.max(1) > 0]
    rows, columns = live.shape
    empty = Masses(np.ones((rows, 0)), np.ones(0), np.ones(0), len(matrix), own=False)
    if columns < 32:
        return empty
    falling = np.sort(live.ravel())[::-1]
    shares = np.geomspace(8 / columns, 0.5, 24)
    radii = falling[np.ceil(np.round(shares * live.size, 3)).astype(int) - 1]
    if radii[-1] <= 0:
        return empty
    radii = np.array(sorted(set(radii.tolist()), reverse=True), dtype=np.float32)
    counts = np.array([[(row >= radius).sum() for radius in radii] for row in live], dtype=float)
    noise = np.array([_binomial(columns, mean / columns) for mean in counts.mean(0)])
    return Masses(1 + counts, np.log((1 + counts).mean(0)), noise, len(matrix), own=False)


def _binomial(n: int, p: float) -> float:
    """Variance of the logarithm of one and a binomial number."""
    k = np.arange(n + 1)
    choices = np.array([lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) for i in k])
    weights = np.exp(choices + k * np.log(p) + (n - k) * np.log1p(-p))
    logs = np.log1p(k)
    return float((weights * (logs - (weights * logs).sum()) ** 2).sum())


def published(chain: list[np.ndarray]) -> Masses:
    """Of columns, by lengths `1 / |w|` rounded to integers, all layers together."""
    histograms = []
    for matrix in chain:
        for column in matrix.T:
            with np.errstate(divide="ignore"):
                lengths = 1 / np.abs(column)
            kept = np.round(lengths[(lengths > 1) & (lengths <= THRESHOLD)]).astype(int)
            histograms.append(np.bincount(kept, minlength=THRESHOLD + 1)[1:])
    counts = np.array(histograms)
    kept = counts[counts.sum(1) > 10]
    occur = kept.any(0)
    masses = (1.0 + kept.cumsum(1))[:, occur]
    return Masses(masses, np.log(np.nonzero(occur)[0] + 1), 1 / masses.mean(0), len(counts), own=True)


def _sites(run: Run, step: Step) -> dict[str, np.ndarray]:
    """Matrices with kernels of convolutions by their norms."""
    found = matrices(run, step.before)
    if run.name == "ConvNeXt":
        for name in ("net.stem.weight", "net.depthwise.weight"):
            found[name] = step.before[name].double().flatten(2).norm(dim=-1).numpy()
    return found


def _chain(run: Run, found: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Without embeddings; queries, keys and values of a fused projection as one."""
    chain: dict[str, list[np.ndarray]] = {}
    for name, matrix in found.items():
        layer = name.removesuffix(".q").removesuffix(".k").removesuffix(".v") if "c_attn" in name else name
        if not any(part in name for part in ("wte", "wpe", "embed_tokens")):
            chain.setdefault(layer, []).append(matrix)
    return [np.concatenate(parts) for parts in chain.values()]


def expected(run: Run) -> Found:
    """All quantities of `MultifractalMonitor` in "rank"."""
    found: Found = {}
    for i, step in enumerate(run.steps):
        for site, matrix in _sites(run, step).items():
            for direction, rows in (("in", matrix), ("out", matrix.T)):
                for name, value in numbers(by_rank(rows)).items():
                    sites = found.setdefault(f"multifractal_{name}", {})
                    sites.setdefault(f"{site}.{direction}", {})[i] = value
    return found


def network(run: Run) -> Found:
    """Those in "neuromfa", and of its nulls what own draws give, at the first and the last sample."""
    found: Found = {}
    first: dict[str, float] = {}
    for i, step in enumerate(run.steps):
        of_all = numbers(published(_chain(run, _sites(run, step))))
        values = {name: of_all[name] for name in (*COMPARED, *OF_THE_NETWORK)}
        first = first or values
        values["emergence"] = _emergence(values, first)
        for name, value in values.items():
            found.setdefault(f"neuromfa_{name}", {}).setdefault("", {})[i] = value
    for null, draw in (("shuffled", _shuffled), ("gaussian", _gaussian)):
        _of_a_null(run, null, draw, found)
    return found


def _emergence(now: dict[str, float], first: dict[str, float]) -> float:
    return now["width"] / first["width"] * np.log(first["alpha0"] / now["alpha0"])


def _of_a_null(run: Run, null: str, draw: object, found: Found) -> None:
    random, last = np.random.default_rng(0), len(run.steps) - 1
    drawn = {
        i: [numbers(published(draw(run, run.steps[i], random)), ORDERS[::5]) for _ in range(DRAWS)] for i in (0, last)
    }
    for i, rows in drawn.items():
        for name in COMPARED:
            values = [row[name] for row in rows if not np.isnan(row[name])]
            tag = f"neuromfa_{name}_{null}"
            found.setdefault(tag, {}).setdefault("", {})[i] = Drawn.of(values)
    pairs = [_emergence(now, first) for now, first in zip(drawn[last], drawn[0], strict=True)]
    sound = [value for value in pairs if not np.isnan(value)]
    found[f"neuromfa_emergence_{null}"] = {"": {0: 0.0, last: Drawn.of(sound)}}


def _shuffled(run: Run, step: Step, random: np.random.Generator) -> list[np.ndarray]:
    return [random.permutation(matrix.ravel()).reshape(matrix.shape) for matrix in _chain(run, _sites(run, step))]


def _gaussian(run: Run, step: Step, random: np.random.Generator) -> list[np.ndarray]:
    """Entries of the mean and variance of each parameter, before kernels become norms."""
    drawn = {}
    for name, tensor in step.before.items():
        if tensor.ndim > 1:
            noise = random.standard_normal(tuple(tensor.shape))
            drawn[name] = tensor.mean() + tensor.std() * tensor.new_tensor(noise)
    like = Step(step.batch, drawn)
    return _chain(run, _sites(run, like))
