"""Who carries the learning: gates that are really put into the model, pairs of units one by one, sets of weights."""

from math import comb
from typing import Any

import numpy as np
import torch
from scipy.stats import linregress, spearmanr

from tests.independent.ranks import Found
from tests.independent.trainings import Run, Step

Signals = dict[tuple[str, str], np.ndarray]

# By kind and model: layers whose inputs are units, and how many there are.
READERS: dict[str, dict[str, dict[str, int]]] = {
    "head": {
        "GPT-2": {"net.decoder.h.0.attn.c_proj": 2},
        "Llama": {"net.decoder.layers.0.self_attn.o_proj": 4},
    },
    "neuron": {
        "ConvNeXt": {"net.down": 32, "net.head": 8},
        "GPT-2": {"net.decoder.h.0.mlp.c_proj": 64},
        "Llama": {"net.decoder.layers.0.mlp.down_proj": 40},
        "LSTM": {"net.head": 32},
    },
}
DENSITIES = (0.1, 0.5)


def expected(run: Run) -> Found:
    """All quantities of `ConcentrationMonitor`."""
    found: Found = {}
    history: dict[tuple[str, str], list[np.ndarray]] = {}
    for i, step in enumerate(run.steps):
        signals = _signals(run, step)
        numbers = {f"{unit}_count": float(len(row)) for (unit, _), row in signals.items()}
        for key, row in signals.items():
            samples = history.setdefault(key, [])
            samples.append(row)
            numbers |= {f"{'_'.join(key)}_{name}": value for name, value in _of_a_signal(*key, samples).items()}
        numbers |= masks([_magnitudes(earlier) for earlier in run.steps[: i + 1]])
        for name, value in numbers.items():
            found.setdefault(f"concentration_{name}", {}).setdefault("", {})[i] = float(value)
    _importances(run, history.get(("head", "gate"), []), found)
    return found


def _importances(run: Run, samples: list[np.ndarray], found: Found) -> None:
    """Means that forget a tenth at each sample."""
    for reader, count in READERS["head"].get(run.name, {}).items():
        recent = samples[0]
        for i, row in enumerate(samples):
            recent = recent + 0.1 * (row - recent)
            for head in range(count):
                sites = found.setdefault("concentration_head_importance", {})
                sites.setdefault(f"{reader}.h{head}", {})[i] = float(recent[head])


def _signals(run: Run, step: Step) -> Signals:
    """What each unit has in one step."""
    update = {name: step.after[name].double() - before.double() for name, before in step.before.items()}
    found: Signals = {}
    for signal, tensors in (("gradient", step.gradients), ("update", update)):
        arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        of_modules: dict[str, list[np.ndarray]] = {}
        for name, array in arrays.items():
            of_modules.setdefault(name.rpartition(".")[0], []).append(array.ravel())
        found["module", signal] = np.array([(np.concatenate(parts) ** 2).mean() for parts in of_modules.values()])
        large = [array.reshape(len(array), -1) for array in arrays.values() if array.ndim > 1]
        spectra = [np.linalg.svd(matrix, compute_uv=False) ** 2 / matrix.size for matrix in large]
        found["direction", signal] = np.concatenate(spectra)
        for unit, models in READERS.items():
            readers = models.get(run.name, {}).items()
            rows = [_energies(run, arrays[f"{name}.weight"], name, count) for name, count in readers]
            found |= {(unit, signal): np.concatenate(rows)} if rows else {}
    for unit, models in READERS.items():
        rows = [gates(run, step, name, count) for name, count in models.get(run.name, {}).items()]
        found |= {(unit, "gate"): np.concatenate(rows)} if rows else {}
    return found


def _energies(run: Run, array: np.ndarray, name: str, count: int) -> np.ndarray:
    """Mean squares of the columns that read each unit."""
    by_inputs = array if run.name == "GPT-2" and "decoder" in name else array.T
    return np.array([(block**2).mean() for block in np.split(by_inputs, count)])


