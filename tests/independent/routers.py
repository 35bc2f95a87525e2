"""The head of each model taken for a router of two experts a token: its logits by a plain hook, counted in numpy."""

from typing import Any

import numpy as np
import torch

from tests.independent.ranks import Found, law
from tests.independent.trainings import Run, Step

SITE, TOP_K = "net.head", 2


def expected(run: Run) -> Found:
    """All quantities of `RouterMonitor`."""
    found: Found = {}
    for i, step in enumerate(run.steps):
        gate = step.after[f"{SITE}.weight"].double().numpy()
        for name, value in (_of_tokens(_logits(run, step)) | _of_gate(gate)).items():
            found.setdefault(f"router_{name}", {}).setdefault(SITE, {})[i] = float(value)
    return found


def _logits(run: Run, step: Step) -> np.ndarray:
    module, seen = run.at(step.before), []

    def keep(layer: Any, inputs: Any, output: Any) -> None:
        seen.append(output.detach().double().reshape(-1, output.shape[-1]).numpy())

    module.get_submodule(SITE).register_forward_hook(keep)
    with torch.no_grad():
        module.net(step.batch[0])
    return np.concatenate(seen)


def _of_tokens(logits: np.ndarray) -> dict[str, float]:
    """One token at a time; an expert has room for an even share."""
    tokens, experts = logits.shape
    loads, entropy, dropped = np.zeros(experts), 0.0, 0.0
    for row in logits:
        loads[np.argsort(-row)[:TOP_K]] += 1
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        entropy -= (chances * np.log(chances)).sum() / tokens
    room = TOP_K * tokens / experts
    dropped = sum(max(0.0, load - room) for load in loads) / (TOP_K * tokens)
    shares = loads[loads > 0] / loads.sum()
    chance = np.sqrt((experts - TOP_K) / (TOP_K * tokens))
    return {
        "effective_experts": np.exp(-(shares * np.log(shares)).sum()),
        "load_variation": loads.std() / loads.mean(),
        "entropy": entropy,
        "idle_share": (loads == 0).mean(),
        "dropped_share": dropped,
        "effective_experts_chance": experts * np.exp(-(chance**2) / 2),
        "load_variation_chance": chance,
        "experts": experts,
        "tokens": tokens,
    }


def _of_gate(gate: np.ndarray) -> dict[str, float]:
    s, chance = np.linalg.svd(gate, compute_uv=False), law(*sorted(gate.shape))
    return {
        "gate_stable_rank": (s**2).sum() / s[0] ** 2,
        "gate_stable_rank_chance": (chance**2).sum() / (chance**2).max(),
    }
