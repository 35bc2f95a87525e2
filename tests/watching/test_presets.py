"""What users type is refused before training if it cannot work, by name and with what would."""

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lowrank import (
    Budget,
    Displacement,
    Every,
    Features,
    Gradients,
    Monitor,
    OptimizerState,
    Probe,
    RankMonitor,
    SpectralStatistic,
    Updates,
    Weights,
)
from tests.trainings import Classifier

# What is made, and what the refusal says: the culprit, and what would work.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no source": (lambda: RankMonitor(sources=(), detail="all"), r"sources=\[\].*'gradients', 'weights'"),
    "unknown source": (lambda: RankMonitor(["gradient"], detail="all"), r"\['gradient'\] is unknown.*'gradients'"),
    "no statistic": (lambda: RankMonitor(statistics=(), detail="all"), r"'gradient'.*'stable_rank'"),
    "unknown statistic": (
        lambda: RankMonitor(statistics=["stable_rnak"], detail="all"),
        r"'stable_rnak'.*'stable_rank'",
    ),
    "near miss": (
        lambda: RankMonitor(statistics=["stable_rnak"], detail="all"),
        "'gradient'.*'stable_rnak', did you mean 'stable_rank'",
    ),
    "parameter out of its domain": (
        lambda: RankMonitor(statistics=["energy_rank_2"], detail="all"),
        r"'energy_rank_2'.*epsilon above 0",
    ),
    "parameter where none is": (
        lambda: RankMonitor(statistics=["stable_rank_2"], detail="all"),
        r"'stable_rank_2'.*no parameter",
    ),
    "no relative form": (
        lambda: RankMonitor(statistics=["relative_weight_ratio"], detail="all"),
        "'relative_weight_ratio'",
    ),
    "a pair asked of features only": (
        lambda: RankMonitor(["features"], ["weight_ratio"], detail="all"),
        r"'weight_ratio'.*Features.*'stable_rank'",
    ),
    "every 0 steps": (lambda: RankMonitor(every_n_steps=0, detail="all"), r"every_n_steps=0.*at least 1"),
    "every -1 steps": (lambda: RankMonitor(every_n_steps=-1, detail="all"), r"every_n_steps=-1.*at least 1"),
    "no time": (lambda: RankMonitor(max_overhead=0.0, detail="all"), "max_overhead.*share=0.0.*above 0 and below 1"),
    "all the time": (
        lambda: RankMonitor(max_overhead=1.0, detail="all"),
        "max_overhead.*share=1.0.*above 0 and below 1",
    ),
    "a time that is no number": (
        lambda: RankMonitor(max_overhead=float("nan"), detail="all"),
        "max_overhead.*share=nan.*above 0 and below 1",
    ),
    "a cadence and a budget": (
        lambda: RankMonitor(every_n_steps=20, max_overhead=0.01, detail="all"),
        "every_n_steps=20 and max_overhead=0.01: give only one",
    ),
    "a budget for one of two probes": (
        lambda: Monitor(
            [Probe("a", Weights(), ["stable_rank"], Budget(0.01)), Probe("b", Updates(), ["stable_rank"])], detail="all"
        ),
        "the same Budget",
    ),
    "two budgets": (
        lambda: Monitor(
            [
                Probe("a", Weights(), ["stable_rank"], Budget(0.01)),
                Probe("b", Updates(), ["stable_rank"], Budget(0.01)),
            ],
            detail="all",
        ),
        "the same Budget",
    ),
    "a source twice": (lambda: RankMonitor(["weights", "weights"], detail="all"), r"\['weight', 'weight'\]"),
    "no probe": (lambda: Monitor([], detail="all"), "at least one probe"),
    "two probes of one name": (
        lambda: Monitor([Probe("a", Weights(), ["stable_rank"]), Probe("a", Updates(), ["stable_rank"])], detail="all"),
        r"\['a', 'a'\]",
    ),
    "a probe without statistics": (lambda: Probe("mine", Weights(), []), "'mine'.*Weights.*'stable_rank'"),
    "a probe of a statistic unknown": (lambda: Probe("mine", Weights(), ["rank"]), "'mine'.*'rank'.*'stable_rank'"),
    "a probe of what features cannot give": (
        lambda: Probe("mine", Features(), ["subspace_overlap"]),
        r"'subspace_overlap'.*Features.*'stable_rank'",
    ),
    "never due": (lambda: Every(0), r"n=0.*at least 1"),
    "due at True": (lambda: Every(True), r"n=True.*whole numbers"),
    "due before the start": (lambda: Every(1, start=-1), r"start=-1.*at least 0"),
    "a metric unknown": (lambda: SpectralStatistic("stable_rnak"), "'stable_rnak', did you mean 'stable_rank'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_refused_when_it_is_made(case: str) -> None:
    make, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        make()


# Of the wrong type, which the type checks of the tests would catch first: expressions for a process without them.
WRONG_TYPES = {
    "RankMonitor(per_site='maybe')": r"per_site='maybe'.*True or False or 'auto'",
    "RankMonitor(per_site=None)": r"per_site=None.*True or False or 'auto'",
    "RankMonitor(seed=1.5)": r"seed=1.5.*an integer",
    "CurvatureMonitor(seed=None)": r"seed=None.*an integer",
    "RankMonitor(every_n_steps=2.5)": r"every_n_steps=2.5.*an integer or None",
    "RankMonitor(every_n_steps=True)": r"every_n_steps=True.*an integer or None",
    "RankMonitor(max_overhead='1 %')": r"max_overhead='1 %'.*a number or None",
    "RankMonitor(every_n_steps='50')": r"every_n_steps='50'.*an integer or None",
    "RankMonitor(name=3)": r"name=3.*a string or None",
    "RankMonitor(match=5)": r"match=5.*a string or a sequence of \[a string\] or None",
    "RankMonitor(alerts=[3])": r"alerts=\[3\].*a sequence of \[Alert\] or 'default' or None",
    "Features(stage='later')": r"stage='later'.*'train' or 'validation'",
    "Gradients(match=5).plan(LoopTraining(nn.Linear(2, 2)))": "match=5 must be a pattern or a list",
    "ConcentrationMonitor(densities=0.5)": r"densities=0.5.*a sequence of \[a number\]",
    "CurvatureMonitor('heavy')": r"level='heavy'.*'light' or 'standard' or 'full'",
    "CurvatureMonitor(batch='kept')": r"batch='kept'.*'live' or 'fixed'",
}
IN_A_PROCESS_OF_ITS_OWN = """
import json, sys
from torch import nn
from lightning_lowrank import *
from lightning_lowrank.watching.loops import LoopTraining
def said(expression):
    try:
        eval(expression)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps([said(expression) for expression in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_a_wrong_type_is_refused_when_it_is_made() -> None:
    asked = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, json.dumps(list(WRONG_TYPES))]

    said = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)

    wrong = {
        e: s
        for (e, message), s in zip(WRONG_TYPES.items(), said, strict=True)
        if not re.match(f"ValueError: .*{message}", str(s))
    }
    assert wrong == {}


def fit(*monitors: Monitor, module: Classifier | None = None) -> Classifier:
    module = module or Classifier()
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_epochs=1, callbacks=list(monitors), **settings).fit(module)
    return module


# The same, for what shows only when there is a module.
REFUSED_AT_START: dict[str, tuple[Callable[[], list[Monitor]], str]] = {
    "match": (
        lambda: [RankMonitor(match="*.atn.*", detail="all")],
        r"match: '\*\.atn\.\*' matches nothing.*net\.0\.weight",
    ),
    "one of two": (
        lambda: [RankMonitor(match=["net.0.*", "head.*"], detail="all")],
        r"match: 'head\.\*' matches nothing.*net\.0\.weight",
    ),
    "exclude": (
        lambda: [RankMonitor(exclude="type:Conv2d", detail="all")],
        "exclude: 'type:Conv2d' matches nothing.*Linear",
    ),
    "regular expression": (
        lambda: [RankMonitor(match="re:net.(", detail="all")],
        r"match: 're:net\.\(' is not a regular expression",
    ),
    "of features": (
        lambda: [RankMonitor(["features"], match="*.attn", detail="all")],
        r"match: '\*\.attn' matches nothing.*net\.0",
    ),
    "of optimizer state": (
        lambda: [Monitor([Probe("m", OptimizerState("exp_avg", match="x"), ["stable_rank"])], detail="all")],
        "'x' matches nothing",
    ),
    "of displacement": (
        lambda: [Monitor([Probe("d", Displacement(match="x"), ["stable_rank"])], detail="all")],
        "'x' matches nothing",
    ),
    "view": (
        lambda: [
            Monitor(
                [Probe("g", Gradients(views={"net.0.weight": "(a b c) n -> a b n"}), ["stable_rank"])], detail="all"
            )
        ],
        "net.0.weight",
    ),
    "the same tags": (
        lambda: [RankMonitor(detail="all"), RankMonitor(["gradients"], detail="all")],
        r"two RankMonitor in one training.*distinguish them with RankMonitor\(..., name='...'\)",
    ),
    "some of the tags": (
        lambda: [
            RankMonitor(["weights"], detail="all"),
            Monitor([Probe("weight", Weights(), ["stable_rank"])], detail="all"),
        ],
        r"\['weight_stable_rank'\]; give one of them name=",
    ),
    "the same name": (
        lambda: [RankMonitor(["weights"], name="a", detail="all"), RankMonitor(["gradients"], name="a", detail="all")],
        r"two RankMonitor in one training.*distinguish them",
    ),
}


@pytest.mark.parametrize("case", REFUSED_AT_START)
def test_what_does_not_fit_the_module_is_refused_before_the_first_step(case: str) -> None:
    make, message = REFUSED_AT_START[case]
    module = Classifier()

    with pytest.raises(ValueError, match=message):
        fit(*make(), module=module)
    assert module.losses == []


def test_two_equal_monitors_are_refused_by_a_message_of_ours() -> None:
    """Lightning looks at `state_key` when the Trainer is made, and would only say that it must be unique."""
    with pytest.raises(
        ValueError, match=r"two RankMonitor in one training, RankMonitor\(detail='all'\) and RankMonitor"
    ):
        fit(RankMonitor(detail="all"), RankMonitor(detail="all"))


def test_one_name_may_stand_for_a_sequence_of_one() -> None:
    """LightningCLI's users would otherwise meet the letters of a word as sources."""
    monitor = RankMonitor("gradients", "stable_rank", detail="all")

    assert [recorder.quantities for recorder in monitor.recorders] == [["gradient_stable_rank"]]


def test_a_pair_is_asked_only_where_there_are_pairs() -> None:
    monitor = RankMonitor(["updates", "features"], ["stable_rank", "weight_ratio"], detail="all")

    assert {r.name: list(r.probe.statistics) for r in monitor.recorders} == {
        "update": ["stable_rank", "weight_ratio"],
        "feature": ["stable_rank"],
    }


def test_the_name_goes_before_every_tag() -> None:
    monitor = RankMonitor(name="encoder", per_site=True, detail="all")

    fit(monitor)

    assert monitor.latest is not None
    assert all(quantity.startswith("encoder_") for quantity in monitor.latest.values)


DIFFERENT = [
    RankMonitor(detail="all"),
    RankMonitor(name="second", detail="all"),
    Monitor([Probe("feature", Features(), ["stable_rank"])], detail="all"),
]


def test_monitors_have_places_of_their_own_in_a_checkpoint() -> None:
    assert len({monitor.place for monitor in DIFFERENT}) == len(DIFFERENT)


def test_the_same_monitor_finds_its_place_again() -> None:
    assert RankMonitor(detail="all").place == RankMonitor(every_n_steps=7, detail="all").place


EVERYTHING = ("gradients", "weights", "updates", "displacement", "optimizer_state", "features", "validation_features")
COPIES = {"copied": copy.deepcopy, "pickled": lambda monitor: pickle.loads(pickle.dumps(monitor))}


@pytest.mark.parametrize("trained", [False, True], ids=["before a run", "after a run"])
@pytest.mark.parametrize("way", COPIES)
def test_a_monitor_can_be_copied(way: str, trained: bool) -> None:
    """To other processes, as `ddp_spawn` does."""
    original = RankMonitor(
        EVERYTHING,
        ["stable_rank", "energy_rank_0.01", "relative_stable_rank", "weight_ratio", "subspace_overlap"],
        detail="all",
    )
    if trained:
        fit(original)

    copied = COPIES[way](original)

    assert copied.place == original.place
    torch.manual_seed(0)
    fit(copied)
    torch.manual_seed(0)
    fit(
        fresh := RankMonitor(
            EVERYTHING,
            ["stable_rank", "energy_rank_0.01", "relative_stable_rank", "weight_ratio", "subspace_overlap"],
            detail="all",
        )
    )
    assert copied.latest is not None and fresh.latest is not None
    assert copied.latest.values["gradient_stable_rank"] == fresh.latest.values["gradient_stable_rank"]


def test_a_pattern_chooses_what_is_watched() -> None:
    monitor = RankMonitor(["gradients", "features"], match="*.2*", exclude="re:bias$", detail="all")
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    with pytest.raises(ValueError, match="exclude: 're:bias\\$' matches nothing"):
        fit(monitor, module=Classifier(net))
    fit(chosen := RankMonitor(["gradients"], match="*.2.*", detail="all"), module=Classifier(net))

    assert chosen.latest is not None and chosen.latest.values["gradient_stable_rank"].keys() == {"net.2.weight"}
