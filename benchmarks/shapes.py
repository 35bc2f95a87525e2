"""Modules that have the matrices of well-known models, for `lightning-lowrank plan`; nothing is computed with them.

lightning-lowrank plan benchmarks.shapes:llama_70b --devices 64 --dtype bf16 --tokens-per-step 8192
python -m benchmarks.shapes    # the tables of the docs
"""

import sys
from functools import partial

from torch import nn

from benchmarks.gpu import GPT
from lightning_lowrank.analysis.planning.plan import Plan, planned
from lightning_lowrank.analysis.planning.telling import count, size

TOKENS = 8192
HEADS: tuple[str, ...] = ("model", "devices", "matrices by route", "flops", "in its steps", "sent", "kept", "peak")
HEADS += ("largest matrix", "exchanges", "s on `cpu`")


class LlamaBlock(nn.Module):
    """Attention with fewer keys and values than queries, and a gated MLP."""

    def __init__(self, width: int, keys: int, hidden: int) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.q, self.k, self.v, self.o = (
            linear(a, b) for a, b in ((width, width), (width, keys), (width, keys), (width, width))
        )
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)


class Llama(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, depth: int, width: int, keys: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.RMSNorm(width)
        self.blocks = nn.ModuleList(LlamaBlock(width, keys, hidden) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)


def gpt2_124m() -> nn.Module:
    """GPT-2."""
    return GPT(depth=12, width=768, length=1024)


def gpt2_355m() -> nn.Module:
    """GPT-2 medium."""
    return GPT(depth=24, width=1024, length=1024)


def gpt2_774m() -> nn.Module:
    """GPT-2 large."""
    return GPT(depth=36, width=1280, length=1024)


def gpt2_1558m() -> nn.Module:
    """GPT-2 XL; heads of 64 as in all of them, where the original has 25."""
    return GPT(depth=48, width=1600, length=1024)


def llama_7b() -> nn.Module:
    """Llama 2, 7 B."""
    return Llama(32, 4096, 4096, 11008, 32000)


def llama_70b() -> nn.Module:
    """Llama 3, 70 B."""
    return Llama(80, 8192, 1024, 28672, 128256)


MODELS = (gpt2_124m, gpt2_355m, gpt2_774m, gpt2_1558m, llama_7b, llama_70b)


def main() -> None:
    """Print a row for each model and number of devices."""
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for model in MODELS:
        for num_devices in (1, 8, 64):
            name = f"benchmarks.shapes:{model.__name__}"
            said = planned(name, num_devices=num_devices, dtype="bf16", tokens_per_step=TOKENS)
            print(f"| {' | '.join(cells(model.__name__, said))} |")
            sys.stdout.flush()


def cells(name: str, said: Plan) -> list[str]:
    """One row."""
    costs = said.costs
    sizes = [max(costs.sent), costs.kept, costs.peak, costs.largest]
    return [
        f"`{name}`",
        str(said.num_devices),
        ", ".join(f"{number} {route}" for route, number in costs.matrices.items()),
        count(costs.flops.total()),
        f"{said.in_steps or 0:.2g}",
        *map(size, sizes),
        str(costs.collectives),
        f"{(said.sample_ms or 0) / 1000:.3g}",
    ]


if __name__ == "__main__":
    main()
