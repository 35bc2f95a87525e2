"""Spectra of gradients, weights, updates, optimizer state and features, by numpy from what a plain callback saw."""

from functools import cache

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor, nn

from tests.independent.trainings import Run, Step
from tests.oracles.power_law import clauset
from tests.oracles.spectra import RANKS

# By quantity and site: what each sample should have, by step.
Found = dict[str, dict[str, dict[int, float]]]

ROUNDING = 2.0**-23
SOURCES = {"gradient": True, "weight": False, "update": True, "displacement": True, "first_moment": False}
PLAIN = ("energy_rank", "energy_rank_0.01", "stable_rank", "effective_rank", "effective_rank_energy")
PLAIN += ("participation_ratio", "nuclear_to_spectral", "spectral_norm", "frobenius_norm")


def matrices(run: Run, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The matrices of each parameter by the names that the documentation gives them, cut out by hand."""
    found = {}
    for name, tensor in tensors.items():
        array = tensor.double().numpy()
        if array.ndim < 2:
            continue
        layer = name.split(".")[-2]
        if layer == "lstm":
            found |= {f"{name}.{gate}": part for gate, part in zip("ifgo", np.split(array, 4), strict=True)}
        elif layer == "depthwise":
            found[name] = array[:, 0].reshape(8, 9)
        elif layer == "stem":
            found[name] = array.reshape(8, -1)
        elif layer == "c_attn":
            found |= {f"{name}.{part}": array[:, 16 * i : 16 * i + 16].T for i, part in enumerate("qkv")}
        elif run.name == "GPT-2" and layer in ("c_proj", "c_fc"):
            found[name] = array.T
        else:
            found[name] = array
    return found


def features(run: Run, weights: dict[str, Tensor], batches: list[Tensor]) -> dict[str, np.ndarray]:
    """All rows that each layer puts out, features last."""
    module, rows = run.at(weights), {}

    def keep(name: str) -> object:
        def hook(layer: nn.Module, inputs: object, output: object) -> None:
            values = output[0] if isinstance(output, tuple) else output
            values = values.movedim(1, -1) if isinstance(layer, nn.Conv2d) else values
            rows.setdefault(f"{name}.out", []).append(values.detach().double().reshape(-1, values.shape[-1]).numpy())

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding | nn.LSTM) or type(layer).__name__ == "Conv1D":
            layer.register_forward_hook(keep(name))
    with torch.no_grad():
        for batch in batches:
            module.net(batch)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def noise(short: int, long: int) -> np.ndarray:
    """Singular values that a Gaussian matrix of unit energy is expected to have."""
    return law(short, long) / np.sqrt((law(short, long) ** 2).sum())


@cache
def law(short: int, long: int) -> np.ndarray:
    """Of a Gaussian matrix with entries of variance `1 / long`: quantiles of Marchenko and Pastur's, by quadrature."""
    ratio = short / long
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2

    # At the eigenvalue low + (high - low) sin(angle / 2)^2 nothing is singular; pi angles have all of the law.
    def eigenvalue(angle: np.ndarray) -> np.ndarray:
        return low + (high - low) * np.sin(angle / 2) ** 2

    def density(angle: float) -> float:
        return ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * ratio * eigenvalue(angle))

    def mass(angle: float) -> float:
        return quad(density, 1e-9, angle, limit=200)[0]

    places = [brentq(lambda a, s=share: mass(a) - s, 1e-9, np.pi) for share in (np.arange(short) + 0.5) / short]
    return np.sqrt(eigenvalue(np.array(places)))[::-1]


def statistics(matrix: np.ndarray, values: np.ndarray | None = None) -> dict[str, float]:
    """Everything that is asked of one matrix. `values` stand for a matrix that is too large to be had."""
    s = np.linalg.svd(matrix, compute_uv=False) if values is None else values
    short, long = sorted(matrix.shape)
    floor = long * ROUNDING
    if s.max() == 0:
        zeros = dict.fromkeys((*PLAIN, "numerical_rank", "schatten_quasi_norm_0.5", "marchenko_pastur_outliers"), 0.0)
        blank = {"tail_exponent": np.nan, "tail_exponent_fit": np.nan}
        return zeros | blank | {f"relative_{name}": 0.0 for name in zeros if _is_comparable(name)}
    found = {name: float(RANKS[name](s)) for name in PLAIN}
    found["numerical_rank"] = float((s > floor * s.max()).sum())
    found["schatten_quasi_norm_0.5"] = _half_norm(s)
    found["marchenko_pastur_outliers"] = _outliers(s, short, long, floor)
    tail = s[s > floor * s.max()] ** 2
    distance, exponent = clauset(tail) if len(tail) >= 10 else (np.nan, np.nan)
    found |= {"tail_exponent": float(exponent), "tail_exponent_fit": float(distance)}
    null = noise(short, long)
    of_noise = {name: float(RANKS[name](null)) for name in PLAIN}
    of_noise |= {"numerical_rank": float(short), "schatten_quasi_norm_0.5": _half_norm(null)}
    energy = np.sqrt((s**2).sum())
    scale = {"spectral_norm": energy, "schatten_quasi_norm_0.5": energy}
    return found | {
        f"relative_{name}": found[name] / of_noise[name] / scale.get(name, 1.0)
        for name in (*PLAIN, "numerical_rank", "schatten_quasi_norm_0.5")
        if _is_comparable(name)
    }