def gates(run: Run, step: Step, name: str, count: int) -> np.ndarray:
    """Size of the loss's derivative by a gate on each unit, multiplied into what the layer reads."""
    module = run.at(step.before)
    gate = torch.ones(count, requires_grad=True)

    def multiply(layer: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0] * gate.repeat_interleave(inputs[0].shape[-1] // count),)

    module.get_submodule(name).register_forward_pre_hook(multiply)
    return torch.autograd.grad(module.loss(step.batch), gate)[0].abs().double().numpy()


def _of_a_signal(unit: str, signal: str, samples: list[np.ndarray]) -> dict[str, float]:
    now, start, earlier = samples[-1], samples[0], samples[:-1]
    found = inequality(now) | {f"{name}_start": value for name, value in inequality(start).items()}
    if unit != "direction":
        before = np.sum(earlier, 0) if earlier else np.full_like(now, np.nan)
        found |= {"matthew_slope": _slope(before, now), "rank_persistence": _persistence(before, now)}
    if signal == "gate":
        size = max(1, int(np.ceil(0.2 * len(now) - 1e-9)))
        one, other = (set(np.argsort(-row)[:size]) for row in (now, start))
        found["overlap_start"] = len(one & other) / len(one | other)
        found["overlap_chance"] = _mean_overlap(len(now), size)
    return found


def inequality(x: np.ndarray) -> dict[str, float]:
    """By pairs, by sorting, by sums."""
    n, p = len(x), x / x.sum()
    pairs = sum(abs(one - other) for one in p for other in p)
    falling = np.sort(p)[::-1]
    tenth = np.interp(0.1 * n, np.arange(n + 1), np.concatenate([[0], falling.cumsum()]))
    k = int(0.1 * n)
    spread = np.log(falling[:k] / falling[k]).mean() if k >= 5 else np.nan
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum() / np.log(n)
    hill = 1 / spread if spread > 1e-3 else np.nan
    found = {"gini": pairs / (2 * n), "top_share": tenth, "participation_ratio": 1 / (n * (p**2).sum())}
    return found | {"entropy": entropy, "hill_exponent": hill}


def _slope(before: np.ndarray, now: np.ndarray) -> float:
    there = (before > 0) & (now > 0)
    if there.sum() < 3 or np.log(before[there]).std() <= 0.01:
        return np.nan
    return float(linregress(np.log(before[there]), np.log(now[there])).slope)


def _persistence(before: np.ndarray, now: np.ndarray) -> float:
    return float(spearmanr(before, now).statistic) if len(now) >= 3 and not np.isnan(before).any() else np.nan


def _mean_overlap(n: int, size: int) -> float:
    """Over all pairs of sets."""
    ways = {both: comb(size, both) * comb(n - size, size - both) for both in range(size + 1)}
    return sum(way * both / (2 * size - both) for both, way in ways.items()) / sum(ways.values())


def _magnitudes(step: Step) -> np.ndarray:
    return np.concatenate([np.abs(tensor.numpy()).ravel() for tensor in step.before.values() if tensor.ndim > 1])


def masks(samples: list[np.ndarray]) -> dict[str, float]:
    """Sets of the largest weights, now against those before."""
    now, start = _of_weights(samples[-1]), _of_weights(samples[0])
    found = now | {f"{name}_start": value for name, value in start.items()}
    for density in DENSITIES:
        kept = [_mask(sample, density) for sample in samples]
        found |= {f"mask_{name}_{density:g}": value for name, value in _of_masks(kept, density).items()}
    return found


def _mask(magnitudes: np.ndarray, density: float) -> np.ndarray:
    least = np.sort(magnitudes)[::-1][max(1, round(density * len(magnitudes))) - 1]
    return magnitudes >= least


def _of_masks(kept: list[np.ndarray], density: float) -> dict[str, float]:
    now, last, chance = kept[-1], len(kept) - 1, 2 * density * (1 - density)
    hamming = [float((now != mask).mean()) for mask in kept]
    jaccard = [(now & mask).sum() / (now | mask).sum() for mask in kept]
    settled = np.nan
    if last >= 4 and hamming[0] > 0.02 * chance:
        settled = max(hamming[last // 2 : -1]) / hamming[0]
    return {
        "hamming": hamming[-2] if last else np.nan,
        "hamming_start": hamming[0],
        "hamming_chance": chance,
        "jaccard": jaccard[-2] if last else np.nan,
        "jaccard_start": jaccard[0],
        "jaccard_chance": density / (2 - density),
        "early_bird": settled,
    }


def _of_weights(magnitudes: np.ndarray) -> dict[str, float]:
    rising = np.sort(magnitudes.astype(np.float64))
    n = len(rising)
    # The area between the Lorenz curve and the diagonal, twice.
    lorenz = rising.cumsum() / rising.sum()
    gini = 1 - (2 * lorenz.sum() - 1) / n
    gone = ((rising**2).cumsum() <= 0.01 * (rising**2).sum()).mean()
    return {"weight_gini": gini, "weight_sparsity_0.99": float(gone)}
