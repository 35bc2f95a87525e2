"""What loggers get at each detail, of every monitor."""

from functools import cache

import pytest

from lightning_lowrank import MultifractalMonitor
from lightning_lowrank.reports.report import DETAILS
from tests.monitors import ANY
from tests.trainings import Classifier, MemoryLogger, fitted, mlp


@cache
def written(kind: str, detail: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Tags that loggers get; quantities of the core over sites, and of the whole model, as the group has them."""
    monitor, logger = ANY[kind](every_n_steps=1, detail=detail, per_site="auto"), MemoryLogger()
    fitted(Classifier(mlp()), [monitor], logger, 1, max_steps=3)
    style = monitor.watch.journal.style
    trained = [recorder for recorder in monitor.recorders if recorder.probe.source.stage == "train"]
    there = [(r, q) for r in trained for q in r.quantities if q in r.measured and r.detail(q) == "core"]
    of_sites = frozenset(style.tag(q, "median") for r, q in there if not r.is_global(q) and not q.endswith("_chance"))
    of_model = frozenset(style.tag(q) for r, q in there if r.is_global(q))
    return frozenset(logger.curves()), of_sites, of_model


@pytest.mark.parametrize("kind", ANY)
def test_the_core_of_a_monitor_is_written_at_the_default_detail(kind: str) -> None:
    tags, of_sites, of_model = written(kind, "core")

    assert {tag for tag in tags if tag.startswith(f"{ANY[kind]().label}/")} == of_sites | of_model


@pytest.mark.parametrize("kind", ANY)
def test_more_detail_takes_nothing_away(kind: str) -> None:
    tags = [written(kind, detail)[0] for detail in DETAILS]

    assert tags[0] < tags[1] <= tags[2]


def test_the_width_over_that_of_noise_is_of_the_core_and_that_of_noise_is_looked_up() -> None:
    detail = MultifractalMonitor().recorders[0].detail

    assert (detail("multifractal_width_over_floor"), detail("multifractal_width_floor")) == ("core", "all")