def _is_comparable(name: str) -> bool:
    return name not in ("frobenius_norm", "energy_rank_0.01", "marchenko_pastur_outliers")


def _half_norm(s: np.ndarray) -> float:
    return float((s**0.5).sum() ** 2)


def _outliers(s: np.ndarray, short: int, long: int, floor: float) -> float:
    """Values above the edge of the law with the same median, six Tracy-Widom scales out."""
    roots = np.sqrt(max(long - 1, 1)), np.sqrt(short)
    scale = sum(roots) * sum(1 / root for root in roots) ** (1 / 3)
    edge = np.sqrt(sum(roots) ** 2 + 6 * scale) / np.median(law(short, long) * np.sqrt(long)) * np.median(s)
    return float((s > max(edge, floor * s.max())).sum())


def top_basis(matrix: np.ndarray) -> np.ndarray:
    """Directions of the short side, eight at most, of those that are there."""
    left, s, right = np.linalg.svd(matrix, full_matrices=False)
    vectors = left if matrix.shape[0] <= matrix.shape[1] else right.T
    alive = s > len(s) * ROUNDING * s.max()
    return vectors[:, :8][:, alive[:8]]


def overlaps(now: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Of two samples of one matrix."""
    one, other = top_basis(now), top_basis(before)
    few = min(one.shape[1], other.shape[1])
    if few == 0:
        return {"subspace_overlap": 0.0, "subspace_overlap_chance": 0.0}
    shared = (np.linalg.svd(one.T @ other, compute_uv=False) ** 2).sum()
    chance = max(one.shape[1], other.shape[1]) / min(now.shape)
    return {"subspace_overlap": shared / few, "subspace_overlap_chance": chance}


def drift(now: np.ndarray, before: np.ndarray) -> float:
    """Half the distance between shares of energy, NaN of zeros."""
    one, other = (np.linalg.svd(matrix, compute_uv=False) ** 2 for matrix in (now, before))
    return float(np.abs(one / one.sum() - other / other.sum()).sum() / 2) if one.any() and other.any() else np.nan


def expected(run: Run) -> Found:
    """All quantities of `RankMonitor`."""
    found: Found = {}
    start = matrices(run, run.steps[0].before)
    before: dict[str, dict[str, np.ndarray]] = {}
    for i, step in enumerate(run.steps):
        base = matrices(run, step.before)
        for source, sample in _of_parameters(run, step).items():
            for site, matrix in sample.items():
                numbers = statistics(matrix) | _changes(source, matrix, start[site], base[site])
                last = before.get(source, {}).get(site)
                numbers |= BLANK if last is None else overlaps(matrix, last) | {"spectrum_drift": drift(matrix, last)}
                _note(found, source, site, i, numbers)
            before[source] = sample
        for source, sample in _of_layers(run, step).items():
            for site, rows in sample.items():
                _note(found, source, site, i, statistics(rows))
    batches = [batch[0] for batch in run.module.val_dataloader()]
    for site, rows in features(run, run.steps[-1].after, batches).items():
        _note(found, "validation_feature", site, len(run.steps) - 1, statistics(rows))
    return found


BLANK = {"spectrum_drift": np.nan, "subspace_overlap": np.nan, "subspace_overlap_chance": np.nan}


def _of_parameters(run: Run, step: Step) -> dict[str, dict[str, np.ndarray]]:
    first = {name: value.double() for name, value in run.steps[0].before.items()}
    moved = {name: value.double() - first[name] for name, value in step.before.items()}
    update = {name: value.double() - step.before[name].double() for name, value in step.after.items()}
    tensors = {"gradient": step.gradients, "weight": step.before, "update": update, "displacement": moved}
    for moment, keys in {"first_moment": ("exp_avg", "momentum_buffer"), "second_moment": ("exp_avg_sq",)}.items():
        kept = {name: state[key] for name, state in step.moments.items() for key in keys if key in state}
        tensors |= {moment: kept} if kept else {}
    return {source: matrices(run, part) for source, part in tensors.items()}


def _of_layers(run: Run, step: Step) -> dict[str, dict[str, np.ndarray]]:
    rows = features(run, step.before, [step.batch[0]])
    return {"feature": rows, "centred_feature": {site: part - part.mean(0) for site, part in rows.items()}}


def _changes(source: str, matrix: np.ndarray, start: np.ndarray, base: np.ndarray) -> dict[str, float]:
    if source not in ("gradient", "update", "displacement"):
        return {}
    weight = start if source == "displacement" else base
    return {"weight_ratio": float(np.linalg.norm(matrix, 2) / np.linalg.norm(weight, 2))}


def _note(found: Found, source: str, site: str, step: int, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        found.setdefault(f"{source}_{name}", {}).setdefault(site, {})[step] = value


def entropy_rank_of(values: np.ndarray) -> float:
    """Of the shares of numbers that are nowhere negative."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def energy_rank_of(values: np.ndarray) -> float:
    """How many of them, largest first, hold nine tenths."""
    shares = np.sort(values)[::-1].cumsum() / values.sum()
    return 1.0 + float((shares < 0.9 * (1 - 1e-12)).sum())
