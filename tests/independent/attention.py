"""The quantities of `AttentionMonitor`: dense products of each head in numpy, and scores as softmax gets them."""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.independent.multifractal import Drawn
from tests.independent.ranks import Found
from tests.independent.trainings import Run, Step

DRAWS = 24
RANKS = ("stable_rank", "effective_rank_energy")


def expected(run: Run) -> Found:
    """By head, of each step; nothing of models without attention."""
    found: Found = {}
    if run.name not in ("GPT-2", "Llama"):
        return found

    def note(quantity: str, site: str, step: int, value: "float | Drawn") -> None:
        found.setdefault(quantity, {}).setdefault(site, {})[step] = value  # type: ignore[assignment]

    layer = "net.decoder.h.0.attn" if run.name == "GPT-2" else "net.decoder.layers.0.self_attn"
    for i, step in enumerate(run.steps):
        before, after = (heads(run.name, layer, weights) for weights in (step.before, step.after))
        for h, ((q, k), (new_q, new_k)) in enumerate(zip(before, after, strict=True)):
            dq, dk = new_q - q, new_k - k
            for name, update in (("qk_update", dq.T @ k + q.T @ dk), ("qk_update_second_order", dq.T @ dk)):
                for rank, value, chance in zip(RANKS, ranks(update), drawn(*q.shape)[name], strict=True):
                    note(f"{name}_{rank}", f"{layer}.h{h}", i, value)
                    note(f"{name}_{rank}_chance", f"{layer}.h{h}", i, chance)
        for quantity, values in of_scores(scores(run, step)).items():
            for h, value in enumerate(values):
                note(quantity, f"{layer}.h{h}", i, float(value))
        tops = [row[i] for row in found["attention_max_logit"].values()]
        note("attention_largest_logit", "", i, max(tops))
    return found


def heads(name: str, layer: str, weights: dict[str, Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Queries and keys, cut out by hand: two heads of GPT-2; four of queries and two of keys of Llama."""
    if name == "GPT-2":
        fused = weights[f"{layer}.c_attn.weight"].double().numpy()
        return [(fused[:, 8 * h : 8 * h + 8].T, fused[:, 16 + 8 * h : 24 + 8 * h].T) for h in range(2)]
    q, k = (weights[f"{layer}.{part}_proj.weight"].double().numpy() for part in "qk")
    return [(q[4 * h : 4 * h + 4], k[4 * (h // 2) : 4 * (h // 2) + 4]) for h in range(4)]


def ranks(matrix: np.ndarray) -> tuple[float, float]:
    """Stable rank, and the exponential of the entropy of the energies."""
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    shares = energies / energies.sum()
    shares = shares[shares > 0]
    return float(1 / shares.max()), float(np.exp(-(shares * np.log(shares)).sum()))


@cache
def drawn(width: int, inputs: int) -> dict[str, list[Drawn]]:
    """Of heads of independent Gaussian entries."""
    random = np.random.default_rng(1)
    found: dict[str, list[tuple[float, float]]] = {"qk_update": [], "qk_update_second_order": []}
    for _ in range(DRAWS):
        q, k, dq, dk = random.standard_normal((4, width, inputs))
        found["qk_update"].append(ranks(dq.T @ k + q.T @ dk))
        found["qk_update_second_order"].append(ranks(dq.T @ dk))
    return {
        name: [
            Drawn(float(mean), float(spread)) for mean, spread in zip(np.mean(pairs, 0), np.std(pairs, 0), strict=True)
        ]
        for name, pairs in found.items()
    }


def scores(run: Run, step: Step) -> np.ndarray:
    """What the module's own softmax gets, `[batch, heads, queries, keys]`."""
    module, seen, own = run.at(step.before), [], F.softmax

    def softmax(scores: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(scores.double().numpy())
        return own(scores, *args, **options)  # type: ignore[arg-type]

    F.softmax = softmax  # type: ignore[assignment]
    try:
        with torch.no_grad():
            module.net(step.batch[0])
    finally:
        F.softmax = own  # type: ignore[assignment]
    return seen[0]


def of_scores(scores: np.ndarray) -> dict[str, np.ndarray]:
    """By head: the least numbers of a mask close keys behind the query."""
    is_open = np.tri(scores.shape[-1], dtype=bool)
    logits = np.where(is_open, scores, -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.where(is_open, shares, 1.0))).sum(-1)
    count, num_heads = is_open.sum(-1), scores.shape[1]
    return {
        "attention_max_logit": logits.max((0, 2, 3)),
        "attention_entropy": entropy.mean((0, 2)),
        "attention_sink_share": shares[..., 0].mean((0, 2)),
        "attention_entropy_chance": np.full(num_heads, np.log(count).mean()),
        "attention_sink_share_chance": np.full(num_heads, (1 / count).mean()),
        "attention_rows": np.full(num_heads, float(scores.shape[0] * scores.shape[2])),
    }
