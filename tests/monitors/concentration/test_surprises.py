"""`ConcentrationMonitor` where models, trainings and files are not what one expects."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import ConcentrationMonitor, RankMonitor
from lightning_lowrank.monitors.concentration.source import Concentration
from tests.monitors.concentration.test_monitor import SILENT, Attending, values, watched
from tests.trainings import Classifier, MemoryLogger


class Unlucky(Classifier):
    """The loss of some steps is not a number; the weights are put back then."""

    lost = (3, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx in self.lost else loss

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **options: Any) -> None:
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        super().optimizer_step(epoch, batch_idx, *args, **options)
        if batch_idx in self.lost:
            self.load_state_dict(before)


def test_a_step_that_is_not_finite_is_a_gap_and_counted_as_by_the_rank_monitor() -> None:
    monitor, other = ConcentrationMonitor(every_n_steps=1), RankMonitor(["gradients"], every_n_steps=1)

    with pytest.warns(UserWarning, match="no number for"):
        logger = watched(Unlucky(Attending(), optimizer="sgd"), monitor, other)

    gaps = {step for step, value in logger.curve("gradient_stable_rank/net.out.weight").items() if math.isnan(value)}
    assert gaps == set(Unlucky.lost)
    for tag in (
        "module_gradient_gini",
        "neuron_gate_entropy",
        "head_importance/net.out.h0",
        "head_count",
        "weight_gini",
    ):
        curve = logger.curve(f"concentration_{tag}")
        assert {step for step, value in curve.items() if math.isnan(value)} == gaps, tag
    # The whole model and two heads, in two steps.
    assert monitor.failures == 6


@pytest.mark.parametrize(
    ("unit", "advice"), [("head", "heads=.*1 modules, 0 heads"), ("neuron", "neurons="), ("direction", "vectors")]
)
def test_units_that_are_named_and_not_there_are_refused_before_training(unit: str, advice: str) -> None:
    monitor = ConcentrationMonitor(["module", unit], ["gradient"], match="*.bias" if unit == "direction" else None)

    with pytest.raises(ValueError, match=f"no {unit}s are found; .*{advice}"):
        watched(Classifier(nn.Linear(64, 10)), monitor)


def test_what_the_model_has_never_had_is_absent_and_what_it_has_lost_is_a_gap() -> None:
    source, net = Concentration(), Attending()
    source.plan(nn.Linear(4, 3))
    without = source.absent
    source.load_state_dict({})
    source.plan(net)
    with_both = source.absent
    net.out.requires_grad_(False)
    source.plan(net)

    assert {name.split("_")[1] for name in without} == {"head", "neuron"}
    assert "concentration_head_importance" in without and "concentration_neuron_count" in without
    assert with_both == source.absent == set()


def test_named_units_that_are_frozen_may_thaw() -> None:
    module, monitor = Classifier(Attending()), ConcentrationMonitor(["head"], every_n_steps=1)
    module.net.out.requires_grad_(False)

    watched(module, monitor)

    assert monitor.failures == 0
    assert "0 heads" in monitor.recorders[0].probe.source.note()


class Lazy(Classifier):
    """Its layers get their shapes from the first batch."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(10)), "sgd")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("options", [{}, {"units": ["neuron"]}, {"neurons": ["net.2"]}])
def test_lazy_layers_are_read_once_they_have_a_shape(options: dict[str, Any]) -> None:
    monitor = ConcentrationMonitor(every_n_steps=1, **options)

    logger = watched(Lazy(), monitor)

    assert monitor.failures == 0
    assert values(logger, "neuron_count")[-7:].tolist() == [32] * 7
    assert values(logger, "neuron_gate_gini")[-7:].isfinite().all()


class WithNothing(nn.Module):
    """A parameter without entries, beside two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.nothing.sum()


def test_a_parameter_without_entries_is_left_out() -> None:
    monitor = ConcentrationMonitor(every_n_steps=4)

    logger = watched(Classifier(WithNothing()), monitor)

    assert monitor.failures == 0
    assert values(logger, "module_count").tolist() == [2, 2]
    assert values(logger, "module_gradient_gini").isfinite().all()


class Skipping(Classifier):
    """Attention is left out in every second step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if batch_idx % 2 == 0:
            return super().training_step(batch, batch_idx)
        x = batch[0].unflatten(-1, (8, 8))
        return cross_entropy(self.net.head((x + self.net.mlp(x)).flatten(1)), batch[1])


def test_a_head_that_was_not_used_has_a_gap_and_not_its_last_importance() -> None:
    monitor = ConcentrationMonitor(every_n_steps=1)

    with pytest.warns(UserWarning, match=r"2 of 3 sites, the first is 'net.out.h0'"):
        logger = watched(Skipping(Attending()), monitor)

    found = logger.curve("concentration_head_importance/net.out.h0")
    assert {step for step, value in found.items() if math.isnan(value)} == {1, 3, 5, 7}
    assert values(logger, "neuron_gate_gini").isfinite().all()
    assert monitor.failures == 8


