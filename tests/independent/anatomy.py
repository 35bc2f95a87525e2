"""Inputs and output gradients of each layer, heard by plain hooks in a repetition of the step; the split by numpy."""

from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import unfold

from tests.independent.ranks import Found, noise
from tests.independent.trainings import Run, Step

SHARES = ("residue", "interpolant", "spike", "bulk")
# As the documentation has them.
DECIDED, FEWEST_ROWS, LARGEST_DECAY = 0.5, 64, 3.0


def heard(run: Run, step: Step) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Rows that came into each layer, the gradient of the loss in what came out of it, and the loss."""
    module, sides = run.at(step.before), {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D" or getattr(layer, "groups", 2) == 1:
            layer.register_forward_hook(_keep(name, sides))
    loss = module.loss(step.batch)
    loss.backward()
    return {name: _rows(*both) for name, both in sides.items()}, float(loss.detach())


def _keep(name: str, sides: dict[str, Any]) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        sides[f"{name}.weight"] = layer, inputs[0].detach(), output

    return hook


def _rows(layer: Any, inputs: Tensor, output: Tensor) -> tuple[np.ndarray, np.ndarray]:
    signals = output.grad
    assert signals is not None
    if isinstance(layer, nn.Conv2d):
        inputs = unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        signals = signals.flatten(2).mT
    return _matrix(inputs), _matrix(signals)


def _matrix(tensor: Tensor) -> np.ndarray:
    return tensor.double().reshape(-1, tensor.shape[-1]).numpy()


def gradient_of(run: Run, step: Step, name: str) -> np.ndarray:
    """With a row for each output."""
    matrix = step.gradients[name].double().flatten(1).numpy()
    return matrix.T if run.name == "GPT-2" and "decoder" in name else matrix


def expected(run: Run) -> Found:
    """All quantities of `GradientAnatomyMonitor`."""
    found: Found = {}
    tops: dict[str, list[np.ndarray]] = {}
    dominances: dict[str, list[float]] = {}
    for i, step in enumerate(run.steps):
        sides, loss = heard(run, step)
        found.setdefault("anatomy_loss", {}).setdefault("", {})[i] = loss
        for site, (inputs, signals) in sides.items():
            gradient = gradient_of(run, step, site)
            numbers = split(inputs, signals, gradient, 10)
            top = np.linalg.svd(gradient)[2][0]
            before = tops.setdefault(site, [])
            numbers["stability"] = abs(top @ before[-1]) if before else np.nan
            numbers["stability_to_start"] = abs(top @ before[0]) if before else np.nan
            before.append(top)
            dominances.setdefault(site, []).append(numbers["spike_dominance"])
            numbers["phase_shift"] = _shifted(dominances[site])
            for name, value in numbers.items():
                found.setdefault(f"anatomy_{name}", {}).setdefault(site, {})[i] = float(value)
    return found


def _shifted(dominances: list[float]) -> float:
    """Whether the spike rules now, and the residue did before."""
    now = dominances[-1]
    return np.nan if np.isnan(now) else float(now > 0.6 and any(before < 0.4 for before in dominances))


def split(inputs: np.ndarray, signals: np.ndarray, gradient: np.ndarray, num_outputs: int) -> dict[str, float]:
    """What is asked of one layer in one step."""
    rows, width = inputs.shape
    mean, height = inputs.mean(0), gradient.shape[0]
    axes = np.linalg.svd(inputs - mean)[2]
    eigenvalues = np.zeros(min(inputs.shape))
    values = np.linalg.svd(inputs - mean, compute_uv=False) ** 2 / rows
    eigenvalues[: len(values)] = values
    found, is_told = _of_inputs(eigenvalues, rows, width)
    spikes = _spike_basis(mean, eigenvalues, rows, axes[0], is_told)
    k = min(num_outputs, *signals.shape)
    residues = _residue_basis(signals, k)
    found |= _shares(gradient, residues, spikes)
    s = np.linalg.svd(gradient, compute_uv=False)
    many = min(k + 1, *gradient.shape)
    chance = noise(*sorted(gradient.shape)) ** 2
    found |= {"low_rank_share": (s[:many] ** 2).sum() / (s**2).sum(), "low_rank_share_chance": chance[:many].sum()}
    found |= _ranks({"input": np.sqrt(eigenvalues), "signal": _values(signals), "gradient": s})
    found["signals_limit"] = float(found["signal_participation_ratio"] < found["input_participation_ratio"])
    found["horn"] = _horn(inputs, signals)
    found |= _alignment(gradient, spikes, width)
    product = signals.T @ inputs
    factor = (product * gradient).sum() / (product**2).sum()
    found["deviation"] = np.linalg.norm(factor * product - gradient) / np.linalg.norm(gradient)
    found |= {"num_residues": len(residues), "num_spikes": len(spikes), "rows_per_dimension": rows / width}
    assert len(residues) <= height
    return found | {"stability_chance": np.sqrt(2 / (np.pi * width))}


def _values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def _of_inputs(variances: np.ndarray, rows: int, width: int) -> tuple[dict[str, float], bool]:
    """Spike and bulk from the eigenvalues of the covariance, all T of the Gram matrix among them."""
    everything = np.concatenate([variances[1:], np.zeros(max(0, rows - len(variances)))])
    mean = (1 / (everything - variances[0])).sum() / rows
    slope = (1 / (everything - variances[0]) ** 2).sum() / rows
    overlap = np.clip(-mean / (variances[0] * slope), 0, 1)
    own = -1 / mean
    trace = variances[1:].sum() + variances[0] - own
    squares = max((variances[1:] ** 2).sum() - trace**2 / rows, 0)
    decay = _decay(trace**2 / squares, width)
    scale = trace / (np.arange(1, width + 1) ** -decay).sum()
    gap = variances[0] / variances[1]
    is_told = gap >= 1.2 and overlap >= DECIDED
    known = rows >= FEWEST_ROWS and not np.isnan(decay)
    strength = (own - trace / width) / scale
    nu = 0.5 * np.log(strength) / np.log(rows) if known and is_told and strength > 0 else np.nan
    found = {"gap_ratio": gap, "spike_overlap": overlap, "bulk_decay": decay if known else np.nan}
    return found | {"spike_strength": nu}, bool(is_told)


def _decay(rank: float, width: int) -> float:
    """Exponent of the power law that has this participation ratio."""

    def excess(decay: float) -> float:
        law = np.arange(1, width + 1) ** -decay
        return law.sum() ** 2 / (law**2).sum() - rank

    if excess(0.0) <= 0:
        return 0.0
    return np.nan if excess(LARGEST_DECAY) > 0 else float(brentq(excess, 0, LARGEST_DECAY))


def _spike_basis(mean: np.ndarray, variances: np.ndarray, rows: int, first: np.ndarray, is_told: bool) -> np.ndarray:
    spread = np.sqrt(2 * (variances**2).sum()) / variances.sum()
    has_mean = rows * (mean**2).sum() / variances.sum() > 1 + 4 * spread
    directions = [mean] * bool(has_mean) + [first] * is_told
    if not directions:
        return np.zeros((0, len(mean)))
    return np.linalg.qr(np.array(directions).T)[0].T


def _residue_basis(signals: np.ndarray, k: int) -> np.ndarray:
    _, s, axes = np.linalg.svd(signals, full_matrices=False)
    before = (s**2).cumsum() - s**2
    return axes[:k][before[:k] < 0.95 * (s**2).sum()]


def _shares(gradient: np.ndarray, residues: np.ndarray, spikes: np.ndarray) -> dict[str, float]:
    height, width = gradient.shape
    left, right = residues.T @ residues, spikes.T @ spikes
    others = np.eye(height) - left, np.eye(width) - right
    pieces = (left @ gradient @ others[1], left @ gradient @ right, others[0] @ gradient @ right)
    energies = [(piece**2).sum() for piece in (*pieces, others[0] @ gradient @ others[1])]
    k, q = len(residues) / height, len(spikes) / width
    chances = [k * (1 - q), k * q, (1 - k) * q, (1 - k) * (1 - q)]
    shares = [energy / (gradient**2).sum() for energy in energies]
    is_told = q > 0 and k < 1
    found = dict(zip((*SHARES, *(f"{name}_chance" for name in SHARES)), shares + chances, strict=True))
    ruling = shares[0] + shares[2]
    found["spike_dominance"] = shares[2] / ruling if ruling > DECIDED else np.nan
    return {name: value if is_told else np.nan for name, value in found.items()}


def _ranks(sides: dict[str, np.ndarray]) -> dict[str, float]:
    found = {}
    for side, s in sides.items():
        found[f"{side}_stable_rank"] = (s**2).sum() / (s**2).max()
        found[f"{side}_participation_ratio"] = (s**2).sum() ** 2 / (s**4).sum()
    return found


def _horn(inputs: np.ndarray, signals: np.ndarray) -> float:
    product, most = _values(signals.T @ inputs)[:2], _values(signals)[:2] * _values(inputs)[:2]
    return float(np.sqrt(np.prod(product / most)))


def _alignment(gradient: np.ndarray, spikes: np.ndarray, width: int) -> dict[str, float]:
    _, s, axes = np.linalg.svd(gradient, full_matrices=False)
    first = axes[:2][s[:2] > 1e-5 * s[0]]
    few = min(len(first), len(spikes))
    if few == 0:
        return {"alignment": np.nan, "alignment_chance": np.nan}
    return {
        "alignment": ((first @ spikes.T) ** 2).sum() / few,
        "alignment_chance": max(len(first), len(spikes)) / width,
    }


def dormant(run: Run) -> Found:
    """The quantities of `DormantUnitsMonitor`: means of magnitudes by unit."""
    found: Found = {"dormant_share": {}, "dormant_inactive": {}}
    for i, step in enumerate(run.steps):
        for name, rows in _activations(run, step).items():
            means = rows.mean(0)
            for quantity, share in (("share", means <= 0.025 * means.mean()), ("inactive", rows.max(0) == 0)):
                found[f"dormant_{quantity}"].setdefault(name, {})[i] = float(share.mean())
    return found


def _activations(run: Run, step: Step) -> dict[str, np.ndarray]:
    """Magnitudes, a row for each place."""
    module, seen = run.at(step.before), {}

    def keep(name: str) -> Any:
        return lambda layer, inputs, output: seen.update({name: output.detach()})

    for name in run.case.activations:
        module.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        module.net(step.batch[0])
    return {name: output.double().flatten(0, -2).abs().numpy() for name, output in seen.items()}
