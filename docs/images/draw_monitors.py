"""Draw an example for the page of each monitor that no script in `examples/` draws, from real trainings: most beside
one with a fault of `benchmarks.faults`, which begins at the dotted line.

    python -m docs.images.draw_monitors

About six minutes on one processor.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.faults.trainings import BEGIN, CASES, train
from lightning_lowrank import (
    ActivationMonitor,
    AttentionMonitor,
    DormantUnitsMonitor,
    LossMonitor,
    NoiseScaleMonitor,
    RepresentationMonitor,
    RouterMonitor,
    TrajectorySubspace,
)
from lightning_lowrank.analysis.widths import runs

IMAGES = Path(__file__).parent
WIDTHS = (32, 64, 128, 256)
# What watches each training.
WATCHED = {
    "GPT": lambda: [
        LossMonitor(),
        ActivationMonitor(every_n_steps=10, per_site=True),
        AttentionMonitor(every_n_steps=10, per_site=True),
        NoiseScaleMonitor(every_n_steps=10, detail="all"),
        RepresentationMonitor(every_n_steps=10, per_site=True, detail="all"),
        TrajectorySubspace(every_n_steps=10, detail="all"),
    ],
    "GPT, rate ramp": lambda: [LossMonitor()],
    "GPT, half precision overflows": lambda: [ActivationMonitor(every_n_steps=10, per_site=True)],
    "GPT, attention logits grow": lambda: [AttentionMonitor(every_n_steps=10, per_site=True)],
    "experts": lambda: [RouterMonitor(every_n_steps=10, per_site=True, detail="all")],
    "experts, one dead": lambda: [RouterMonitor(every_n_steps=10, per_site=True, detail="all")],
    "deep MLP": lambda: [DormantUnitsMonitor(every_n_steps=20, per_site=True)],
    "deep MLP, rate grows": lambda: [DormantUnitsMonitor(every_n_steps=20, per_site=True)],
}


class Curve(NamedTuple):
    """Steps, and a number at each."""

    steps: list[int]
    values: list[float]


Run = dict[str, Curve]


def watched(what: str, folder: Path) -> Run:
    """Train it, and read all scalars back."""
    case = next(case for case in CASES if case.what == what)
    L.seed_everything(0, verbose=False)
    logger = TensorBoardLogger(folder, name="", version=what)
    train(case.make(), case.steps, *WATCHED[what](), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: Curve([p.step for p in points], [p.value for p in points]) for tag, points in scalars.items()}


def sites(run: Run, quantity: str) -> dict[str, Curve]:
    """Of one quantity, by site."""
    return {tag.removeprefix(f"{quantity}/"): curve for tag, curve in run.items() if tag.startswith(f"{quantity}/")}


def draw(panel: Axes, curves: Iterable[Curve], colour: str, label: str, **style: float) -> None:
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


def loss(panel: Axes, known: dict[str, Run]) -> None:
    draw(panel, [known["GPT, rate ramp"]["step/loss"]], "tab:red", "the learning rate grows 300 times", linewidth=0.8)
    draw(panel, [known["GPT"]["step/loss"]], "tab:blue", "healthy", linewidth=0.8)
    finish(panel, "LossMonitor on a GPT", "loss of the step", fault=True)


def activation(panel: Axes, known: dict[str, Run]) -> None:
    faulty = known["GPT, half precision overflows"]
    of_pair(panel, known["GPT"], faulty, "activation_rms", "the output of one MLP grows")
    finish(panel, "ActivationMonitor: four blocks of a GPT", "RMS of the block's output", log=True, fault=True)


def attention(panel: Axes, known: dict[str, Run]) -> None:
    faulty = known["GPT, attention logits grow"]
    of_pair(panel, known["GPT"], faulty, "attention_max_logit", "queries and keys grow by 2 % a step")
    finish(panel, "AttentionMonitor: 16 heads of a GPT", "largest logit", log=True, fault=True)


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
        panel.plot(*curve, color=plt.get_cmap("viridis")(i / len(found)), label=block.removesuffix(".out"))
    chance = known["GPT"]["representation/effective_rank_chance_median"]
    draw(panel, [chance], "black", "Gaussian rows", linestyle="--")
    finish(panel, "RepresentationMonitor: four blocks of a GPT", "effective rank")


def router(panel: Axes, known: dict[str, Run]) -> None:
    of_pair(panel, known["experts"], known["experts, one dead"], "router_effective_experts", "one expert gets no token")
    draw(panel, [known["experts"]["router/effective_experts_chance_median"]], "black", "random router", linestyle="--")
    finish(panel, "RouterMonitor: four routers of four experts", "experts in use", fault=True)


def dormant_units(panel: Axes, known: dict[str, Run]) -> None:
    faulty = known["deep MLP, rate grows"]
    of_pair(panel, known["deep MLP"], faulty, "dormant_share", "the learning rate grows from the start")
    finish(panel, "DormantUnitsMonitor: an MLP of 8 layers", "share of dormant units")


def trajectory(panel: Axes, known: dict[str, Run]) -> None:
    run = known["GPT"]
    draw(panel, [run["trajectory/explained_1"]], "tab:blue", "the run")
    draw(panel, [run["trajectory/explained_1_random_walk"]], "black", "random walk at the same steps", linestyle="--")
    finish(panel, "TrajectorySubspace on a GPT", "variance in the first component")


def coordinate_check(panel: Axes, known: dict[str, Run]) -> None:
    """From the command, which trains a network of each width."""
    for name, colour in (("mlp_standard", "tab:red"), ("mlp_mup", "tab:blue")):
        found = runs(f"benchmarks.coordinate:{name}", WIDTHS, steps=5, seeds=3)
        curves = [
            Curve(list(WIDTHS), [float(np.mean([seed[layer]["own"] for seed in found[width]])) for width in WIDTHS])
            for layer in found[WIDTHS[0]]
        ]
        words = {"mlp_standard": "standard parametrisation", "mlp_mup": "muP"}
        draw(panel, curves, colour, words[name], marker="o", markersize=3)
    finish(panel, "coordinate-check: three layers of an MLP", "change by the layer's own updates", log=True)
    panel.set(xlabel="width", xscale="log", xticks=WIDTHS, xticklabels=WIDTHS)


PICTURES = (
    loss,
    activation,
    attention,
    noise_scale,
    representation,
    router,
    dormant_units,
    trajectory,
    coordinate_check,
)


def main() -> None:
    """Train each once, then draw all."""
    with TemporaryDirectory() as folder:
        known = {what: watched(what, Path(folder)) for what in WATCHED}
    for picture in PICTURES:
        figure, panel = plt.subplots(figsize=(5.6, 3.2))
        picture(panel, known)
        figure.tight_layout()
        figure.savefig(IMAGES / f"monitor_{picture.__name__}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
