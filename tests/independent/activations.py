"""What comes into blocks and leaves them, and the gradients of both, by plain hooks in a repetition of the step."""

from typing import Any

import numpy as np
from torch import Tensor

from tests.independent.ranks import Found, matrices
from tests.independent.trainings import Run, Step

# Parts that write to the stream of each block, as the models' own papers have them.
BRANCHES = {"GPT-2": ("attn", "mlp"), "Llama": ("self_attn", "mlp")}
# Blocks that follow each other in one list.
PAIRS = {
    "GPT-2": ("net.decoder.h.0.mlp.c_fc", "net.decoder.h.0.mlp.c_proj"),
    "ConvNeXt": ("net.up", "net.down"),
    "LSTM": ("net.hidden", "net.head"),
}


def expected(run: Run) -> Found:
    """All quantities of `ActivationMonitor`."""
    found: Found = {}
    for i, step in enumerate(run.steps):
        for name, sites in (_of_flows(run, step) | _of_weights(run, step)).items():
            for site, value in sites.items():
                found.setdefault(f"activation_{name}", {}).setdefault(site, {})[i] = float(value)
    return found


def _of_flows(run: Run, step: Step) -> dict[str, dict[str, float]]:
    module = run.at(step.before)
    ends: dict[str, tuple[Any, Any]] = {}
    parts: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            for tensor in (inputs[0], left):
                if tensor.requires_grad:
                    tensor.retain_grad()
            ends[name] = inputs[0], left

        return hook

    for name in run.case.blocks:
        module.get_submodule(name).register_forward_hook(keep(name))
    for branch in BRANCHES.get(run.name, ()):
        part = f"{run.case.blocks[0]}.{branch}"
        module.get_submodule(part).register_forward_hook(
            lambda layer, inputs, output, part=part: parts.update(
                {part: _numpy(output[0] if isinstance(output, tuple) else output)}
            )
        )
    module.loss(step.batch).backward()
    found: dict[str, dict[str, float]] = {"branch_ratio": {}}
    for name, (entered, left) in ends.items():
        inner = {part: values for part, values in parts.items() if part.rpartition(".")[0] == name}
        for key, value in _of_block(entered, left, list(inner.values())).items():
            found.setdefault(key, {})[name] = value
        for part, values in inner.items():
            found["branch_ratio"][part] = np.linalg.norm(values) / np.linalg.norm(_numpy(entered))
    for name in ends:
        # The first of those that have one parent.
        first = next(other for other in ends if other.rpartition(".")[0] == name.rpartition(".")[0])
        size = np.sqrt((_numpy(ends[first][0]) ** 2).mean())
        found.setdefault("depth_growth", {})[name] = found["rms"][name] / size
    return found


def _of_block(entered: Tensor, left: Tensor, parts: list[np.ndarray]) -> dict[str, float]:
    before, after = _numpy(entered), _numpy(left)
    rows = after.reshape(-1, after.shape[-1])
    tops, squares, means = np.abs(rows).max(0), (rows**2).mean(0), np.abs(rows).mean(0)
    found = {
        "rms": np.sqrt((rows**2).mean()),
        "growth": np.sqrt((rows**2).mean() / (before**2).mean()),
        "massive_ratio": tops.max() / np.median(tops),
        "massive_count": (tops > 100 * np.median(tops)).sum(),
        "kurtosis": (squares**2).mean() / squares.mean() ** 2,
        "dormant_share": (means <= 0.025 * means.mean()).mean(),
        "gradient_gain": np.linalg.norm(_numpy(entered.grad)) / np.linalg.norm(_numpy(left.grad)),
        "write_ratio": np.nan,
        "write_defect": np.nan,
    }
    if before.shape == after.shape:
        added = np.linalg.norm(after - before)
        found["write_ratio"] = added / np.linalg.norm(before)
        found["write_defect"] = np.linalg.norm(after - before - sum(parts)) / added if parts else np.nan
    return found


def _of_weights(run: Run, step: Step) -> dict[str, dict[str, float]]:
    everything = matrices(run, step.after)
    inside = {n: m for n, m in everything.items() if n.startswith(tuple(f"{block}." for block in run.case.blocks))}
    found = {
        "row_uniformity": {name: _participation((m**2).sum(1)) / len(m) for name, m in inside.items()},
        "row_uniformity_chance": {name: m.shape[1] / (m.shape[1] + 2) for name, m in inside.items()},
    }
    if run.name in PAIRS:
        block, following = PAIRS[run.name]
        left, right = everything[f"{block}.weight"], everything[f"{following}.weight"]
        found["alignment"] = {block: abs(np.linalg.svd(left)[0][:, 0] @ np.linalg.svd(right)[2][0])}
        found["alignment_chance"] = {block: np.sqrt(2 / (np.pi * len(left)))}
    return found


def _participation(energies: np.ndarray) -> float:
    return float(energies.sum() ** 2 / (energies**2).sum())


def _numpy(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.detach().double().numpy()
    return values