def test_the_order_of_units_and_signals_is_no_other_monitor() -> None:
    one = ConcentrationMonitor(["head", "module", "head"], ["gate", "gradient"])
    other = ConcentrationMonitor(["module", "head"], ["gradient", "gate"])

    assert one.state_key == other.state_key
    assert len(set(one.recorders[0].quantities)) == len(one.recorders[0].quantities)


@pytest.mark.parametrize("densities", [[0.5, 0.5000001], [i / 300 for i in range(1, 300)]])
def test_masks_that_could_not_be_told_apart_are_refused(densities: list[float]) -> None:
    with pytest.raises(ValueError, match=r"densities=.*at most 255 different"):
        ConcentrationMonitor(densities=densities)


ODD: dict[str, Any] = {
    "a list": [1, 2],
    "no mapping of callbacks": {"callbacks": None},
    "probes that are a list": {"callbacks": {"M": {"probes": [1]}}},
    "no source": {"callbacks": {"M": {"probes": {"concentration": {}}}}},
    "a ledger without importances": {
        "callbacks": {"M": {"probes": {"concentration": {"source": {"ledgers": {"head_gate": {}}}}}}}
    },
    "what weights_only refuses": {"callbacks": {"M": Path("x")}},
}


@pytest.mark.parametrize("case", ODD)
def test_a_reference_of_another_kind_is_refused_when_it_is_made(case: str, tmp_path: Path) -> None:
    torch.save(ODD[case], tmp_path / "odd.ckpt")

    with pytest.raises(ValueError, match=r"reference=.*odd\.ckpt"):
        ConcentrationMonitor(reference=tmp_path / "odd.ckpt")


def checkpoint(module: L.LightningModule, folder: Path) -> Path:
    watched(module, ConcentrationMonitor(every_n_steps=1), ModelCheckpoint(folder), enable_checkpointing=True)
    return next(folder.glob("*.ckpt"))


def test_a_reference_with_other_numbers_of_heads_is_refused_before_training(tmp_path: Path) -> None:
    path = checkpoint(Classifier(Attending()), tmp_path)
    monitor = ConcentrationMonitor(["head"], ["gate"], heads={"net.out": 4}, reference=path)

    with pytest.raises(ValueError, match=r"'net.out': 2.* and here are .*'net.out': 4.*none in common"):
        watched(Classifier(Attending()), monitor)


def without_masks(state: dict[str, Any]) -> None:
    del state["tickets"]


def without_accounts(state: dict[str, Any]) -> None:
    del state["ledgers"]


def with_a_list_of_masks(state: dict[str, Any]) -> None:
    state["tickets"]["masks"] = list(state["tickets"]["masks"].values())


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.parametrize("change", [without_masks, without_accounts, with_a_list_of_masks])
def test_an_older_state_is_taken_as_far_as_it_goes(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path, module, logger = checkpoint(Classifier(), tmp_path), Classifier(), MemoryLogger()
    saved = torch.load(path, weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "concentration" in key)
    change(state["probes"]["concentration"]["source"])
    torch.save(saved, path)

    monitor = ConcentrationMonitor(every_n_steps=1)
    L.Trainer(**(SILENT | {"max_epochs": 2}), logger=logger, callbacks=[monitor]).fit(module, ckpt_path=path)

    assert monitor.failures == 0
    assert values(logger, "mask_hamming_0.5").isfinite().sum() >= 7
    assert values(logger, "neuron_gate_gini").isfinite().all()


class Stopped(Classifier):
    """Ctrl-C between the gradients and the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **options: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *args, **options)
        if batch_idx == 3:
            raise KeyboardInterrupt


def test_ctrl_c_in_a_sample_leaves_no_hook_and_no_copy_of_weights() -> None:
    module, monitor = Stopped(), ConcentrationMonitor(every_n_steps=1)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        watched(module, monitor)

    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in module.trainer.optimizers] == [0]
    source = monitor.recorders[0].probe.source
    assert isinstance(source, Concentration) and not source._before and not source._read


def test_a_second_run_of_another_model_begins_anew() -> None:
    monitor = ConcentrationMonitor(every_n_steps=4)
    watched(Classifier(Attending()), monitor)

    again = watched(Classifier(), monitor)

    alone = watched(Classifier(), ConcentrationMonitor(every_n_steps=4))
    tags = [tag for tag in alone.curves() if tag.startswith("concentration_")]
    assert_close(
        {tag: again.curve(tag) for tag in tags}, {tag: alone.curve(tag) for tag in tags}, rtol=0, atol=0, equal_nan=True
    )
    source = monitor.recorders[0].probe.source
    assert isinstance(source, Concentration) and "concentration_head_count" in source.absent


def test_nothing_is_written_of_units_that_the_model_has_not() -> None:
    mlp, transformer = (
        watched(module, ConcentrationMonitor(every_n_steps=4)) for module in (Classifier(), Classifier(Attending()))
    )

    assert not [tag for tag in mlp.curves() if "concentration_head" in tag]
    assert set(mlp.curves()) == {tag for tag in transformer.curves() if "concentration_head" not in tag}
    assert "concentration_neuron_gate_hill_exponent" in mlp.curves()
