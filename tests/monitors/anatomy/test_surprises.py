"""What users do to a module while its gradients' anatomy is watched; each was found by trying to break it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_lowrank import GradientAnatomyMonitor, Monitor, spiked_data
from lightning_lowrank.monitors.anatomy.pairs import PairTap
from lightning_lowrank.monitors.anatomy.spikes import outlier
from lightning_lowrank.monitors.anatomy.split import SHARES, Basis, Sides, alignment, anatomy
from tests.measuring.test_features import convnext, gpt2, swin
from tests.processes import together
from tests.promises.test_data_parallel import InOrder
from tests.trainings import Classifier, MemoryLogger, digits

SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.seed_everything(0, verbose=False)
    L.Trainer(**(SILENT | {"log_every_n_steps": 1} | options), logger=logger, callbacks=list(callbacks)).fit(module)
    return logger


def watched(module: L.LightningModule, **options: Any) -> tuple[Monitor, MemoryLogger]:
    monitor = GradientAnatomyMonitor(every_n_steps=1, per_site=True)
    return monitor, fit(module, monitor, **options)


def numbers_at(logger: MemoryLogger, site: str, step: int) -> dict[str, float]:
    """All of a site at a step that are not blank."""
    found = {
        tag.removeprefix("anatomy_"): curve.get(step, math.nan)
        for tag, curve in logger.curves().items()
        if tag.endswith(f"/{site}")
    }
    return {tag.removesuffix(f"/{site}"): value for tag, value in found.items() if not math.isnan(value)}


class Hidden(nn.Module):
    """A layer that is used as a test says, and a head."""

    def __init__(self, layer: nn.Module, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.use, self.head = layer, use, nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self.layer, x)))


class OneByOne(Classifier):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(4), batch_size=1)


NARROW: dict[str, Callable[[], Classifier]] = {
    "one row": OneByOne,
    "one input": lambda: Classifier(Hidden(nn.Linear(1, 32), lambda layer, x: layer(x[:, 20:21]))),
}


@pytest.mark.parametrize("case", NARROW)
def test_of_one_row_or_one_column_the_spike_is_blank_and_nothing_is_lost(case: str) -> None:
    monitor, logger = watched(NARROW[case]())

    assert monitor.failures == 0
    site = "net.0.weight" if case == "one row" else "net.layer.weight"
    found = numbers_at(logger, site, 2)
    assert found["deviation"] < 1e-5
    assert found["gradient_stable_rank"] == pytest.approx(1)
    assert not found.keys() & {"bulk_decay", "spike_strength", "gap_ratio", *(SHARES if case == "one row" else ())}


@pytest.mark.parametrize("axes", [(64,), (8, 8), (2, 8, 4), (2, 2, 4, 4)])
def test_the_inputs_of_a_linear_layer_are_last_whatever_stands_before(axes: tuple[int, ...]) -> None:
    *places, width = axes
    layer = nn.Linear(width, 32)
    whole = tuple(range(1, len(places) + 1))
    net = Hidden(layer, lambda layer, x: layer(x.unflatten(-1, axes)).sum(whole) if whole else layer(x))
    monitor, logger = watched(Classifier(net))

    assert monitor.failures == 0
    assert max(logger.curve("anatomy_deviation/net.layer.weight").values()) < 1e-5


@pytest.mark.parametrize("make", [convnext, swin, gpt2])
def test_layers_of_transformers_are_heard(make: Callable[[], nn.Module]) -> None:
    monitor, logger = watched(Classifier(make()))
    curves = {tag: curve for tag, curve in logger.curves().items() if tag.startswith("anatomy_deviation/")}

    assert monitor.failures == 0
    assert len(curves) >= 5
    assert max(value for curve in curves.values() for value in curve.values()) < 1e-4


def test_one_eigenvalue_tells_nothing() -> None:
    told = outlier(torch.ones(1, dtype=torch.float64), 1, 5, 1)

    assert not told.is_told
    assert told.gap.isnan() and told.nu.isnan() and told.alpha.isnan()


def test_a_gradient_of_zero_has_no_direction() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = anatomy(Sides(rows, torch.zeros(50, 6), torch.zeros(6, 8, dtype=torch.float64), 50), 2)

    assert found.top.isnan().all()
    assert found.values["alignment"].isnan() and found.values["low_rank_share"].isnan()
    assert found.values["gradient_stable_rank"] == 0


def test_the_start_is_the_first_gradient_that_is_not_zero() -> None:
    """The layer below a head that begins at zero learns nothing in the first step."""
    module = Classifier()
    nn.init.zeros_(module.net[2].weight)
    _, logger = watched(module)

    assert not numbers_at(logger, "net.0.weight", 0).keys() & {"stability", "stability_to_start", "alignment"}
    assert "stability_to_start" not in numbers_at(logger, "net.0.weight", 1)
    found = numbers_at(logger, "net.0.weight", 2)
    assert found["stability_to_start"] == found["stability"] > 0


def test_a_gradient_of_one_direction_aligns_by_that_one_alone() -> None:
    one = torch.eye(1, 5, dtype=torch.float64)
    both = Basis(torch.eye(2, 5, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    single = Basis(torch.eye(2, 5, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))

    assert alignment(single, both) == alignment(Basis(one, torch.ones(1, dtype=torch.float64)), both)
    assert alignment(single, both)["alignment"] == 1


class Wrong(Classifier):
    """A batch with a NaN, after which all weights are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0][0, 0] += torch.nan if batch_idx == 3 else 0
        return super().training_step(batch, batch_idx)


