"""How curves are laid out: a chart per quantity on TensorBoard's custom-scalars page, and a table on the console."""

from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_lowrank import Features, Monitor, Probe, RankMonitor, Sample, summary_table
from lightning_lowrank.reports import dashboard
from tests.trainings import Classifier

Charts = dict[str, dict[str, tuple[str, str, str]]]


def watched(root: Path, *monitors: Monitor) -> list[Charts]:
    """The layouts that a run wrote: category -> chart -> tags of value, lower and upper end."""
    settings = {
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(logger=TensorBoardLogger(root, name="", version=""), callbacks=list(monitors), **settings).fit(
        Classifier()
    )
    events = EventAccumulator(str(root)).Reload()
    return [charts(Layout.FromString(e.tensor_proto.string_val[0])) for e in events.Tensors("custom_scalars__config__")]


def charts(layout: Layout) -> Charts:
    return {category.title: {chart.title: band(chart) for chart in category.chart} for category in layout.category}


def band(chart: Any) -> tuple[str, str, str]:
    (series,) = chart.margin.series
    return series.value, series.lower, series.upper


def expected(*sources: str) -> Charts:
    statistics = ("energy_rank", "stable_rank", "effective_rank", "participation_ratio")
    return {f"lowrank {source}": {f"{source}_{s}": margin(f"{source}_{s}") for s in statistics} for source in sources}


def margin(quantity: str, group: str = "rank") -> tuple[str, str, str]:
    return f"{group}/{quantity}_median", f"{group}/{quantity}_min", f"{group}/{quantity}_max"


def test_each_quantity_has_its_median_in_the_band_of_all_sites(tmp_path: Path) -> None:
    assert watched(tmp_path, RankMonitor(detail="all"))[-1] == expected("gradient", "weight", "update")


def test_the_layout_is_written_once(tmp_path: Path) -> None:
    assert len(watched(tmp_path, RankMonitor(every_n_steps=1, detail="all"))) == 1


def test_two_monitors_of_a_run_keep_their_charts(tmp_path: Path) -> None:
    other = Monitor([Probe("feature", Features(), ["stable_rank"])], name="other", detail="all")

    last = watched(tmp_path, RankMonitor(detail="all"), other)[-1]

    own = {"lowrank other_feature": {"other_feature_stable_rank": margin("feature_stable_rank", "other_monitor")}}
    assert last == expected("gradient", "weight", "update") | own


def test_a_second_run_of_one_monitor_has_a_layout_too(tmp_path: Path) -> None:
    monitor = RankMonitor(detail="all")

    first, second = watched(tmp_path / "first", monitor), watched(tmp_path / "second", monitor)

    assert first[-1] == second[-1]


def test_every_tag_of_the_layout_has_a_curve(tmp_path: Path) -> None:
    charts = watched(tmp_path, RankMonitor(detail="all"))[-1]

    curves = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert {tag for category in charts.values() for tags in category.values() for tag in tags} <= set(curves)


class Kept:
    """What a table needs of a monitor."""

    label, overhead, no_number_since = "rank", 0.1234, None

    def __init__(self, first: Sample | None, latest: Sample | None) -> None:
        self.first, self.latest = first, latest


def rows(kept: dashboard.Watched) -> list[tuple[str, ...]]:
    table = summary_table(kept)
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_table_has_both_medians_and_the_lowest_site() -> None:
    first = Sample(0, {"gradient_stable_rank": {"a": 4.0, "b": 6.0, "c": float("nan")}})
    latest = Sample(50, {"gradient_stable_rank": {"a": 3.0, "b": 1.25, "c": float("nan")}})

    assert rows(Kept(first, latest)) == [("gradient_stable_rank", "5", "2.12", "1.25", "b")]


def test_the_table_has_a_dash_where_there_is_no_number() -> None:
    nothing = Sample(0, {"gradient_stable_rank": {"a": float("nan")}})

    assert rows(Kept(nothing, nothing)) == [("gradient_stable_rank", "-", "-", "-", "")]


def test_an_error_stands_behind_its_number_and_has_no_row_of_its_own() -> None:
    latest = Sample(
        50,
        {"hessian_trace": {"": 12.0}, "exact": {"": 1.0}, "hessian_trace_error": {"": 0.25}, "exact_error": {"": 0.0}},
    )

    assert rows(Kept(None, latest)) == [
        ("hessian_trace", "-", "12", "12 \N{PLUS-MINUS SIGN} 0.25", ""),
        ("exact", "-", "1", "1", ""),
    ]


def test_the_table_without_a_sample_is_empty() -> None:
    assert rows(Kept(None, None)) == []


def test_the_table_says_what_the_monitor_cost_and_when_it_sampled() -> None:
    console = Console(width=120, record=True, file=StringIO())

    console.print(summary_table(Kept(Sample(0, {"q": {"a": 1.0}}), Sample(50, {"q": {"a": 1.0}}))))

    printed = console.export_text()
    assert all(words in printed for words in ("rank: training takes 0.12 % longer", "medians", "step 0", "step 50"))


def test_names_are_whole_in_a_narrow_terminal() -> None:
    console = Console(width=80, record=True, file=StringIO())
    quantity, site = (
        "gradient_participation_ratio_of_something_long",
        "model.encoder.layers.11.attention.output.dense.weight",
    )

    console.print(summary_table(Kept(None, Sample(50, {quantity: {site: 1.0}}))))

    cells = [
        [cell.strip() for cell in line.split("\u2502")[1:-1]]
        for line in console.export_text().splitlines()
        if "\u2502" in line
    ]
    assert ["".join(column) for column in zip(*cells, strict=True)] == [quantity, "-", "1", "1", site]


def test_a_monitor_can_be_asked_for_its_table() -> None:
    monitor = RankMonitor(detail="all")
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }

    L.Trainer(max_epochs=1, callbacks=[monitor], **settings).fit(Classifier())

    charts = expected("gradient", "weight", "update")
    assert [row[0] for row in rows(monitor)] == [quantity for category in charts.values() for quantity in category]
