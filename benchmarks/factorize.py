"""What `LowRankFactorize` learns and saves: losses at equal parameters, multiply-adds, bytes and time of a step.

python -m benchmarks.factorize             # what a step costs
python -m benchmarks.factorize --learn     # digits and char transformer, against dense and narrower dense nets
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import mean, median, stdev
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.galore import Transformer
from examples.char_transformer import CONTEXT, frequent_characters, source_code
from lightning_lowrank import LowRankFactorize

SHARES = (0.5, 0.25)
SILENT: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
    "accelerator": "cpu",
}
# What is compared, each with its options.
WAYS: dict[str, dict[str, Any]] = {
    "factors": {},
    "factors, spectral": {"init": "spectral"},
    "factors, soft": {"orthogonality": "soft", "weight": 1e-2},
    "factors, Stiefel": {"orthogonality": "stiefel"},
}


class Digits(L.LightningModule):
    """A convolutional net on digits of 8 x 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.view(-1, 1, 8, 8))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def num_parameters(module: nn.Module) -> int:
    """Of a module."""
    return sum(p.numel() for p in module.parameters())


def ranks(module: nn.Module, share: float, total: int) -> dict[str, int]:
    """A rank for each matrix inside, so that the module has a share of the parameters of the dense one."""
    inner = [name for name, p in module.named_parameters() if p.ndim > 1 and "blocks" in name]
    inner = inner or [
        name for name, p in module.named_parameters() if p.ndim > 1 and p.shape[0] > 10 and p[0].numel() > 9
    ]
    named = {name: p.flatten(1).shape for name, p in module.named_parameters() if name in inner}
    rest = total - sum(m * n for m, n in named.values())
    of_matrices = (share * total - rest) / (total - rest)
    return {name: max(1, int(of_matrices * m * n / (m + n + 1))) for name, (m, n) in named.items()}


def narrower(make: Callable[[int], nn.Module], most: int, step: int) -> nn.Module:
    """The widest dense module of at most so many parameters."""
    width = step
    while num_parameters(make(width + step)) <= most:
        width += step
    return make(width)


def transformer(width: int = 64) -> Transformer:
    """Two blocks, at a rate at which the dense one learns well."""
    return Transformer(5e-3, depth=2, width=width)


@cache
def texts() -> tuple[TensorDataset, Tensor]:
    """To learn from, and held out."""
    index = frequent_characters()
    tokens = torch.tensor([index[character] for character in source_code()[:1_500_000] if character in index])
    text = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    return TensorDataset(text[128:]), text[:128]