def test_a_gradient_that_is_not_finite_is_lost_and_counted() -> None:
    with pytest.warns(UserWarning, match="no number for 3 of 3 sites"):
        monitor, logger = watched(Wrong())

    assert monitor.failures == 3 * 5
    assert numbers_at(logger, "net.0.weight", 2) and not numbers_at(logger, "net.0.weight", 3)


UNHEARD: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "weight used alone": (lambda layer, x: F.linear(x, layer.weight), "its weight used without it"),
    "mapped": (lambda layer, x: torch.func.vmap(layer)(x), "called in a compiled or mapped function"),
    "by keyword": (lambda layer, x: layer(input=x), "is called by keyword"),
    "no rows": (lambda layer, x: layer(x[:0]).sum() + x[:, :32], "there was none"),
}


@pytest.mark.parametrize("case", UNHEARD)
def test_why_a_layer_was_not_heard_is_said(case: str) -> None:
    use, why = UNHEARD[case]
    with pytest.warns(UserWarning, match=f"no number for 1 of 3 sites, the first is 'net.layer.weight' .*{why}"):
        monitor, logger = watched(Classifier(Hidden(nn.Linear(64, 32), use)))

    assert monitor.failures == 8
    assert len(logger.curve("anatomy_deviation/net.head.weight")) == 8


def test_complex_weights_are_left_out() -> None:
    layer = nn.Linear(64, 32, dtype=torch.complex64)
    monitor, logger = watched(Classifier(Hidden(layer, lambda layer, x: layer(x.to(torch.complex64)).abs())))

    assert monitor.failures == 0
    assert {tag for tag in logger.curves() if tag.startswith("anatomy_deviation/")} == {
        "anatomy_deviation/net.head.weight"
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_leaves_the_others() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 32), nn.Tanh()))
    monitor, logger = watched(Classifier(Hidden(scripted, lambda layer, x: layer(x))))

    assert monitor.failures == 0
    assert len(logger.curve("anatomy_deviation/net.head.weight")) == 8


def test_weights_made_of_others_are_said_to_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    layer = parametrizations.weight_norm(nn.Linear(64, 32))
    with caplog.at_level("INFO"):
        watched(Classifier(Hidden(layer, lambda layer, x: layer(x))))

    assert "without 1 parametrised weight" in caplog.text


def test_where_all_weights_are_parametrised_the_refusal_says_so() -> None:
    with pytest.raises(ValueError, match="not complex, sharded or parametrised"):
        watched(Classifier(parametrizations.spectral_norm(nn.Linear(64, 10))))


