"""Draw an example for the page of each monitor that no script in `examples/` draws, from real trainings: those of the
gallery, and of `benchmarks.faults`, where a fault begins at the dotted line.

    python -m docs.images.draw_monitors

About three minutes on one processor, unless the runs are there already.
"""

import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.faults.trainings import BEGIN, CASES, train
from lightning_lowrank import (
    AttentionMonitor,
    NoiseScaleMonitor,
    RepresentationMonitor,
    RouterMonitor,
    TrajectorySubspace,
)
from lightning_lowrank.analysis import widths

IMAGES = Path(__file__).parent
GALLERY = IMAGES.parent / "gallery" / "runs"
WIDTHS = (32, 64, 128, 256)
# How the GPT of the faults puts out queries, keys and values.
LAYOUT = {"*.qkv.weight": "qkv heads d"}
BLOCKS = "net.blocks.?"
# What watches each training.
WATCHED: dict[str, Callable[[], list[L.Callback]]] = {
    "GPT": lambda: [
        AttentionMonitor(every_n_steps=10, per_site=True, layouts=LAYOUT),
        NoiseScaleMonitor(every_n_steps=10, detail="all"),
        RepresentationMonitor(every_n_steps=10, per_site=True, detail="all", match=BLOCKS),
        TrajectorySubspace(every_n_steps=10, detail="all"),
    ],
    "experts": lambda: [RouterMonitor(every_n_steps=10, per_site=True, detail="all")],
    "experts, one dead": lambda: [RouterMonitor(every_n_steps=10, per_site=True, detail="all")],
}


class Curve(NamedTuple):
    """Steps, and a number at each."""

    steps: list[int]
    values: list[float]


Run = dict[str, Curve]


def watched(what: str, folder: Path) -> Run:
    """Train it, unless that is done, and read all scalars back."""
    done = folder / what
    if not done.exists():
        case = next(case for case in CASES if case.what == what)
        L.seed_everything(0, verbose=False)
        logger = TensorBoardLogger(folder, name="", version=f"{what}, unfinished")
        shutil.rmtree(logger.log_dir, ignore_errors=True)
        train(case.make(), case.steps, *WATCHED[what](), logger=logger)
        Path(logger.log_dir).rename(done)
    return scalars(done)


