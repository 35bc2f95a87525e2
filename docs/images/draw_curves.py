"""Draw the bands that a monitor wrote: median, least and most over all layers, for each source and rank of a run.

python docs/images/draw_curves.py runs/char_transformer/version_0 --output curves.png
"""

from pathlib import Path

import matplotlib.pyplot as plt
from jsonargparse import auto_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLOURS = {"gradient": "tab:blue", "weight": "tab:orange", "update": "tab:green"}


def main(
    run: Path, output: Path = Path("curves.png"), statistics: tuple[str, ...] = ("stable_rank", "effective_rank")
) -> None:
    """Draw one panel per statistic.

    Args:
        run: Folder with event files.
        output: Image to write.
        statistics: Names as in the tags.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()

    def curve(tag: str) -> tuple[list[int], list[float]]:
        points = events.Scalars(tag)
        return [p.step for p in points], [p.value for p in points]

    figure, panels = plt.subplots(1, len(statistics), figsize=(5 * len(statistics), 3.4), squeeze=False)
    for panel, statistic in zip(panels[0], statistics, strict=True):
        for source, colour in COLOURS.items():
            steps, median = curve(f"rank/{source}_{statistic}_median")
            least, most = (curve(f"rank/{source}_{statistic}_{end}")[1] for end in ("min", "max"))
            panel.plot(steps, median, color=colour, label=source)
            panel.fill_between(steps, least, most, color=colour, alpha=0.15, linewidth=0)
        panel.set(title=statistic.replace("_", " "), xlabel="optimizer step", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("directions (median; band: all layers)")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    auto_cli(main)
