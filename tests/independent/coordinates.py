"""Inputs of linear layers by plain hooks in a repetition of the step, times their weights before and after it."""

from typing import Any

import numpy as np
import torch
from torch import nn

from tests.independent.ranks import Found
from tests.independent.trainings import Run, Step


def expected(run: Run) -> Found:
    """All quantities of `CoordinateCheckMonitor`."""
    found: Found = {}
    for i, step in enumerate(run.steps):
        for name, x in _inputs(run, step).items():
            old, new = (weights[f"{name}.weight"].double().numpy() for weights in (step.before, step.after))
            if x.shape[1] != old.shape[1] or name.endswith(("c_attn", "c_proj", "c_fc")):  # GPT-2's have rows of inputs
                old, new = old.T, new.T
            output, change = np.linalg.norm(x @ old.T), np.linalg.norm(x @ (new - old).T)
            chance = np.linalg.norm(new - old) * np.linalg.norm(x) / np.sqrt(x.shape[1])
            values = {
                "change": change / output,
                "change_chance": chance / output,
                "size": output / np.sqrt(len(x) * len(old)),
            }
            for quantity, value in values.items():
                found.setdefault(f"coordinate_{quantity}", {}).setdefault(name, {})[i] = float(value)
    return found


def _inputs(run: Run, step: Step) -> dict[str, np.ndarray]:
    module, seen = run.at(step.before), {}

    def keep(name: str) -> Any:
        def hook(layer: Any, inputs: Any, output: Any) -> None:
            seen[name] = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1]).numpy()

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            layer.register_forward_hook(keep(name))
    with torch.no_grad():
        module.net(step.batch[0])
    return seen
