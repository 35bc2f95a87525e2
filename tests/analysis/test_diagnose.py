"""What curves say, by rules: on made-up curves of one fault each, and on real runs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_lowrank
from benchmarks.diagnose import REPORT, judged
from benchmarks.diagnoses.reading import tables
from lightning_lowrank import DormantUnitsMonitor, LossMonitor, RankMonitor
from lightning_lowrank.analysis.cli import main
from lightning_lowrank.reports.alerts.ready_made import default_alerts
from lightning_lowrank.tensorboard.diagnosing.judging import SEVERITIES, Finding, diagnose
from lightning_lowrank.tensorboard.diagnosing.reading import loss_of
from lightning_lowrank.tensorboard.diagnosing.rules import RULES
from lightning_lowrank.tensorboard.series import Table
from tests.tab import train, write
from tests.trainings import Classifier

STEPS = np.arange(0, 200, 10)
RISING, FLAT = np.linspace(1, 10, 20), np.ones(20)


def curve(**sites: np.ndarray | list[float]) -> Table:
    values = np.stack([np.asarray(row, np.float32) for row in sites.values()], 1)
    return Table(STEPS[: len(values)].astype(np.int64), list(sites), values)


def broken(late: float, early: float = 1.0) -> list[float]:
    """Something that changes at step 100."""
    return [early] * 10 + [late] * 10


# Curves of one fault each, and what is to be found: rule, site, since.
PLANTED: dict[str, tuple[Mapping[str, Table], tuple[str, str, int]]] = {
    "entropy": (
        {
            "attention_entropy": curve(h0=broken(0.01, 3), h1=broken(0.02, 3), h2=broken(2.9, 3)),
            "attention_entropy_chance": curve(h0=FLAT * 3, h1=FLAT * 3, h2=FLAT * 3),
        },
        ("attention-collapse", "whole model", 100),
    ),
    "weights": ({"weight_spectral_norm": curve(a=RISING, b=RISING, c=FLAT)}, ("weights-outgrow", "whole model", 110)),
    "updates": (
        {"update_weight_ratio": curve(a=FLAT * 1e-3, b=broken(0.5, 1e-3), c=FLAT * 1e-3)},
        ("update-outlier", "b", 100),
    ),
    "experts": ({"router_idle_share": curve(a=FLAT * 0, b=broken(0.25, 0))}, ("idle-experts", "b", 110)),
    "dead": ({"dormant_inactive": curve(a=broken(0.95, 0), b=FLAT * 0.4)}, ("dead-units", "a", 100)),
    "features": (
        {"feature_participation_ratio": curve(a=broken(1.05, 9), b=FLAT * 1.05)},
        ("feature-collapse", "a", 100),
    ),
    "weight rank": ({"weight_effective_rank": curve(a=broken(20, 50), b=FLAT * 30)}, ("weight-collapse", "a", 100)),
    "rate": (
        {"update_spectral_norm": curve(a=FLAT * 1e-5), "weight_spectral_norm": curve(a=FLAT)},
        ("does-not-learn", "whole model", 0),
    ),
    "behind dead units": (
        {"update_weight_ratio": curve(a=FLAT * 1e-7, b=FLAT * 1e-7, c=FLAT * 1e-3)},
        ("does-not-learn", "whole model", 0),
    ),
    "loss": ({"step_loss": curve(model=broken(3, 2))}, ("loss-rises", "model", 100)),
    "labels": (
        {"step_loss": curve(model=broken(1.5, 2)), "noise_signal_share": curve(model=FLAT * 0.01)},
        ("label-noise", "model", 0),
    ),
    "memory": (
        {"held_out_loss": curve(model=broken(3, 2)), "step_loss": curve(model=broken(0.5, 2))},
        ("overfits", "model", 100),
    ),
    "switch": (
        {
            "step_loss": curve(model=[*broken(2.1, 2)[:10], 9.0, *FLAT[:9] * 2.1]),
            "step_gradient_norm": curve(model=[*FLAT[:10], 50.0, *FLAT[:9] * 2]),
        },
        ("sudden-change", "model", 100),
    ),
    "gradient": ({"gradient_stable_rank": curve(a=broken(0, 3), b=FLAT)}, ("no-gradient", "a", 100)),
    "spike": (
        {"anatomy_spike": curve(a=broken(0.8, 0.1), b=FLAT * 0.1), "anatomy_spike_chance": curve(a=FLAT * 0.1, b=FLAT)},
        ("one-direction", "a", 100),
    ),
    "edge": ({"sharpness_over_threshold": curve(model=broken(1.4, 0.3))}, ("edge-of-stability", "model", 100)),
    "lazy": ({"ntk_distance_to_start": curve(model=FLAT * 1e-5)}, ("lazy-training", "model", 0)),
    "nan": (
        {"weight_stable_rank": curve(a=broken(math.nan, 5)), "weight_stable_rank_chance": curve(a=FLAT)},
        ("diverged", "whole model", 100),
    ),
    "few": ({"weight_effective_rank": curve(a=[1.0, 2.0])}, ("too-few-samples", "whole model", 10)),
    "old": (
        {
            "weight_effective_rank": curve(a=FLAT),
            "step_loss": Table(np.arange(0, 600, 10), ["model"], np.ones((60, 1), np.float32)),
        },
        ("old-samples", "whole model", 190),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_each_fault_is_told_alone_with_its_place_and_the_step_at_which_it_began(fault: str) -> None:
    curves, (rule, site, since) = PLANTED[fault]

    (found,) = diagnose(curves, RULES)

    assert (found.rule, found.site, found.since) == (rule, site, since)
    assert "/how-to/diagnose/#" in found.message and "Try: " in found.message


def test_every_rule_has_a_planted_fault_and_a_heading_on_the_page() -> None:
    rules = {rule.name for rule in RULES} | {"diverged", "too-few-samples", "old-samples"}
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "diagnose.md").read_text()

    assert {rule for _, (rule, _, _) in PLANTED.values()} == rules
    assert all(f"### {rule}\n" in page for rule in rules)


@pytest.mark.parametrize(
    ("quantity", "values", "rule"),
    [
        ("weight_spectral_norm", [1.0, 9.0, 99.0], "weights-outgrow"),
        ("weight_effective_rank", [50.0, 5.0, 4.0], "weight-collapse"),
        ("feature_participation_ratio", [9.0, 1.1, 1.1], "feature-collapse"),
        ("step_loss", [2.0, 9.0, 99.0], "loss-rises"),
    ],
)
def test_of_three_samples_the_first_that_others_are_compared_with_need_not_be_beyond(
    quantity: str, values: list[float], rule: str
) -> None:
    three = diagnose({quantity: curve(a=values)}, RULES)
    passed = diagnose({quantity: curve(a=[values[0], values[1], values[0]])}, RULES)

    assert [(finding.rule, finding.since) for finding in three] == [(rule, 10)]
    assert passed == []


@pytest.mark.parametrize("fault", PLANTED)
def test_what_has_passed_is_not_told(fault: str) -> None:
    curves, (rule, _, _) = PLANTED[fault]
    if rule in ("too-few-samples", "old-samples", "does-not-learn", "label-noise", "lazy-training", "weights-outgrow"):
        pytest.skip("it does not change in the course of the run")
    if rule == "sudden-change":
        pytest.skip("it is told because it has happened")
    back = {name: Table(table.steps, table.sites, table.values[::-1].copy()) for name, table in curves.items()}

    assert rule not in {finding.rule for finding in diagnose(back, RULES)}


def test_findings_come_worst_first_and_the_worst_site_is_named() -> None:
    curves = {**PLANTED["edge"][0], **PLANTED["gradient"][0], "dormant_inactive": curve(a=FLAT * 0.92, b=FLAT)}

    found = diagnose(curves, RULES)

    assert [finding.severity for finding in found] == sorted((f.severity for f in found), key=SEVERITIES.index)
    assert (found[0].site, found[0].num_sites) == ("b", 2) and "b and at 1 more: " in found[0].message


def test_quantities_of_a_monitor_with_a_name_are_judged_too() -> None:
    named = {f"small_{name}": table for name, table in PLANTED["entropy"][0].items()}

    assert [finding.rule for finding in diagnose(named, RULES)] == ["attention-collapse"]


def test_thresholds_are_those_of_the_alerts_where_both_look_at_one_number() -> None:
    def threshold(name: str) -> int | float:
        (rule,) = (rule for rule in RULES if rule.name == name)
        condition = rule.conditions[0]
        return condition.above if math.isfinite(condition.above) else condition.below

    (inactive,) = DormantUnitsMonitor.usual_alerts(["dormant_inactive"])
    (zero,) = (rule for rule in default_alerts(["gradient_stable_rank"]) if rule.below is not None)
    assert threshold("dead-units") == inactive.above and threshold("no-gradient") == zero.below


class Dead(Classifier):
    """Units that no digit reaches."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        with torch.no_grad():
            self.net[0].bias.fill_(-50.0)  # type: ignore[operator,union-attr]


