"""What the tab says under its selector."""

import pytest

from lightning_lowrank.measuring.number_source import NumberSource
from lightning_lowrank.reports.sentences import SENTENCES, sentence
from tests.monitors import MONITORS


@pytest.mark.parametrize("monitor", MONITORS)
def test_every_number_of_every_monitor_has_a_sentence_with_three_parts(monitor: str) -> None:
    sources = [recorder.probe.source for recorder in MONITORS[monitor]().recorders]
    names = [q.name for source in sources if isinstance(source, NumberSource) for q in source.quantities]

    for name in names:
        says = sentence(name)
        assert says.endswith("."), name
        assert says.count(";") >= 1, name
        assert len(says) <= 140, name


def test_every_sentence_is_said_of_something() -> None:
    sources = [recorder.probe.source for make in MONITORS.values() for recorder in make().recorders]
    names = {q.name for source in sources if isinstance(source, NumberSource) for q in source.quantities}
    said = {sentence(name) for name in names | {f"{name}_error" for name in names}}

    assert set(SENTENCES.values()) == said


def test_what_is_not_ours_has_none() -> None:
    assert sentence("loss_of_the_user") == ""
