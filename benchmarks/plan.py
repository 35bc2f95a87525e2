"""What `lightning-lowrank plan` says beside what trainings measure, on this machine, one thread.

    python -m benchmarks.plan --calibrate cpu    # writes the table of this class of devices, then checks
    python -m benchmarks.plan                    # checks against what was written
    python -m benchmarks.plan --growth true      # cost against side, layers, parameters and processes

None of the five trainings that are checked is among those that the table is made from. Times are of the processor.
"""

import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu import GPT
from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import RankMonitor
from lightning_lowrank.analysis.planning.counting import Counting, counted
from lightning_lowrank.analysis.planning.devices import Device, devices, write
from lightning_lowrank.analysis.planning.plan import PASSES, plan_of, planned
from lightning_lowrank.maths.spectra.decompose import decompose

Make = Callable[[], tuple[nn.Module, Tensor]]
EVERY, STEPS = 6, 48
SIDES, SKETCHED = (8, 16, 32, 64, 128, 256, 512, 1024, 1400), (1600, 2048, 3072)


class Classified(L.LightningModule):
    """A net with a cross entropy, of the last axis of what it gives."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Characters(nn.Module):
    """Two layers of an LSTM."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(100, width), nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def layers(*widths: int) -> nn.Sequential:
    """Linear layers between those widths."""
    return nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())))


def dense(rows: int, *widths: int) -> tuple[nn.Module, Tensor]:
    """A classifier of vectors, and a batch."""
    return Classified(layers(*widths)), torch.zeros(rows, widths[0])


def convolutions(rows: int, side: int, *channels: int) -> tuple[nn.Module, Tensor]:
    """A classifier of square images, and a batch."""
    parts = [part for a, b in pairwise(channels) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    head = nn.Linear(channels[-1] * side**2, 10)
    return Classified(nn.Sequential(*parts, nn.Flatten(), head)), torch.zeros(rows, channels[0], side, side)


def demo(rows: int, **sizes: int) -> tuple[nn.Module, Tensor]:
    """The demo's transformer, and a batch."""
    return CharTransformer(vocabulary=100, **sizes), torch.zeros(rows, 64, dtype=torch.long)


def small_gpt(rows: int, **sizes: int) -> tuple[nn.Module, Tensor]:
    """GPT-2's shape, and a batch."""
    return GPT(length=64, **sizes), torch.zeros(rows, 64, dtype=torch.long)


def mlp() -> tuple[nn.Module, Tensor]:
    """On digits."""
    return dense(128, 64, 128, 128, 10)


def conv_net() -> tuple[nn.Module, Tensor]:
    """On digits."""
    return convolutions(128, 8, 1, 16, 32, 64)


def characters() -> tuple[nn.Module, Tensor]:
    """The demo's transformer."""
    return demo(16)


def gpt() -> tuple[nn.Module, Tensor]:
    """GPT-2's shape, a small one."""
    return small_gpt(8, depth=4, width=256, vocabulary=2000)


def lstm() -> tuple[nn.Module, Tensor]:
    """On characters."""
    return Classified(Characters()), torch.zeros(16, 64, dtype=torch.long)


def noise(make: Make) -> TensorDataset:
    """Random inputs and classes."""
    like = make()[1]
    return TensorDataset(torch.randn(4 * len(like), *like.shape[1:]), torch.randint(8, (4 * len(like),)))


def digits(shape: Sequence[int]) -> TensorDataset:
    """Handwritten."""
    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32).view(-1, *shape) / 16
    return TensorDataset(images, torch.tensor(found.target))


def text() -> TensorDataset:
    """Windows of the standard library."""
    return TensorDataset(standard_library()[:2000])


def pairs() -> TensorDataset:
    """The same, each character with the next."""
    windows = standard_library()[:2000]
    return TensorDataset(windows[:, :-1], windows[:, 1:])


TRAININGS: dict[str, tuple[Make, Callable[[], TensorDataset]]] = {
    "MLP on digits": (mlp, partial(digits, (64,))),
    "conv net on digits": (conv_net, partial(digits, (1, 8, 8))),
    "char transformer": (characters, text),
    "GPT-2-like": (gpt, text),
    "LSTM on characters": (lstm, pairs),
}
# What the constants of a class of devices are fitted to.
ON_NOISE: list[Make] = [
    partial(dense, 32, 8, 8),
    partial(dense, 32, *(16,) * 3),
    partial(dense, 64, *(16,) * 25),
    partial(dense, 64, *range(8, 56, 3)),
    partial(dense, 512, *(64,) * 13),
    partial(dense, 512, *(200,) * 7),
    partial(dense, 512, 320, 640, 320, 640, 320),
    partial(dense, 512, 96, 3000, 96),
    partial(dense, 512, *(1024,) * 4),
    partial(convolutions, 32, 16, 3, 8, 8),
    partial(convolutions, 32, 16, 3, 32, 64, 64),
    partial(convolutions, 64, 8, *(8,) * 7),
    partial(convolutions, 64, 14, 1, 48, 48),
]
ON_TEXT: list[Make] = [
    partial(demo, 32, depth=2, width=64),
    partial(demo, 8, depth=3, width=192, heads=6),
    partial(small_gpt, 16, depth=2, width=128, vocabulary=1000),
    partial(small_gpt, 4, depth=2, width=384, vocabulary=500),
]
FITTED: list[tuple[Make, Callable[[], TensorDataset]]] = [
    *((make, partial(noise, make)) for make in ON_NOISE),
    *((make, text) for make in ON_TEXT),
]


