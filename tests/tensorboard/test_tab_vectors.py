"""What a run writes for the tab: every number, once, for the price of a vector per quantity."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import nn

from lightning_lowrank import DormantUnitsMonitor, Every, Monitor, Probe, RankMonitor, Weights
from lightning_lowrank.analysis.page import reader_of
from lightning_lowrank.reports.loggers import write as write_report
from lightning_lowrank.reports.vectors import Row, Vectors
from tests.tab import train, written
from tests.trainings import Adversaries, Classifier, MemoryLogger

SITES = ["net.0.weight", "net.2.weight"]


def test_vectors_are_the_numbers_that_the_monitor_has(tmp_path: Path) -> None:
    monitor = RankMonitor(every_n_steps=4, detail="all")

    train(tmp_path / "run", monitor)

    assert monitor.latest is not None
    vectors, known = written(tmp_path / "run")
    for quantity, values in monitor.latest.values.items():
        tag = f"lowrank_vector/{quantity}"
        assert list(vectors[tag]) == [0, 4, 8, 12, 16, 20] and known[tag]["sites"] == SITES
        np.testing.assert_array_equal(vectors[tag][20], np.array([values[site] for site in SITES], np.float32))


def test_what_belongs_to_a_vector_says_what_it_is(tmp_path: Path) -> None:
    train(tmp_path / "run", RankMonitor(["gradients", "features"], ["energy_rank_0.01"], detail="all"), max_steps=1)

    known = written(tmp_path / "run")[1]
    expected = {
        "source": "feature",
        "statistic": "energy_rank_0.01",
        "unit": "directions",
        "level": "functions",
        "kind": "vector",
    }
    assert known["lowrank_vector/feature_energy_rank_0.01"].items() >= expected.items()
    assert known["lowrank_vector/gradient_energy_rank_0.01"]["level"] == "parameters"


def test_numbers_of_monitors_say_what_they_are(tmp_path: Path) -> None:
    train(tmp_path / "run", DormantUnitsMonitor(detail="all"), max_steps=1)

    says = written(tmp_path / "run")[1]["lowrank_vector/dormant_share"]["says"]
    assert says.startswith("Share of units far below the mean of their layer") and says.endswith("/dormant-units/")


def test_ranks_are_written_with_those_of_gaussian_matrices(tmp_path: Path) -> None:
    statistics = ["effective_rank", "spectral_norm", "relative_stable_rank"]
    train(tmp_path / "run", RankMonitor(["weights", "features"], statistics, detail="all"), max_steps=1)

    known = written(tmp_path / "run")[1]
    noise = torch.randn(len(SITES), 20, 32, 64, generator=torch.Generator().manual_seed(0)).double()
    values = torch.linalg.svdvals(noise[0])
    shares = values / values.sum(-1, keepdim=True)
    expected = shares.log().mul(-shares).sum(-1).exp().mean()
    assert known["lowrank_vector/weight_effective_rank"]["null"][0] == pytest.approx(float(expected), rel=0.02)
    assert known["lowrank_vector/weight_relative_stable_rank"]["null"] == [1, 1]
    assert len(known["lowrank_vector/feature_effective_rank"]["null"]) == 2
    assert "null" not in known["lowrank_vector/weight_spectral_norm"]


def test_sites_are_written_once_per_event_file(tmp_path: Path) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=1, detail="all"))

    (file,) = (tmp_path / "run").glob("events.*")
    says = [
        bool(value.metadata.plugin_data.content)
        for event in LegacyEventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag.startswith("lowrank_vector/gradient_stable_rank")
    ]
    assert says == [True] + [False] * 23


def test_every_event_file_of_a_resumed_run_says_what_belongs_to_its_vectors(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path / "run", RankMonitor(every_n_steps=4, detail="all"))

    files = sorted((tmp_path / "run").glob("events.*"))
    assert len(files) == 2 and all(b"net.0.weight" in file.read_bytes() for file in files)


def test_spectra_are_those_of_every_tenth_sample(tmp_path: Path) -> None:
    module = Classifier(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)))
    seen: dict[int, torch.Tensor] = {}

    def keep(_: Any, __: Any) -> None:
        seen[module.global_step] = module.net[0].weight.detach().clone()

    module.net[0].register_forward_pre_hook(keep)
    train(tmp_path / "run", Monitor([Probe("weight", Weights(), ["effective_rank"], Every(1))], detail="all"), module)

    vectors, known = written(tmp_path / "run")
    spectra, shape = vectors["lowrank_spectrum/weight"], known["lowrank_spectrum/weight"]
    ranks = shape["shapes"][shape["shape_of"][0]]["ranks"]
    assert list(spectra) == [0, 10, 20]
    for step, spectrum in spectra.items():
        values = torch.linalg.svdvals(seen[step].double())
        np.testing.assert_allclose(spectrum[0, 1 : 1 + len(ranks)], values[ranks].numpy(), rtol=1e-5)
        np.testing.assert_allclose(spectrum[0, 0], float(values.square().sum().sqrt()), rtol=1e-6)


def test_no_matrix_is_decomposed_for_the_sake_of_spectra(tmp_path: Path) -> None:
    train(tmp_path / "run", RankMonitor(statistics=["stable_rank"], detail="all"), max_steps=1)

    assert [tag for tag in written(tmp_path / "run")[0] if "spectrum" in tag] == []


def test_sites_that_another_optimizer_has_are_under_a_tag_of_their_own(tmp_path: Path) -> None:
    train(
        tmp_path / "run",
        RankMonitor(["gradients"], ["stable_rank"], every_n_steps=3, min_size=1, detail="all"),
        Adversaries(every=2),
        max_epochs=1,
    )

    parts = reader_of(tmp_path).parts("run", "vector", "gradient_stable_rank")
    assert {tuple(part.sites) for part in parts} >= {("critic.weight",), ("generator.weight",)}


class Diverging(Classifier):
    """Its loss is NaN from the eleventh batch on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 10 else 1.0)


@pytest.mark.filterwarnings("ignore:lightning_lowrank")
def test_what_is_no_number_is_written_as_such(tmp_path: Path) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=4, detail="all"), Diverging())

    curve = written(tmp_path / "run")[0]["lowrank_vector/gradient_stable_rank"]
    assert [step for step, vector in curve.items() if np.isnan(vector).all()] == [12, 16, 20]


def test_cost_and_alerts_are_among_the_vectors(tmp_path: Path) -> None:
    train(tmp_path / "run", RankMonitor(every_n_steps=4, detail="all"))

    vectors, known = written(tmp_path / "run")
    assert {"time_ms", "overhead_percent", "failures"} <= set(known["lowrank_cost/rank"]["sites"])
    assert vectors["lowrank_cost/rank"][20][0] > 0
    assert set(vectors["lowrank_alert/rank"][20].tolist()) <= {0.0, 1.0, 2.0}


def test_loggers_without_pytorchs_writer_are_left_alone(tmp_path: Path) -> None:
    loggers = [MemoryLogger(), CSVLogger(tmp_path, name="csv")]

    errors = write_report(loggers, {}, 0, [Vectors().draw([Row("vector", "gradient_stable_rank", {"a": 1.0})], 0)])

    assert errors == []


def test_numbers_beyond_float32_are_infinite(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="")

    errors = write_report(
        [logger], {}, 7, [Vectors().draw([Row("vector", "norm", {"a": 1e300, "b": -math.inf, "c": 1.0})], 7)]
    )

    logger.experiment.close()
    assert errors == []
    assert written(tmp_path / "run")[0]["lowrank_vector/norm"][7].tolist() == [math.inf, -math.inf, 1.0]