def test_a_real_run_of_dead_units_says_so_and_fails_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", DormantUnitsMonitor(every_n_steps=4, alerts=None), Dead())

    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(tmp_path), "--fail-on", "critical"])
    told = capsys.readouterr().out.splitlines()
    main(["diagnose", str(tmp_path), "--json"])
    (finding,) = json.loads(capsys.readouterr().out)[f"{tmp_path}/run"]

    assert ended.value.code == 1
    assert told[1].startswith("critical dead-units: net.1: a share of 1 of its units is off")
    assert {"rule", "severity", "site", "quantity", "since", "message"} <= finding.keys()
    assert (finding["rule"], finding["site"], finding["since"]) == ("dead-units", "net.1", 0)


def test_a_healthy_run_has_nothing_to_report_and_says_what_was_not_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=4))

    main(["diagnose", str(tmp_path / "run"), "--fail-on", "info"])

    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and ": nothing to report, " in told[0]
    assert "dead-units" in told[1] and "weight-collapse" not in told[1]


def test_the_loss_that_the_user_logged_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=4), log_every_n_steps=1)

    main(["diagnose", str(tmp_path / "run")])

    assert "loss-rises" not in capsys.readouterr().out


class Exploding(Classifier):
    """A loss that jumps after the first step."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self(batch[0]), batch[1]) * (1.0 if self.global_step == 0 else 300.0)
        self.log("train_loss", loss)
        return loss


def test_a_loss_that_explodes_before_anything_is_logged_rises_from_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seldom = LossMonitor(every_n_steps=10)
    train(tmp_path / "run", seldom, Exploding(), log_every_n_steps=2)

    main(["diagnose", str(tmp_path / "run")])

    assert "critical loss-rises: " in capsys.readouterr().out


HEALTHY: dict[str, Mapping[str, Table]] = {
    "both losses rise": {"held_out_loss": curve(model=broken(2.4, 2)), "step_loss": curve(model=broken(2.4, 2))},
    "the held-out loss is higher, and falls": {
        "held_out_loss": curve(model=RISING[::-1]),
        "step_loss": curve(model=RISING[::-1] / 4),
    },
    "one large gradient": {
        "step_loss": curve(model=FLAT * 2),
        "step_gradient_norm": curve(model=[*FLAT[:10], 50.0, *FLAT[:9]]),
    },
    "a loss near 0": {
        "step_loss": curve(model=[*FLAT[:10] * 0.01, 0.1, *FLAT[:9] * 0.01]),
        "step_gradient_norm": curve(model=[*FLAT[:10], 50.0, *FLAT[:9]]),
    },
    "a start that is large": {
        "step_loss": curve(model=[20.0, *FLAT[:19] * 2]),
        "step_gradient_norm": curve(model=[50.0, *FLAT[:19]]),
    },
    "few samples": {"step_loss": curve(model=FLAT[:3]), "step_gradient_norm": curve(model=FLAT[:3])},
}


@pytest.mark.parametrize("what", HEALTHY)
def test_nothing_is_switched_and_nothing_is_learnt_by_heart(what: str) -> None:
    assert not {finding.rule for finding in diagnose(HEALTHY[what], RULES)} & {"overfits", "sudden-change"}


class ByHeart(Classifier):
    """Four examples, again and again, beside those that are not trained on."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images, labels = (torch.randn(68, 64, generator=generator), torch.randint(10, (68,), generator=generator))
        with torch.no_grad():
            self.log("val_loss", cross_entropy(self(images[4:]), labels[4:]))
        return cross_entropy(self(images[:4]), labels[:4])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_a_run_that_learns_a_few_examples_by_heart_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", LossMonitor(alerts=None), ByHeart(), log_every_n_steps=2)

    main(["diagnose", str(tmp_path / "run")])

    assert "warning  overfits: whole model: the loss of examples that are not trained on is " in capsys.readouterr().out