class Marks(L.Callback):
    """Notes when steps begin."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.process_time())

    def on_train_end(self, *_: Any) -> None:
        self.at.append(time.process_time())


def measured(module: nn.Module, data: TensorDataset, batch_size: int) -> tuple[float, float]:
    """Milliseconds of a sample and of a step, of a training that is watched every few steps."""
    marks = Marks()
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=STEPS,
            max_epochs=-1,
            callbacks=[marks, RankMonitor(every_n_steps=EVERY)],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size, shuffle=True, drop_last=True))  # type: ignore[arg-type]
    steps = 1000 * np.diff(marks.at)
    due = np.arange(len(steps)) % EVERY == 0
    # The first sample warms up.
    step = median(steps[EVERY:][~due[EVERY:]])
    return median(steps[EVERY:][due[EVERY:]]) - step, step


def check(device: str) -> Table:
    """What is predicted of five trainings beside what they measure."""
    table = Table(title=f"Predicted and measured: {device}, one thread, {STEPS // EVERY - 1} samples each")
    headings = ("training", "sample, ms", "predicted", "times", "step, ms", "predicted", "times")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "training" else "right")
    worst_sample = worst_step = 1.0
    for name, (make, data) in TRAININGS.items():
        said = planned(f"benchmarks.plan:{make.__name__}", device=device)
        assert said.sample_ms is not None
        assert said.step_ms is not None
        torch.manual_seed(0)
        module, like = make()
        sample, step = measured(module, data(), len(like))
        worst_sample = max(worst_sample, said.sample_ms / sample, sample / said.sample_ms)
        worst_step = max(worst_step, said.step_ms / step, step / said.step_ms)
        values = (sample, said.sample_ms, said.sample_ms / sample, step, said.step_ms, said.step_ms / step)
        table.add_row(name, *(f"{value:.3g}" for value in values))
    table.caption = f"a sample is at most {worst_sample:.2f} times off, a step {worst_step:.2f} times"
    return table


def timed(job: Callable[[], object]) -> float:
    """Seconds, the median of some."""
    begin = time.process_time()
    taken: list[float] = []
    while len(taken) < 3 or (time.process_time() - begin < 0.3 and len(taken) < 30):
        started = time.process_time()
        job()
        taken.append(time.process_time() - started)
    return median(taken)


def rates() -> Iterator[tuple[int, float, float]]:
    """Sides, and flops a second of Gram products and of eigenvalues."""
    for side in SIDES:
        num = max(1, min(32, 2**20 // side**2))
        square, wide = (torch.randn(num, side, side * times) for times in (1, 5))
        once, more = (timed(partial(decompose, [m], "values")) for m in (square, wide))
        products, eigenvalues = parts(once, more)
        yield side, num * 2 * side**3 / products, num * 4 / 3 * side**3 / eigenvalues


def parts(once: float, more: float) -> tuple[float, float]:
    """Seconds of the Gram products and of the eigenvalues in a job, from those of a job with five times the products.

    Each is at least a twentieth of the job: other work on the machine may make the short job the longer one.
    """
    products = max((more - once) / 4, once / 20)
    return products, max(once - products, once / 20)


def sketches() -> Iterator[tuple[int, float]]:
    """Sides, and flops a second of a sketch."""
    for side in SKETCHED:
        matrix = torch.randn(side, side)
        said = planned_of(torch.Size((side, side)))
        yield side, said / timed(partial(decompose, [matrix], "values"))


def multiplying(side: int = 1024) -> float:
    """Flops a second of a large product, forward and backward."""
    one, other = (torch.randn(side, side, requires_grad=True) for _ in range(2))
    ahead = torch.randn(side, side)
    return PASSES * 2 * side**3 / timed(lambda: torch.autograd.grad(one @ other, (one, other), ahead))


def stepping(side: int = 1024) -> float:
    """Nanoseconds of AdamW's step for each entry of a large parameter."""
    parameter = nn.Parameter(torch.randn(side, side))
    parameter.grad = torch.randn(side, side)
    return 1e9 * timed(torch.optim.AdamW([parameter]).step) / side**2


def planned_of(shape: torch.Size) -> float:
    """Flops of one matrix."""
    with counted(Counting()) as counting:
        decompose([torch.empty(shape, device="meta")], "values")
    return counting.flops.total()


