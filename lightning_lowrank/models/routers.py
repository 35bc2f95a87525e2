"""Routers of mixtures of experts: where they are, and what they say of each token.

Shape letters:  T tokens   E experts   K experts that a token takes
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Classes of transformers, and of whoever names as they do.
ROUTER = re.compile(r"(Router|TopKGating|TopKGate|MoE\w*Gate)$")
# Linear layers beside experts.
GATE = re.compile(r"(gate|router|wg|gating)(_?(proj|layer))?", re.IGNORECASE)
NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "moe_num_experts")
TOP_K = ("top_k", "topk", "num_experts_per_tok", "moe_top_k", "num_selected_experts", "experts_per_token")
# Their first floating output with a column for each expert has the gates, and the logits come after it.
LOGITS_LAST = ("Llama4Router",)
# Scores are sigmoids of logits and not their softmax.
SIGMOID = ("Llama4Router",)


@dataclass(frozen=True)
class Router:
    """A layer that says which experts each token takes.

    Attributes:
        layer: It.
        num_experts: E.
        top_k: K, None where neither it nor the module around says.
        sigmoid: A token's scores are sigmoids, which do not add up to 1.
        gate: Name of its last matrix with E rows, None where there is none.
    """

    layer: nn.Module
    num_experts: int
    top_k: int | None
    sigmoid: bool
    gate: str | None


@dataclass(frozen=True)
class Routing:
    """Decisions of a router for some tokens.

    Attributes:
        logits: As they are.
        assigned: How many of a token's places each expert has: 0 or 1.
        num_places: Places of all tokens together; those that no expert has were dropped.
    """

    logits: Float[Tensor, "T E"]
    assigned: Float[Tensor, "T E"]
    num_places: int


def routers(module: nn.Module) -> list[str]:
    """Names of the routers of a module: by their class and the number of experts that they know, or linear layers that
    are named as gates and stand beside `experts`.
    """
    layers = dict(module.named_modules())
    return [name for name, layer in layers.items() if _is_router(name, layer, layers)]


def router(name: str, module: nn.Module, top_k: int | None = None) -> Router | None:
    """Properties of a router before it runs; None for a layer that cannot be one.

    Args:
        name: Of the layer.
        module: That it is in.
        top_k: K, where the layer does not say.
    """
    layer, around = module.get_submodule(name), module.get_submodule(name.rpartition(".")[0])
    rows = {
        local: parameter.shape[0]
        for local, parameter in layer.named_parameters()
        if not is_lazy(parameter) and parameter.ndim == 2
    }
    said = next(_said((layer, around), NUM_EXPERTS), None)
    count = (said if said in rows.values() else None) or next(reversed(rows.values()), said)
    if not count:
        return None
    gate = next((local for local in reversed(rows) if rows[local] == count), None)
    known = next(_said((layer, around), TOP_K), 1 if "Top1" in type(layer).__name__ else None)
    sigmoid = type(layer).__name__ in SIGMOID or hasattr(layer, "e_score_correction_bias")
    return Router(layer, count, top_k or known, sigmoid, gate and f"{name}.{gate}")


def routing(known: Router, output: Any) -> Routing:
    """Its decisions, from its output.

    Raises:
        ValueError: There are no logits, or nothing says how many experts a token takes.
    """
    parts = [part.detach() for part in _tensors(output)]
    scores = [p for p in parts if p.is_floating_point() and p.ndim > 1 and p.shape[-1] == known.num_experts]
    if not scores:
        raise ValueError(f"a {type(known.layer).__name__} has no output with logits of {known.num_experts} experts")
    logits = scores[-1 if type(known.layer).__name__ in LOGITS_LAST else 0].flatten(0, -2)
    for part in (p for p in parts if not p.is_floating_point() and not p.is_complex() and p.ndim > 1):
        if part.shape[:-1].numel() == len(logits):
            last = part.shape[-1]
            if last == known.num_experts and known.top_k != last:
                return Routing(logits, part.flatten(0, -2).to(logits.dtype), len(logits) * (known.top_k or 1))
            if known.top_k in (None, last):
                return Routing(logits, _assigned(part.flatten(0, -2), logits), len(logits) * last)
    if known.top_k is None:
        raise ValueError(f"{type(known.layer).__name__} does not tell the number of experts per token; give top_k=...")
    chosen = logits.topk(min(known.top_k, known.num_experts), -1).indices
    return Routing(logits, _assigned(chosen, logits), chosen.numel())


def _assigned(chosen: Tensor, logits: Tensor) -> Tensor:
    """Of the chosen numbers; one that no expert has stands for none."""
    num_experts = logits.shape[-1]
    none = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    places = torch.zeros(len(logits), num_experts + 1, dtype=torch.float32, device=logits.device)
    return places.scatter_(-1, none.long(), 1.0)[:, :num_experts]


def _is_router(name: str, layer: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    parent = layers[name.rpartition(".")[0]]
    if ROUTER.search(type(layer).__name__) and next(_said((layer, parent), NUM_EXPERTS), None):
        return True
    beside = any(local == "experts" for local, _ in parent.named_children()) and parent is not layer
    return beside and isinstance(layer, nn.Linear) and GATE.fullmatch(name.rpartition(".")[2]) is not None


def _said(holders: tuple[nn.Module, nn.Module], attributes: tuple[str, ...]) -> Iterator[int]:
    """What a layer, the module around it, or the config of one says."""
    for holder in holders:
        for owner in (holder, getattr(holder, "config", None)):
            values = (getattr(owner, attribute, None) for attribute in attributes)
            yield from (value for value in values if type(value) is int and value > 0)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