@cache
def images() -> tuple[TensorDataset, TensorDataset]:
    """Digits to learn from, and held out."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    return TensorDataset(pixels[:1200], labels[:1200]), TensorDataset(pixels[1200:], labels[1200:])


def of_text(module: L.LightningModule, callbacks: list[L.Callback], steps: int) -> float:
    """Loss on held-out text, in nats a character."""
    text, held_out = texts()
    train(module, text, callbacks, steps)
    losses = [
        nn.functional.cross_entropy(module(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()) for x in held_out.split(64)
    ]
    return mean(map(float, losses))


def of_digits(module: L.LightningModule, callbacks: list[L.Callback], steps: int) -> float:
    """Percent of held-out digits that are wrong."""
    data, held_out = images()
    train(module, data, callbacks, steps)
    pixels, labels = held_out.tensors
    with torch.no_grad():
        return 100 * (module(pixels).argmax(1) != labels).double().mean().item()


def train(module: L.LightningModule, data: TensorDataset, callbacks: list[L.Callback], steps: int) -> None:
    """For so many steps."""
    loader = DataLoader(data, 32, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, callbacks=callbacks, **SILENT).fit(module, loader)
    module.eval()


TASKS: dict[str, tuple[Callable[..., Any], int, Callable[..., float]]] = {
    "digits, % wrong": (Digits, 1, of_digits),
    "char transformer, nats": (transformer, 4, of_text),
}


def runs(make: Callable[..., Any], step: int, seed: int) -> Iterator[tuple[str, Callable[[], Any], list[L.Callback]]]:
    """Dense, and at each share a narrower dense net and each way to train factors."""
    dense = make()
    total = num_parameters(dense)
    yield "dense", make, []
    for share in SHARES:
        yield f"narrower, {share:.0%}", partial(narrower, make, int(share * total), step), []
        for way, options in WAYS.items():
            rank = ranks(dense, share, total)
            yield f"{way}, {share:.0%}", make, [LowRankFactorize(rank, seed=seed, every_n_steps=10**6, **options)]


def learning(tasks: str, steps: int, seeds: int, console: Console) -> None:
    """Each way at each share, seed by seed, so that what is broken off says something."""
    for task, (make, step, score) in TASKS.items():
        if tasks not in task:
            continue
        found: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for seed in range(seeds):
            for name, build, callbacks in runs(make, step, seed):
                L.seed_everything(seed, verbose=False)
                module = build()
                some = found.setdefault(name, [])
                some.append(score(module, callbacks, steps))
                sizes[name] = num_parameters(module)
                console.print(f"{task} | {name} | {sizes[name]:,} | {mean(some):.3f} | {some}")
        for name, some in found.items():
            spread = f" ± {stdev(some):.3f}" if len(some) > 1 else ""
            console.print(f"| {task} | {name} | {sizes[name]:,} | {mean(some):.3f}{spread} |")


def stack(kind: str, width: int, depth: int) -> nn.Module:
    """Linear layers, dense or factorized at an eighth of the full rank."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    net = nn.Sequential(*layers)
    if kind != "dense":
        LowRankFactorize(rank=width // 8, match="*.weight", mode=kind).prepare(net)  # type: ignore[arg-type]
    return net


def stepping(net: nn.Module, x: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    return step, optimizer


def kept_for_backward(net: nn.Module, x: Tensor) -> int:
    """Bytes of what autograd keeps of a forward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x).square().mean()
    return sum(seen.values())


def costs(width: int, depth: int, rows: int, times: int) -> Table:
    """Multiply-adds, bytes and time of a step."""
    x = torch.randn(rows, width)
    title = f"{depth} layers of {width} x {width} at rank {width // 8}, {rows} rows, AdamW"
    table = Table("", "numbers", "multiply-adds", "kept, MB", "optimizer, MB", "peak, MB", "step, ms", title=title)
    nets = {kind: stack(kind, width, depth) for kind in ("dense", "module", "parametrize")}
    steps = {kind: stepping(net, x) for kind, net in nets.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in nets}
    for _ in range(times + 1):
        for kind, (step, _optimizer) in steps.items():
            begun = time.process_time()
            step()
            seconds[kind].append(1000 * (time.process_time() - begun))
    for kind, net in nets.items():
        step, optimizer = steps[kind]
        with FlopCounterMode(display=False) as counter:
            net(x).square().mean().backward()
        state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
        tracker = MemTracker()
        tracker.track_external(net, optimizer)
        with tracker:
            step()
        peak = sum(kept["Total"] for kept in tracker.get_tracker_snapshot("peak").values())
        table.add_row(
            kind,
            f"{num_parameters(net):,}",
            f"{counter.get_total_flops() / 2e6:,.0f} M",
            f"{kept_for_backward(net, x) / 1e6:.1f}",
            f"{state / 1e6:.1f}",
            f"{peak / 1e6:.1f}",
            f"{median(seconds[kind][1:]):.1f}",
        )
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--task", default="")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(width=200)
    if options.learn:
        learning(options.task, options.steps, options.seeds, console)
    else:
        console.print(costs(512, 4, 128, options.times))
        console.print(costs(512, 4, 1024, options.times))


if __name__ == "__main__":
    main()