def calibrated(what: str) -> Device:
    """The table of this machine."""
    found = list(rates())
    device = Device(
        what,
        [(side, float(round(p))) for side, p, _ in found],
        [(side, float(round(e))) for side, _, e in found],
        [(side, float(round(rate))) for side, rate in sketches()],
        *(0.0,) * 6,
        entry_ns=float(f"{stepping():.4g}"),
        byte_ns=0.0,
        training=float(round(multiplying())),
    )
    of_samples, of_steps = [], []
    for make, data in FITTED:
        torch.manual_seed(0)
        module, like = make()
        sample, step = measured(module, data(), len(like))
        module, like = make()
        said = plan_of(module, (like,), "cpu")
        costs = said.costs
        rest = max(sample - device.decomposing(costs), 0.1 * sample)
        of_samples.append([[1, costs.tensors, costs.sides, 1e-6 * costs.elements], rest, sample])
        assert said.step_flops is not None
        assert said.step_bytes is not None
        # Here, where its other constants are still 0: products and the optimizer.
        known = device.step(said.step_flops, said.step_bytes, said.num_tensors, said.num_parameters)
        of_steps.append([[1, said.num_tensors, 1e-6 * said.step_bytes], max(step - known, 0.1 * step), step])
    sample_ms, matrix_ms, side_ms, element_ns = fitted(of_samples)
    step_ms, parameter_ms, byte_ns = fitted(of_steps)
    return replace(
        device,
        sample_ms=sample_ms,
        matrix_ms=matrix_ms,
        side_ms=side_ms,
        element_ns=element_ns,
        step_ms=step_ms,
        parameter_ms=parameter_ms,
        byte_ns=byte_ns,
    )


def grown() -> Table:
    """Cost against what it grows with, the exponent that fits best, and the one that is expected."""
    table = Table(title="Growth: processor ms on one thread, or what is planned")
    for heading in ("what", "against", "values", "cost", "exponent", "expected"):
        table.add_column(heading)
    for what, against, values, costs, expected in growths():
        exponent = np.polyfit(np.log(values), np.log(costs), 1)[0]
        said = [", ".join(f"{number:.3g}" for number in numbers) for numbers in (values, costs)]
        table.add_row(what, against, *said, f"{exponent:.2f}", expected)
    return table


def growths() -> Iterator[tuple[str, str, list[float], list[float], str]]:
    """What, against what, values, costs, and the exponent that is expected."""

    def solving(side: int) -> float:
        return 1000 * timed(partial(decompose, [torch.randn(side, side)], "values"))

    def sampling(*widths: int) -> float:
        torch.manual_seed(0)
        rows = 64
        data = TensorDataset(torch.randn(4 * rows, widths[0]), torch.randint(widths[-1], (4 * rows,)))
        return measured(Classified(layers(*widths)), data, rows)[0]

    for sides, expected in (([128, 256, 512, 1024], "3, products and eigenvalues"), ([1600, 2263, 3200], "2, sketch")):
        yield "one square matrix", "side", [*map(float, sides)], [solving(side) for side in sides], expected
    counts = [25, 50, 100]
    yield "a sample", "layers of 64", [*map(float, counts)], [sampling(*[64] * (n + 1)) for n in counts], "1"
    widths = [256, 512, 1024]
    costs = [sampling(*[width] * 3) for width in widths]
    yield "a sample", "parameters, 2 layers", [2.0 * width**2 for width in widths], costs, "1.5"
    depths = [6, 12, 24, 48]
    of_depth = [plan_of(GPT(depth=n, width=256), (), "cpu") for n in depths]
    parameters = [float(said.num_parameters) for said in of_depth]
    yield (
        "flops of GPT",
        "parameters, by depth",
        parameters,
        [s.costs.total_flops for s in of_depth],
        "1, less embeddings",
    )
    processes = [2, 4, 8, 16, 32, 64]
    plans = [planned("benchmarks.shapes:gpt2_124m", num_devices=num) for num in processes]
    for what, costs in (
        ("flops of the busiest, GPT-2", [float(said.costs.flops.total()) for said in plans]),
        ("bytes sent, GPT-2", [float(max(said.costs.sent)) for said in plans]),
        ("memory at the peak, GPT-2", [float(said.costs.peak) for said in plans]),
    ):
        yield what, "processes", [*map(float, processes)], costs, "-1 until the largest matrix counts"


def fitted(rows: Sequence[Any]) -> list[float]:
    """Factors of what was counted, none below 0, that have the smallest relative errors."""
    weights = np.array([1 / whole for _, _, whole in rows])
    counted = np.array([counts for counts, _, _ in rows], dtype=float)
    found, _ = nnls(counted * weights[:, None], np.array([target for _, target, _ in rows]) * weights)
    return [float(f"{value:.4g}") for value in found]


def main(calibrate: str | None = None, device: str = "cpu", growth: bool = False) -> None:
    """Print the table.

    Args:
        calibrate: Measure this machine and write it down under this name.
        device: Class to predict by.
        growth: Print how cost grows instead.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console(width=150)
    if growth:
        console.print(grown())
        return
    if calibrate:
        model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
        processor = model.partition(": ")[2] or platform.machine()
        write(calibrate, calibrated(f"{processor}, one thread, torch {torch.__version__}"))
        device = calibrate
        console.print(devices()[calibrate])
    console.print(check(device))


if __name__ == "__main__":
    auto_cli(main)