def test_where_all_weights_are_frozen_the_loss_is_still_told() -> None:
    module = Classifier()
    for layer in (module.net[0], module.net[2]):
        layer.weight.requires_grad_(False)
    monitor, logger = watched(module)

    assert monitor.failures == 0
    assert_close(list(logger.curve("anatomy_loss").values()), module.losses)


@pytest.mark.parametrize("options", [{"max_rows": True}, {"max_rows": 0}, {"num_outputs": True}, {"num_outputs": 0}])
def test_what_is_no_count_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GradientAnatomyMonitor(**options)


class Expert(nn.Module):
    """One more head, that only some processes send rows to, or call in a way that is heard."""

    def __init__(self, *, has_rows: bool = True, is_heard: bool = True) -> None:
        super().__init__()
        self.layer, self.head, self.expert = nn.Linear(64, 32), nn.Linear(32, 10), nn.Linear(32, 10)
        self.has_rows, self.is_heard = has_rows, is_heard

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        if not self.has_rows:
            return self.head(hidden)
        return self.head(hidden) + (self.expert(hidden) if self.is_heard else self.expert(input=hidden))


def of_some(rank: int, size: int, root: Path) -> Any:
    """Failures and, on the first process, deviations of an expert that one process sends rows to, and of one that one
    cannot hear.
    """
    found = []
    for options in ({"has_rows": rank == 0}, {"has_rows": rank == 1}, {"is_heard": rank == 0}):
        monitor, logger = GradientAnatomyMonitor(every_n_steps=1, per_site=True), MemoryLogger()
        torch.manual_seed(0)
        settings = SILENT | {
            "devices": size,
            "strategy": "ddp_find_unused_parameters_true",
            "use_distributed_sampler": False,
        }
        L.Trainer(**settings, logger=logger, callbacks=[monitor]).fit(InOrder(rank, size, Expert(**options)))
        found.append((monitor.failures, logger.curve("anatomy_deviation/net.expert.weight")))
    return found


@pytest.mark.slow
def test_a_layer_that_one_process_has_no_rows_of_is_that_of_the_others_and_one_that_it_cannot_hear_is_lost(
    tmp_path: Path,
) -> None:
    first, second = together(of_some, tmp_path)

    assert [failures for failures, _ in first] == [failures for failures, _ in second] == [0, 0, 4]
    for _, curve in first[:2]:
        assert len(curve) == 4
        assert max(curve.values()) < 1e-5
    assert all(math.isnan(value) for value in first[2][1].values())


@pytest.mark.parametrize(
    "wrong", [{"num_rows": 0}, {"width": 0}, {"nu": math.nan}, {"alpha": math.inf}, {"dtype": torch.int64}]
)
def test_spiked_data_of_nothing_are_refused(wrong: dict[str, Any], generator: torch.Generator) -> None:
    options = {"num_rows": 5, "width": 4, "nu": 0.1, "generator": generator} | wrong

    with pytest.raises(ValueError, match=next(iter(wrong))):
        spiked_data(**options)


class PadsItself(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 2, 0, 2)), self.weight, self.bias, self.stride)


def test_a_convolution_that_pads_in_its_own_forward_is_refused_before_any_place_is_looked_up() -> None:
    layer = PadsItself(1, 4, 3)
    tap = PairTap(layer.weight, [layer])
    tap.attach(0, 16)

    layer(torch.ones(2, 1, 8, 8)).sum().backward()
    tap.detach()

    assert isinstance(tap.error, ValueError)
    assert "PadsItself" in str(tap.error)


DEPTHS: list[tuple[int, Any, int]] = [(3, "auto", 33), (12, "auto", 7), (15, "auto", 0), (12, True, 33), (12, False, 0)]


@pytest.mark.parametrize(("depth", "per_site", "curves"), DEPTHS)
def test_a_model_of_many_weights_has_curves_of_what_is_asked_first(depth: int, per_site: Any, curves: int) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth - 1)), nn.Linear(64, 10))

    logger = fit(Classifier(net), GradientAnatomyMonitor(every_n_steps=4, per_site=per_site))

    found = {tag for tag in logger.curves() if tag.endswith("/net.0.weight")}
    assert len([tag for tag in found if "_error" not in tag]) == curves
    assert ("anatomy_residue/net.0.weight" in found) == (curves > 0)
