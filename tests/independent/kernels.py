"""Tangent kernels from Jacobians that are formed, on the examples that the monitor keeps, after the step."""

import numpy as np
import torch

from tests.independent.curvature import SAMPLES
from tests.independent.dense import Dense
from tests.independent.ranks import Found, energy_rank_of, entropy_rank_of
from tests.independent.trainings import CASES, Run

TOP = 3
Blocks = list[np.ndarray]


def expected(run: Run) -> Found:
    """All quantities of `NTKMonitor`."""
    found: Found = {}
    first: Blocks = []
    last: Blocks = []
    kind, examples = run.case.kernel
    batch = [part[:examples] for part in run.steps[0].batch]
    for i in SAMPLES:
        names = [name for name, _ in run.module.named_parameters()]
        here = Dense.of(run, run.steps[i].after, batch, names)
        blocks = [_kernel(part, kind) for part in np.split(here.jacobian, np.cumsum(here.sizes)[:-1], axis=-1)]
        numbers = _of_kernel(sum(blocks), here.labels, kind) | _of_loss(run, here, i + 1)
        numbers["ntk_velocity"] = 1 - _cosine(sum(blocks), sum(last)) if last else np.nan
        numbers["ntk_distance_to_start"] = 1 - _cosine(sum(blocks), sum(first)) if first else np.nan
        traces = np.array([np.trace(block) for block in blocks])
        for name, value in numbers.items():
            found.setdefault(name, {}).setdefault("", {})[i] = float(value)
        for j, name in enumerate(names):
            turned = 1 - _cosine(blocks[j], last[j]) if last else np.nan
            for quantity, value in (("layer_share", traces[j] / traces.sum()), ("layer_velocity", turned)):
                found.setdefault(f"ntk_{quantity}", {}).setdefault(name, {})[i] = float(value)
        last, first = blocks, first or blocks
    return found


def _kernel(jacobian: np.ndarray, kind: str) -> np.ndarray:
    """Of rows x outputs x parameters."""
    if kind == "full":
        flat = jacobian.reshape(-1, jacobian.shape[-1])
        return flat @ flat.T
    if kind == "class_summed":
        return np.einsum("icp,jcp->ij", jacobian, jacobian)
    summed = jacobian.sum(1) / np.sqrt(jacobian.shape[1])
    return summed @ summed.T


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / norms) if norms else np.nan


def _sizes(values: np.ndarray) -> dict[str, float]:
    """Of eigenvalues that are nowhere negative."""
    falling = np.sort(values.clip(0))[::-1]
    found = {"lambda_max": falling[0], **{f"lambda_{i}": falling[i - 1] for i in range(2, TOP + 1)}}
    found |= {"trace": falling.sum(), "squared_norm": (falling**2).sum()}
    found["participation_ratio"] = falling.sum() ** 2 / (falling**2).sum()
    return found | {"effective_rank_energy": entropy_rank_of(falling), "energy_rank": energy_rank_of(falling)}


def _of_kernel(kernel: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
    values, vectors = np.linalg.eigh(kernel)
    found = {f"ntk_{name}": value for name, value in _sizes(values).items()}
    found["ntk_condition"] = values[-1] / values[-TOP]
    targets = labels.reshape(-1, 1) if kind == "full" else labels
    found["ntk_label_alignment"] = _cosine(kernel, targets @ targets.T)
    rows = len(labels)
    mean = np.kron(np.full((rows, rows), 1 / rows), np.eye(len(kernel) // rows))
    centring = np.eye(len(kernel)) - mean
    centred = centring @ targets
    found["ntk_centred_label_alignment"] = _cosine(centring @ kernel @ centring, centred @ centred.T)
    energies = ((vectors[:, ::-1][:, :TOP].T @ targets) ** 2).sum(1) / (targets**2).sum()
    found |= {f"ntk_label_energy_{j}": energy for j, energy in enumerate(energies, 1)}
    return found | {"ntk_label_energy_in_top": energies.sum(), "ntk_label_energy_in_top_chance": TOP / len(kernel)}


def _of_loss(run: Run, here: Dense, steps: int) -> dict[str, float]:
    root = here.gauss_newton_root
    values = np.linalg.eigvalsh(root @ root.T)[::-1]
    found = {f"ntk_gauss_newton_{name}": value for name, value in _sizes(values).items()}
    group = CASES[run.name].optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    labels = ["", *(f"_{j}" for j in range(2, TOP + 1))]
    if "betas" in group:
        return found
    rate = group["lr"] / (1 - group["momentum"])
    found |= {f"ntk_time_constant{label}": 1 / (rate * values[j]) for j, label in enumerate(labels)}
    return found | {"ntk_modes_learnt": (rate * steps * values >= 1).sum()}
