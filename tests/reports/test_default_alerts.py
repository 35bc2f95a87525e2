"""What monitors warn of by default: in trainings, and as the evidence page chose it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lowrank import ActivationMonitor, Alert, AttentionMonitor, Monitor, watch_all
from lightning_lowrank.reports.alerts.ready_made import default_alerts
from tests.trainings import Attending, Classifier, logged

# Step from which on weights grow.
BEGIN = 40

ABRUPT: dict[str, tuple[Callable[[], Monitor], Callable[[], nn.Module], str]] = {
    "activations": (lambda: ActivationMonitor(1), lambda: Classifier().net, "activation_rms_departure"),
    "attention": (
        lambda: AttentionMonitor(1, layouts={"*qkv.weight": "qkv heads d"}),
        Attending,
        "attention_max_logit_departure",
    ),
}


@pytest.mark.parametrize("what", ABRUPT)
def test_defaults_tell_weights_that_begin_to_grow_and_nothing_before(what: str) -> None:
    make, net, rule = ABRUPT[what]

    class Growing(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                for parameter in self.net.parameters() if self.global_step >= BEGIN else ():
                    parameter *= 1.3

    monitor = make()
    with pytest.warns(UserWarning, match=rule):
        logged([monitor], lambda: Growing(net(), lr=1e-4), max_steps=60, max_epochs=-1)

    fired = {event.rule: event.since for event in monitor.events if event.state == "firing"}
    assert BEGIN <= fired[rule] <= BEGIN + 10 and min(fired.values()) >= BEGIN


@pytest.mark.filterwarnings("ignore:.*dormant_inactive_above")
def test_a_layer_that_is_dead_from_the_start_is_told_by_watch_all_within_its_first_three_samples() -> None:
    class Dead(Classifier):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[0].bias.fill_(-50.0)  # type: ignore[operator,union-attr]

    monitors = watch_all()
    with pytest.warns(UserWarning, match="gradient_stable_rank_below"):
        logged(monitors, Dead, max_steps=110, max_epochs=-1)

    events = {event.rule: event for monitor in monitors for event in monitor.events}
    event = events["gradient_stable_rank_below"]
    assert event.step <= 110 and event.since == 0
    assert [site.site for site in event.worst] == ["net.0.weight", "net.2.weight"]


def test_the_rules_that_the_page_chose_are_the_defaults() -> None:
    text = (Path(__file__).parents[2] / "docs/evidence/warnings.md").read_text()
    listed = re.search(r"^The \d+ chosen rules together .*\n\n((?:- .*\n)+)", text, re.M)
    assert listed is not None
    chosen = re.findall(r"^- `(.*?): (.*?)`", listed[1], re.M)
    shipped = set()
    for quantity, _ in chosen:
        known = {"loss": "step_loss"}.get(quantity, quantity)
        shipped |= {(quantity, word) for rule in default_alerts([known]) for word in words(rule)}

    assert len(chosen) >= 5 and set(chosen) <= shipped


def words(rule: Alert) -> set[str]:
    """How the page may call it."""
    kinds = {"spike": "spike", "cusum": "CUSUM", "departure": "departure"}
    (condition,) = rule.conditions
    name = f"{kinds.get(condition, condition)} {getattr(rule, condition):g}"
    where = {f"{name} half of the sites"} if rule.quorum == 0.5 else {name, f"{name} any site"}
    return {*where, f"default, {condition}"}