class Switched(Classifier):
    """Inputs become a hundred times as large at a step."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return cross_entropy(self(batch[0] * (100.0 if self.global_step >= 20 else 1.0)), batch[1])


def test_a_run_in_which_something_is_switched_names_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", LossMonitor(alerts=None), Switched(lr=1e-5), max_epochs=-1, max_steps=40)

    main(["diagnose", str(tmp_path / "run"), "--json"])

    found = json.loads(capsys.readouterr().out)[str(tmp_path / "run")]
    assert ("sudden-change", 20) in [(finding["rule"], finding["since"]) for finding in found]


@pytest.mark.parametrize(("scale", "since"), [(1.0, 0), (1000.0, 5)])
def test_a_loss_of_another_scale_is_not_begun_by_ours(scale: float, since: int) -> None:
    own = Table(np.array([0, 40]), ["a"], np.array([[2.0], [3.0]], np.float32))
    logged = Table(np.arange(5, 60, 10), ["b"], np.full((6, 1), 3.0 * scale, np.float32))

    found = loss_of(own, logged)

    assert found is not None and found.steps[0] == since and len(found.steps) == 6 + (since == 0)
    assert loss_of(logged, own) is logged and loss_of(None, own) is own and loss_of(own, None) is own


def test_what_was_not_asked_names_the_monitor_that_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=4))

    main(["diagnose", str(tmp_path / "run")])

    last = capsys.readouterr().out.splitlines()[-1]
    assert "edge-of-stability (needs CurvatureMonitor)" in last and "(watch_all() measures it)" not in last
    named = {rule.monitor.partition("(")[0] for rule in RULES} - {"a logged val_loss"}
    assert "overfits (needs a logged val_loss)" in last and all(hasattr(lightning_lowrank, name) for name in named)


def test_a_run_of_nan_is_told_first_with_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(step, {"a": 1.0 if step < 5 else math.nan}) for step in range(10)]
    write(tmp_path / "run", *rows)

    main(["diagnose", str(tmp_path)])

    assert "critical diverged: whole model: no number since step 5" in capsys.readouterr().out


def test_a_quantity_that_may_be_nan_in_health_is_no_end_of_the_run() -> None:
    late = Table(STEPS + 5, ["model"], np.full((20, 1), np.nan, np.float32))

    assert diagnose({"weight_stable_rank": curve(a=FLAT), "noise_scale": late}, RULES) == []


def test_a_loss_of_nan_is_told_where_nothing_else_was_measured_after_it() -> None:
    loss = Table(STEPS, ["model"], np.array([[1.0]] * 15 + [[np.nan]] * 5, np.float32))
    early = Table(STEPS[:2].astype(np.int64), ["a"], np.ones((2, 1), np.float32))

    assert [f.rule for f in diagnose({"step_loss": loss, "weight_participation_ratio": early}, RULES)] == ["diverged"]


def test_a_quantity_without_a_sample_is_no_hindrance() -> None:
    empty = Table(STEPS[:0].astype(np.int64), ["a"], np.ones((0, 1), np.float32))

    assert diagnose({"weight_effective_rank": empty}, RULES) == []


def test_at_most_twelve_lines_are_printed_for_a_run() -> None:
    from lightning_lowrank.analysis.diagnosing import lines_of, unchecked

    many = [Finding(f"rule {i}", "warning", "a", "q", 0, "words", 1.0, "") for i in range(30)]

    assert len(lines_of("run", many, 1)) == 12 and "and 20 more" in lines_of("run", many, 1)[-1]
    (line,) = unchecked([{"a": "M", "b": "N", "c": "N"}, {"b": "N", "c": "N"}])
    assert ": b, c (needs N). " in line and unchecked([{"a": "M"}, {}]) == []


@pytest.mark.evidence
@pytest.mark.filterwarnings("ignore")
def test_no_healthy_training_has_two_false_lines_and_four_fifths_of_causes_are_named_first() -> None:
    """On the seeds that rules were chosen without; records are taken from `runs/alerts` where they are."""
    said = [one for one in judged(Path("runs/alerts"), 2) if one.seed in REPORT]

    failing = [one for one in said if not one.case.is_healthy]
    assert max(len(one.findings) for one in said if one.case.is_healthy) <= 1
    assert sum(one.is_named for one in failing) >= 0.8 * len(failing)


def test_records_of_the_study_are_read_as_event_files_are() -> None:
    records = {
        "weight_stable_rank/net.0.weight": {0: 2.0, 10: 3.0},
        "rank/weight_stable_rank_median": {0: 2.0, 10: 3.0},
        "ntk/velocity": {10: 0.5},
        "loss": {0: 1.0},
        "lowrank/rank_time_ms": {0: 1.0},
    }

    found = tables(records)

    assert set(found) == {"weight_stable_rank", "ntk_velocity", "step_loss"}
    assert found["weight_stable_rank"].sites == ["net.0.weight"] and found["ntk_velocity"].steps.tolist() == [10]
