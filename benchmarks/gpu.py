"""What watching costs on a GPU, in under five minutes: trainings of a GPT, spectra by every route, samples.

    python3 -m benchmarks.gpu                                   # writes docs/evidence/gpu.json and gpu.md
    python3 -m benchmarks.gpu --device cpu --small --out /tmp   # a rehearsal of the same code

Times are those of CUDA events, medians of repeats, all in one run. Takes argparse and torch, no network and no extras.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import (
    ConcentrationMonitor,
    CurvatureMonitor,
    DormantUnitsMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NTKMonitor,
    RankMonitor,
)
from lightning_lowrank.maths.spectra.sketch import sketch
from lightning_lowrank.maths.spectra.spectrum import svd

PAGE = Path(__file__).parent.parent / "docs" / "evidence"
Rows = list[dict[str, Any]]
ALL: dict[str, Callable[..., Monitor]] = {
    "rank": RankMonitor,
    "multifractal": MultifractalMonitor,
    "concentration": ConcentrationMonitor,
    "dormant units": DormantUnitsMonitor,
    "anatomy": GradientAnatomyMonitor,
    "curvature": CurvatureMonitor,
    "ntk": NTKMonitor,
}


class Block(nn.Module):
    """Attention by `scaled_dot_product_attention` and an MLP, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(L.LightningModule):
    """GPT-2's shape: 124 M parameters by default. Notes when each of its steps begins."""

    def __init__(self, *, depth: int = 12, width: int = 768, vocabulary: int = 50257, length: int = 512) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        # Wider ones give probabilities below the smallest normal number, which some processors compute slowly.
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        self.marks: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.norm(self.blocks(hidden)) @ self.tokens.weight.T

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.marks.append(mark(self.device))

    def on_train_end(self) -> None:
        self.marks.append(mark(self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.device.type == "cuda")


def mark(device: torch.device) -> Any:
    """A moment of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    """Milliseconds."""
    if isinstance(first, float):
        return 1000 * (last - first)
    last.synchronize()
    return float(first.elapsed_time(last))


def timed(job: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a job."""
    job()
    taken = []
    for _ in range(repeats):
        begin = mark(device)
        job()
        taken.append(between(begin, mark(device)))
    return median(taken)


def steps(monitors: Sequence[Monitor], args: argparse.Namespace, num: int, *, compiled: bool) -> list[float]:
    """Milliseconds of each step of a training, the first left out."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "width": 128, "vocabulary": 512, "length": 64} if args.small else {}
    length, vocabulary = sizes.get("length", 512), sizes.get("vocabulary", 50257)
    module = GPT(**sizes)
    tokens = torch.randint(vocabulary, (num * args.batch, length + 1))
    trainer = L.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=num,
        logger=False,
        callbacks=[*monitors],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if compiled:
        module.blocks.compile()
    trainer.fit(module, DataLoader(TensorDataset(tokens), args.batch))
    return [between(a, b) for a, b in zip(module.marks, module.marks[1:], strict=False)][1:]


def trainings(args: argparse.Namespace) -> Rows:
    """Step times without, with `RankMonitor()` at every tenth step, and with all monitors."""
    rows: Rows = []
    for compiled in (False, *([] if args.small else [True])):
        plain = median(steps([], args, args.steps, compiled=compiled))
        rows.append({"training": "unwatched", "compiled": compiled, "step_ms": plain})
        for name, make in ALL.items():
            with report_trouble(rows, training=name, compiled=compiled):
                monitor = make(every_n_steps=args.steps // 2)
                watched = steps([monitor], args, args.steps, compiled=compiled)
                sample = watched[args.steps // 2 - 1] - median(watched)
                rows.append({"training": name, "compiled": compiled, "sample_ms": sample, "in_steps": sample / plain})
    return rows


@contextmanager
def report_trouble(rows: Rows, **what: Any) -> Iterator[None]:
    """What one part cannot do is a row, and the others go on."""
    try:
        yield
    except Exception as error:  # a driver that is not there, memory that does not suffice
        rows.append({**what, "trouble": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


def routes(matrix: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ways to all singular values."""
    yield "svdvals", lambda: torch.linalg.svdvals(matrix)
    if matrix.device.type == "cuda":
        for driver in ("gesvd", "gesvdj", "gesvda"):
            yield f"svdvals, {driver}", partial(torch.linalg.svdvals, matrix, driver=driver)
    yield "Gram, float64", lambda: svd(matrix)
    yield "Gram, float32", lambda: svd(matrix, dtype=torch.float32)
    generator = torch.Generator(matrix.device).manual_seed(0)
    yield "sketch", lambda: sketch(matrix, generator=generator)


def spectra(args: argparse.Namespace) -> Rows:
    """Milliseconds of one square matrix by every route."""
    rows: Rows = []
    device = torch.device(args.device)
    for side in (64, 128) if args.small else (768, 1024, 2048, 4096, 8192):
        matrix = torch.randn(side, side, device=device) * torch.arange(1, side + 1, device=device)[:, None] ** -0.3
        for route, job in routes(matrix):
            with report_trouble(rows, side=side, route=route):
                repeats = 1 if side > 2048 else 3
                rows.append({"side": side, "route": route, "ms": timed(job, device, repeats)})
    return rows


def table(rows: Rows) -> str:
    """As Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def page(found: dict[str, Any]) -> str:
    """The page of the evidence."""
    parts = [f"## {name}\n\n{table(rows)}" for name, rows in found.items() if isinstance(rows, list)]
    words = f"# On a GPU\n\n`python3 -m benchmarks.gpu` measured these figures on {found['device']}."
    return "\n\n".join([words, *parts]) + "\n"


def main() -> None:
    """Measure everything, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, for a rehearsal")
    parser.add_argument("--steps", type=int, default=20, help="steps of each training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small rehearses")
    warnings.filterwarnings("ignore")
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    found = {"device": f"{name}, torch {torch.__version__}", "Spectra": spectra(args), "Trainings": trainings(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "gpu.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
