"""What loggers get: a few dozen numbers whatever the model, or more if asked for; the tab has everything."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_lowrank import (
    ConcentrationMonitor,
    CurvatureMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NTKMonitor,
    RankMonitor,
)
from lightning_lowrank.reports.report import DETAILS
from tests.tab import written
from tests.trainings import Classifier, MemoryLogger

# Of all six monitors together.
MOST = 60


class Attention(nn.Module):
    """Two layers of two heads each on the rows of 8 x 8 images, with names by which heads are known."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(-1, 8, 8)).flatten(1))


def perceptron(num_layers: int = 30) -> nn.Module:
    hidden = [part for _ in range(num_layers - 2) for part in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), *hidden, nn.Linear(8, 10))


MODELS = {"thirty layers": perceptron, "transformer": Attention}


def six(**options: Any) -> list[Monitor]:
    """All of them, due at the first step."""
    return [
        RankMonitor(**options),
        CurvatureMonitor("standard", ["hessian"], top_k=1, **options),
        NTKMonitor(num_examples=2, num_projections=4, top_k=1, **options),
        MultifractalMonitor(**options),
        GradientAnatomyMonitor(**options),
        ConcentrationMonitor(**options),
    ]


def trained(net: nn.Module, monitors: list[Monitor], logger: Any) -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(0)
    module = Classifier(net)
    module.log = lambda *_: None  # type: ignore[assignment,misc]
    L.Trainer(max_steps=1, accelerator="cpu", logger=logger, callbacks=list(monitors), **quiet).fit(module)


def scalars(folder: Path) -> set[str]:
    """Tags that TensorBoard's own reader finds; epochs are Lightning's."""
    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"]) - {"epoch"}


@pytest.mark.filterwarnings("ignore:lightning_lowrank")  # what these small layers have not
@pytest.mark.parametrize("model", MODELS)
def test_six_monitors_write_a_few_dozen_scalars_whatever_the_model(model: str, tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, name="csv", version="")]

    trained(MODELS[model](), monitors := six(), loggers)

    tags = scalars(tmp_path / "board")
    header = (tmp_path / "csv" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert set(header) - {"epoch", "step"} == tags
    assert {monitor.label for monitor in monitors} <= {tag.partition("/")[0] for tag in tags}
    assert 30 < len(tags) <= MOST, sorted(tags)


@pytest.mark.parametrize("detail", ["core", "standard", "all"])
def test_the_tab_has_everything_at_any_detail(detail: Any, tmp_path: Path) -> None:
    monitor = GradientAnatomyMonitor(detail=detail)

    trained(perceptron(4), [monitor], TensorBoardLogger(tmp_path, name="", version=""))

    assert monitor.latest is not None
    vectors, known = written(tmp_path)
    for quantity, values in monitor.latest.values.items():
        tag = f"lowrank_vector/{quantity}"
        assert known[tag]["sites"] == [site or "whole model" for site in values]
        torch.testing.assert_close(vectors[tag][0].tolist(), list(values.values()), rtol=1e-6, atol=0, equal_nan=True)
    costs = known["lowrank_cost/anatomy"]["sites"]
    assert {"time_ms", "overhead_percent", "failures", "skipped_steps", "solver_calls"} <= set(costs)


@pytest.mark.parametrize("detail", ["core", "standard", "all"])
def test_single_sites_are_written_at_any_detail_if_asked_for(detail: Any) -> None:
    logger, monitor = MemoryLogger(), RankMonitor(["gradients"], detail=detail, per_site=True)

    trained(perceptron(130), [monitor], logger)

    assert len([tag for tag in logger.curves() if tag.startswith("gradient_stable_rank/")]) == 130


def test_each_detail_has_what_the_one_before_has_and_more() -> None:
    tags = []
    for detail in DETAILS:
        monitor = NTKMonitor(num_examples=2, num_projections=4, detail=detail)
        trained(perceptron(3), [monitor], logger := MemoryLogger())
        tags.append(set(logger.curves()))

    core, standard, everything = tags
    assert core < standard < everything
    assert not [tag for tag in standard if "_error" in tag] and [tag for tag in everything if "_error" in tag]


def test_what_the_core_leaves_out_can_be_watched_by_other_callbacks() -> None:
    """ModelCheckpoint and EarlyStopping look at `callback_metrics`."""
    monitor = RankMonitor(["weights"], ["stable_rank"])
    trainer = L.Trainer(
        max_steps=1,
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    trainer.fit(Classifier())

    assert {f"rank/weight_stable_rank_{end}" for end in ("min", "median", "max")} <= set(trainer.callback_metrics)


def test_a_name_goes_before_the_group_and_before_single_sites() -> None:
    logger = MemoryLogger()

    trained(perceptron(3), [RankMonitor(["weights"], ["stable_rank"], name="encoder", detail="standard")], logger)

    of_the_model = {f"encoder_rank/weight_stable_rank_{end}" for end in ("min", "median", "max")}
    assert of_the_model | {"encoder_weight_stable_rank/net.0.weight"} <= set(logger.curves())
    assert not [tag for tag in logger.curves() if tag.startswith(("rank/", "lowrank/rank_"))]


def test_an_unknown_detail_is_refused_with_what_there_is() -> None:
    from lightning_lowrank.reports.report import Style

    style = Style("rank")
    object.__setattr__(style, "detail", "everything")

    # Not by the constructor: the types that tests check there would speak first.
    with pytest.raises(ValueError, match=r"detail='everything' must be one of.*'core', 'standard', 'all'"):
        style.__post_init__()


@pytest.mark.parametrize(("detail", "there"), [("standard", False), ("all", True)])
def test_single_sites_by_themselves_are_of_what_is_shown(detail: Any, there: bool) -> None:
    """What chance gives is looked up, and never doubles the count."""
    logger = MemoryLogger()

    trained(perceptron(3), [MultifractalMonitor(detail=detail)], logger)

    assert "multifractal_dispersion/net.0.weight.in" in logger.curves()
    assert any("_chance" in tag for tag in logger.curves()) == there
