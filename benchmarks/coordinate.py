"""Networks of any width in standard parametrisation and in muP, for `lightning-lowrank coordinate-check`, and the
tables of all, which are those of `docs/evidence/coordinate-check.md`.

    python -m benchmarks.coordinate --widths 64,128,256,512
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.char_transformer import source_code
from lightning_lowrank.analysis.coordinates import Power, powers
from lightning_lowrank.analysis.widths import runs, widths_of

RATE, HEADS, DEPTH, LENGTH, BATCH = 0.01, 4, 2, 32, 16
# Where muP and standard parametrisation are the same.
WIDTH = 64


class Task(NamedTuple):
    """What the command expects."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor]]
    loss: Any


class Block(nn.Module):
    """Attention and an MLP, normalised before."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A decoder of characters."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, scale) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight
        return self.head(self.norm(self.blocks(x)))


def mlp(width: int) -> nn.Sequential:
    """Two hidden layers, on digits."""
    sizes = [(64, width), (width, width), (width, 10)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@cache
def digits() -> list[tuple[Tensor, Tensor]]:
    """Four batches."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.tensor(images[:512] / 16, dtype=torch.float32)
    return list(zip(rows.split(128), torch.tensor(labels[:512]).split(128), strict=True))


@cache
def text() -> list[tuple[Tensor, Tensor]]:
    """Four batches of characters, and the next one of each."""
    letters = torch.tensor([ord(letter) % 128 for letter in source_code()[: 4 * BATCH * (LENGTH + 1)]])
    cut = letters.view(4, BATCH, LENGTH + 1)
    return [(one[:, :-1], one[:, 1:]) for one in cut]


def mlp_standard(width: int) -> Task:
    """One rate for all, entries of variance 1 over the inputs."""
    return task(mlp(width), digits())


def mlp_mup(width: int) -> Task:
    """Table 3 of Tensor Programs V, for Adam."""
    return task(mlp(width), digits(), narrow=mlp(WIDTH))


def transformer_standard(width: int) -> Task:
    """As `mlp_standard`, with the usual scale of attention."""
    return task(Transformer(width, (width / HEADS) ** -0.5), text())


def transformer_mup(width: int) -> Task:
    """As `mlp_mup`, with scores over the width of a head."""
    scale = math.sqrt(WIDTH / HEADS) / (width / HEADS)
    return task(Transformer(width, scale), text(), narrow=Transformer(WIDTH, scale))


def task(module: nn.Module, batches: list[tuple[Tensor, Tensor]], narrow: nn.Module | None = None) -> Task:
    """Adam on the cross-entropy; in muP, by how many times as many inputs a layer has as in a narrow network."""
    linear, others = _linear(module), _linear(narrow or module)
    groups: list[dict[str, Any]] = []
    for layer, other in zip(linear, others, strict=True):
        ratio = layer.in_features / other.in_features
        nn.init.normal_(layer.weight, std=(layer.in_features * (ratio if layer is linear[-1] else 1.0)) ** -0.5)
        groups.append({"params": [layer.weight], "lr": RATE / ratio})
    known = {id(layer.weight) for layer in linear}
    rest = [p for p in module.parameters() if id(p) not in known]
    groups += [{"params": rest, "lr": RATE}] if rest else []
    return Task(module, torch.optim.Adam(groups), batches, loss)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of classes or characters."""
    logits = module(batch[0])
    return cross_entropy(logits.flatten(0, -2), batch[1].flatten())


CASES = ("mlp_standard", "mlp_mup", "transformer_standard", "transformer_mup")


def row(name: str, found: dict[str, Power]) -> str:
    """Of one layer, in Markdown."""
    cells = [f"{one.exponent:+.2f} ({one.error:.2f})" if math.isfinite(one.exponent) else "-" for one in found.values()]
    return f"| `{name}` | {found['own'].verdict} | " + " | ".join(cells) + " |"


def main(widths: str = "64,128,256,512", steps: int = 5, seeds: int = 3) -> None:
    """Print a table for each network and parametrisation: powers of the width, with their standard errors.

    Args:
        widths: With commas between.
        steps: Of each run.
        seeds: Runs of each width.
    """
    for case in CASES:
        known = powers(runs(f"benchmarks.coordinate:{case}", widths_of(widths), steps=steps, seeds=seeds))
        print(f"\n### {case}\n\n| layer | verdict | " + " | ".join(next(iter(known.values()))) + " |")
        print("|---" * 9 + "|")
        for name, found in known.items():
            print(row(name, found))


if __name__ == "__main__":
    auto_cli(main)