def scalars(folder: Path) -> Run:
    """All of a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: Curve([p.step for p in points], [p.value for p in points]) for tag, points in found.items()}


def sites(run: Run, quantity: str) -> dict[str, Curve]:
    """Of one quantity, by site."""
    return {tag.removeprefix(f"{quantity}/"): curve for tag, curve in run.items() if tag.startswith(f"{quantity}/")}


def draw(panel: Axes, curves: Iterable[Curve], colour: str, label: str, **style: Any) -> None:
    """Lines of one colour, named once."""
    for i, curve in enumerate(curves):
        panel.plot(*curve, color=colour, label=label if i == 0 else None, **style)


def finish(panel: Axes, title: str, y: str, *, log: bool = False, fault: bool = False) -> None:
    """Words, grid and legend."""
    if fault:
        panel.axvline(BEGIN, color="black", linestyle=":", linewidth=1)
    panel.set(title=title, xlabel="optimizer step", ylabel=y, yscale="log" if log else "linear")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def of_pair(panel: Axes, healthy: Run, faulty: Run, quantity: str, fault: str) -> None:
    """All sites of a quantity in both runs."""
    draw(panel, sites(faulty, quantity).values(), "tab:red", fault, linewidth=1, alpha=0.7)
    draw(panel, sites(healthy, quantity).values(), "tab:blue", "healthy", linewidth=1, alpha=0.7)


def of_gallery(panel: Axes, known: dict[str, Run], tag: str, **words: str) -> None:
    """One number of some runs of the gallery, by their colours."""
    for (run, label), colour in zip(words.items(), ("tab:blue", "tab:red", "tab:orange"), strict=False):
        draw(panel, [known[run.replace("_", "-")][tag]], colour, label, marker="o", markersize=3)


def loss(panel: Axes, known: dict[str, Run]) -> None:
    of_gallery(panel, known, "step/loss", healthy="learning rate 0.003", diverged="learning rate 1.0")
    finish(panel, "LossMonitor on two transformers", "loss of the step", log=True)


def activation(panel: Axes, known: dict[str, Run]) -> None:
    of_gallery(panel, known, "activation/rms_median", healthy="learning rate 0.003", diverged="learning rate 1.0")
    finish(panel, "ActivationMonitor on two transformers", "RMS, median over layers", log=True)


def dormant_units(panel: Axes, known: dict[str, Run]) -> None:
    words = {"healthy": "healthy transformer", "diverged": "learning rate 1.0", "dead_units": "MLP, biases of -3"}
    of_gallery(panel, known, "dormant/share_median", **words)
    finish(panel, "DormantUnitsMonitor on three networks", "share of dormant units, median")


def attention(panel: Axes, known: dict[str, Run]) -> None:
    found = sites(known["GPT"], "attention_max_logit")
    for i, (head, curve) in enumerate(found.items()):
        name = head.removeprefix("net.").removesuffix(".h0") if head.endswith(".h0") else None
        panel.plot(*curve, color=plt.get_cmap("viridis")(i / len(found)), label=name, linewidth=1)
    finish(panel, "AttentionMonitor: 16 heads of a GPT", "largest logit")


def noise_scale(panel: Axes, known: dict[str, Run]) -> None:
    run = known["GPT"]
    steps, values = run["noise/scale"]
    errors = np.array(run["noise/scale_error"].values)
    panel.plot(steps, values, color="tab:blue", label="noise scale, with its standard error")
    panel.fill_between(steps, values - errors, values + errors, color="tab:blue", alpha=0.2, linewidth=0)
    draw(panel, [run["noise/examples"]], "black", "batch size of the run", linestyle="--")
    finish(panel, "NoiseScaleMonitor on a GPT", "examples", log=True)


def representation(panel: Axes, known: dict[str, Run]) -> None:
    found = sites(known["GPT"], "representation_effective_rank")
    for i, (block, curve) in enumerate(found.items()):
        panel.plot(
            *curve, color=plt.get_cmap("viridis")(i / len(found)), label=block.removeprefix("net.").removesuffix(".out")
        )
    chance = known["GPT"]["representation/effective_rank_chance_median"]
    draw(panel, [chance], "black", "Gaussian rows", linestyle="--")
    panel.set_ylim(bottom=0)
    finish(panel, "RepresentationMonitor: four blocks of a GPT", "effective rank")


def router(panel: Axes, known: dict[str, Run]) -> None:
    of_pair(panel, known["experts"], known["experts, one dead"], "router_effective_experts", "one expert gets no token")
    draw(panel, [known["experts"]["router/effective_experts_chance_median"]], "black", "random router", linestyle="--")
    finish(panel, "RouterMonitor: four routers of four experts", "effective number of experts", fault=True)


def trajectory(panel: Axes, known: dict[str, Run]) -> None:
    run = known["GPT"]
    draw(panel, [run["trajectory/explained_1"]], "tab:blue", "the run")
    draw(panel, [run["trajectory/explained_1_random_walk"]], "black", "random walk at the same steps", linestyle="--")
    finish(panel, "TrajectorySubspace on a GPT", "variance in the first component")


def coordinate_check(panel: Axes, known: dict[str, Run]) -> None:
    """From the command, which trains a network of each width."""
    for name, colour in (("mlp_standard", "tab:red"), ("mlp_mup", "tab:blue")):
        found = widths.runs(f"benchmarks.coordinate:{name}", WIDTHS, steps=5, seeds=3)
        curves = [
            Curve(list(WIDTHS), [float(np.mean([seed[layer]["own"] for seed in found[width]])) for width in WIDTHS])
            for layer in found[WIDTHS[0]][0]
        ]
        words = {"mlp_standard": "standard parametrisation", "mlp_mup": "muP"}
        draw(panel, curves, colour, words[name], marker="o", markersize=3)
    finish(panel, "coordinate-check: three layers of an MLP", "change by the layer's own updates", log=True)
    panel.set(xlabel="width", xscale="log", xticks=WIDTHS, xticklabels=WIDTHS)
    panel.minorticks_off()


# What is trained for each picture.
PICTURES = {
    loss: (),
    activation: (),
    dormant_units: (),
    attention: ("GPT",),
    noise_scale: ("GPT",),
    representation: ("GPT",),
    trajectory: ("GPT",),
    router: ("experts", "experts, one dead"),
    coordinate_check: (),
}


def main(only: tuple[str, ...] = (), runs: Path = Path("runs/monitors")) -> None:
    """Train what the pictures show, each once, and draw them.

    Args:
        only: Names of pictures, unless all.
        runs: Event files; trainings that are there are not repeated.
    """
    chosen = {picture: trainings for picture, trainings in PICTURES.items() if not only or picture.__name__ in only}
    known = {folder.name: scalars(folder) for folder in GALLERY.iterdir()}
    known |= {what: watched(what, runs) for what in dict.fromkeys(chain(*chosen.values()))}
    for picture in chosen:
        figure, panel = plt.subplots(figsize=(5.6, 3.2))
        picture(panel, known)
        figure.tight_layout()
        figure.savefig(IMAGES / f"monitor_{picture.__name__}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    auto_cli(main)
