"""`ConcentrationMonitor`: who carries the learning, in real trainings."""

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

from lightning_lowrank import ConcentrationMonitor, EarlyBirdAlert, Monitor, RankMonitor
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.source import Batch, Step
from lightning_lowrank.monitors.concentration.inequality import gini, matthew_slope, top_share
from lightning_lowrank.monitors.concentration.source import Concentration
from lightning_lowrank.watching.loops import LoopTraining
from tests.processes import together
from tests.sharded import Sharded
from tests.sharded import trained as trained_sharded
from tests.trainings import (
    Adversaries,
    Attending,
    Classifier,
    MemoryLogger,
    Tied,
    half,
    trained,
)

SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


class Seen(L.Callback):
    """Weights and gradients before each step, and weights after."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.before.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})
        self.gradients.append(
            {name: p.grad.double().clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


def watched(module: L.LightningModule, monitor: Monitor, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.seed_everything(0, verbose=False)
    L.Trainer(**(SILENT | options), logger=logger, callbacks=[monitor, *callbacks]).fit(module)
    return logger


def values(logger: MemoryLogger, tag: str) -> Tensor:
    return torch.tensor(list(logger.curve(full(tag)).values()), dtype=torch.float64)


def full(tag: str) -> str:
    """Of the whole model in the monitor's group, of a site under its own."""
    return f"concentration_{tag}" if "/" in tag else f"concentration/{tag}"


def gates(seen: Seen, name: str, count: int) -> Tensor:
    """Of blocks of columns, by samples: straight from the formula."""
    both = [
        (b[name] * g[name]).sum(0).view(count, -1).sum(1).abs()
        for b, g in zip(seen.before, seen.gradients, strict=True)
    ]
    return torch.stack(both)


def test_heads_and_neurons_are_judged_by_their_gates() -> None:
    seen = Seen()

    logger = watched(Classifier(Attending()), ConcentrationMonitor(every_n_steps=1, detail="all"), seen)

    for unit, name, count in (("head", "net.out.weight", 2), ("neuron", "net.mlp.2.weight", 64)):
        importance = gates(seen, name, count)
        assert values(logger, f"{unit}_count").tolist() == [count] * 8
        assert_close(values(logger, f"{unit}_gate_gini"), gini(importance), rtol=1e-5, atol=1e-7)
        assert_close(values(logger, f"{unit}_gate_gini_start"), gini(importance)[:1].expand(8), rtol=1e-5, atol=1e-7)
    assert_close(
        values(logger, "head_importance/net.out.h1")[0], gates(seen, "net.out.weight", 2)[0, 1], rtol=1e-5, atol=1e-9
    )


def test_modules_are_judged_by_mean_squares_of_gradient_and_update() -> None:
    seen = Seen()

    logger = watched(
        Classifier(), ConcentrationMonitor(["module"], ["gradient", "update"], every_n_steps=1, detail="all"), seen
    )

    updates = [
        {name: after[name] - before[name] for name in after}
        for after, before in zip(seen.after, seen.before, strict=True)
    ]
    for signal, tensors in (("gradient", seen.gradients), ("update", updates)):
        layers = [
            [torch.cat([t[f"net.{i}.weight"].flatten(), t[f"net.{i}.bias"]]).square().mean() for i in (0, 2)]
            for t in tensors
        ]
        energies = torch.stack([torch.stack(row) for row in layers])
        assert_close(values(logger, f"module_{signal}_top_share"), top_share(energies), rtol=1e-3, atol=1e-6)


def test_growth_is_held_against_the_samples_before_without_itself() -> None:
    seen = Seen()

    logger = watched(
        Classifier(Attending()), ConcentrationMonitor(["neuron"], ["gate"], every_n_steps=1, detail="all"), seen
    )

    importance = gates(seen, "net.mlp.2.weight", 64)
    found = values(logger, "neuron_gate_matthew_slope")
    assert found[0].isnan()
    expected = torch.stack([matthew_slope(importance[:i].sum(0), importance[i]) for i in range(1, 8)])
    assert_close(found[1:], expected, rtol=1e-3, atol=1e-4)


def test_directions_are_the_squared_singular_values_of_all_matrices() -> None:
    seen = Seen()

    logger = watched(
        Classifier(), ConcentrationMonitor(["direction"], ["gradient"], every_n_steps=1, detail="all"), seen
    )

    spectra = [
        torch.cat([torch.linalg.svdvals(g[f"net.{i}.weight"]).square() / g[f"net.{i}.weight"].numel() for i in (0, 2)])
        for g in seen.gradients
    ]
    assert_close(
        values(logger, "direction_gradient_gini"), torch.stack([gini(s) for s in spectra]), rtol=1e-4, atol=1e-6
    )
    assert values(logger, "direction_count").tolist() == [42] * 8


def test_masks_are_those_of_the_weights_before_the_step() -> None:
    seen = Seen()

    logger = watched(Classifier(), ConcentrationMonitor(every_n_steps=1, densities=[0.25], detail="all"), seen)

    flat = [torch.cat([w[f"net.{i}.weight"].flatten() for i in (0, 2)]).abs() for w in seen.before]
    masks = [row >= row.sort().values[-round(0.25 * len(row))] for row in flat]
    expected = torch.stack([(mask != masks[0]).double().mean() for mask in masks])
    assert_close(values(logger, "mask_hamming_start_0.25"), expected, rtol=1e-6, atol=1e-6)
    assert_close(values(logger, "mask_hamming_0.25")[3], (masks[3] != masks[2]).double().mean(), rtol=1e-6, atol=1e-6)
    assert values(logger, "mask_hamming_chance_0.25").tolist() == pytest.approx([0.375] * 8)
    assert_close(values(logger, "weight_gini"), gini(torch.stack(flat)), rtol=1e-5, atol=1e-6)


class Settling(Classifier):
    """It learns in the first two steps."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0


def test_a_settled_mask_is_an_event() -> None:
    monitor = ConcentrationMonitor(every_n_steps=1, alerts=[EarlyBirdAlert(actions=["log"])], detail="all")

    watched(Settling(), monitor)

    assert [(event.state, event.severity, event.step) for event in monitor.events] == [("firing", "info", 4)]


@pytest.mark.parametrize("rate", [1e-5, 1e-2])
def test_samples_close_together_are_no_settled_mask(rate: float) -> None:
    monitor = ConcentrationMonitor(every_n_steps=1, alerts=[EarlyBirdAlert(actions=["log"])], detail="all")

    watched(Classifier(lr=rate), monitor, max_epochs=3)

    assert monitor.events == []


def test_a_model_of_any_size_has_about_a_hundred_numbers() -> None:
    logger = watched(Classifier(Attending()), ConcentrationMonitor(every_n_steps=4, detail="all"))

    tags = [tag for tag in logger.curves() if "concentration" in tag]
    assert len(tags) < 140


def of(net: nn.Module, fill: float | None, **options: Any) -> dict[str, float]:
    """Numbers of one sample in which all gradients have one value, or are as they come."""
    source, optimizer = Concentration(**options), torch.optim.SGD(net.parameters(), lr=0.1)
    source.plan(LoopTraining(net))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) if fill is None else torch.full_like(parameter, fill)
    step = Step(optimizer, frozenset(map(id, net.parameters())))
    source.batch_begins(Batch(LoopTraining(net), None, 0, 0))
    source.gradients_final(step)
    source.step_done(step)
    return {name: float(value) for name, value in source.numbers(Team())[0].values.items()}


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_a_sample_with_gradients_that_are_not_finite_has_no_number_at_all(fill: float) -> None:
    found = of(nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 3)), fill)

    assert all(map(math.isnan, found.values()))


def test_gradients_of_zero_give_no_inequality() -> None:
    found = of(nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 3)), 0.0)

    assert found["concentration_neuron_count"] == 60
    assert all(
        math.isnan(found[f"concentration_{unit}_gradient_{name}"])
        for unit in ("module", "neuron")
        for name in ("gini", "entropy")
    )
    assert all(
        math.isnan(found[f"concentration_neuron_gate_{name}"]) for name in ("gini", "hill_exponent", "top_share")
    )


def test_one_neuron_is_no_inequality() -> None:
    found = of(nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)), None)

    assert found["concentration_neuron_count"] == 1
    assert math.isnan(found["concentration_neuron_gate_gini"])


def test_a_step_that_is_not_finite_enters_no_account() -> None:
    source, net = (
        Concentration(["module"], ["gradient"]),
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 2)),
    )
    step = Step(torch.optim.SGD(net.parameters(), lr=0.1), frozenset(map(id, net.parameters())))
    source.plan(LoopTraining(net))
    states = []
    for fill in (1.0, math.inf, 2.0):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, fill)
        source.gradients_final(step)
        source.numbers(Team())
        states.append(source.state_dict()["ledgers"]["module_gradient"]["sums"])

    assert [float(state["1"]) for state in states] == [1, 1, 5]


def test_a_layer_of_another_size_begins_anew() -> None:
    source = Concentration(["neuron"], ["gate"], densities=[0.5])
    for width in (8, 8, 12):
        net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        source.plan(LoopTraining(net))
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        source.batch_begins(Batch(LoopTraining(net), None, 0, 0))
        source.gradients_final(Step(torch.optim.SGD(net.parameters(), lr=0.1), frozenset(map(id, net.parameters()))))
        found = source.numbers(Team())[0].values

    assert float(found["concentration_neuron_gate_overlap_start"]) == 1
    assert float(found["concentration_mask_hamming_start_0.5"]) == 0
    assert "concentration_neuron_gate_matthew_slope" not in found


def test_what_goes_wrong_in_a_sample_costs_its_numbers_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def odd(*_: Any) -> Any:
        raise RuntimeError("odd")

    without = trained(Classifier, {}, [], tmp_path / "without")
    monitor = ConcentrationMonitor(every_n_steps=2, detail="all")
    monkeypatch.setattr(Concentration, "gradients_final", odd)
    with pytest.warns(UserWarning, match="RuntimeError: odd"):
        with_it = trained(Classifier, {}, [monitor], tmp_path / "with")

    assert_close(with_it, without, rtol=0, atol=0, equal_nan=True)
    assert monitor.failures > 0


def test_frozen_and_unused_layers_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))
    net[2].requires_grad_(False)

    logger = watched(Classifier(net), ConcentrationMonitor(every_n_steps=4, detail="all"))

    assert values(logger, "module_count").tolist() == [2, 2]
    assert values(logger, "neuron_count").tolist() == [12, 12]


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"plugins": half()}, {"precision": "bf16-mixed"}])
def test_accumulation_and_half_precision_give_numbers(options: dict[str, Any]) -> None:
    monitor = ConcentrationMonitor(every_n_steps=1, detail="all")

    logger = watched(Classifier(Attending(), optimizer="sgd", lr=0.01), monitor, **options)

    assert monitor.failures == 0
    assert values(logger, "neuron_gate_gini")[-1] > 0
    reference = watched(
        Classifier(Attending(), optimizer="sgd", lr=0.01), ConcentrationMonitor(every_n_steps=1, detail="all")
    )
    if "plugins" in options:  # the scale of the loss is taken out, and the first steps are skipped
        heads = values(logger, "head_importance/net.out.h0")
        assert heads[0] / values(reference, "head_importance/net.out.h0")[0] < 10


@pytest.mark.parametrize("module", [lambda: Adversaries(every=3), lambda: Classifier(Tied())])
def test_other_ways_of_training_give_numbers(module: Callable[[], L.LightningModule]) -> None:
    monitor = ConcentrationMonitor(every_n_steps=2, detail="all")

    logger = watched(module(), monitor)

    assert monitor.failures == 0
    assert values(logger, "module_count").numel() > 1


def test_a_reference_says_whether_the_same_units_matter(tmp_path: Path) -> None:
    first = Classifier(Attending())
    watched(
        first, ConcentrationMonitor(every_n_steps=1, detail="all"), ModelCheckpoint(tmp_path), enable_checkpointing=True
    )
    (path,) = tmp_path.glob("*.ckpt")
    second = Classifier(Attending(), lr=1e-4)
    second.load_state_dict(first.state_dict())

    logger = watched(second, ConcentrationMonitor(every_n_steps=1, reference=path, detail="all"))

    assert values(logger, "neuron_gate_rank_reference")[-1] > 0.3
    assert values(logger, "neuron_gate_overlap_reference")[-1] > values(logger, "neuron_gate_overlap_chance")[-1]


def test_a_reference_of_another_model_is_refused_before_training(tmp_path: Path) -> None:
    watched(
        Classifier(),
        ConcentrationMonitor(every_n_steps=4, detail="all"),
        ModelCheckpoint(tmp_path),
        enable_checkpointing=True,
    )
    (path,) = tmp_path.glob("*.ckpt")

    with pytest.raises(ValueError, match=r"reference.*none in common"):
        watched(Classifier(Attending()), ConcentrationMonitor(reference=path, detail="all"))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an unknown unit": (lambda _: ConcentrationMonitor(["layer"], detail="all"), "units=.*layer.*module"),
    "no unit": (lambda _: ConcentrationMonitor([], detail="all"), "units=.*one or more"),
    "a string": (lambda _: ConcentrationMonitor("head", detail="all"), "units='head'"),
    "an unknown signal": (lambda _: ConcentrationMonitor(signals=["loss"], detail="all"), "signals=.*loss.*gate"),
    "gates of modules": (lambda _: ConcentrationMonitor(["module"], ["gate"], detail="all"), "have no gates"),
    "a density of one": (lambda _: ConcentrationMonitor(densities=[1.0], detail="all"), "densities=.*below 1"),
    "the same density": (lambda _: ConcentrationMonitor(densities=[0.5, 0.5], detail="all"), "densities=.*different"),
    "no file": (
        lambda root: ConcentrationMonitor(reference=root / "none.ckpt", detail="all"),
        "reference=.*none.ckpt.*No such file",
    ),
    "never due": (lambda _: ConcentrationMonitor(every_n_steps=0, detail="all"), "every_n_steps=0.*at least 1"),
    "a cadence and a budget": (
        lambda _: ConcentrationMonitor(every_n_steps=2, max_overhead=0.01, detail="all"),
        "every_n_steps=2 and max_overhead",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_refused_when_it_is_made(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_reference_without_gates_is_refused_when_it_is_made(tmp_path: Path) -> None:
    monitor = ConcentrationMonitor(signals=["gradient"], every_n_steps=4, detail="all")
    watched(Classifier(), monitor, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")

    with pytest.raises(ValueError, match="had no gates of heads or neurons"):
        ConcentrationMonitor(reference=path, detail="all")


def test_a_reference_for_a_monitor_without_gates_is_refused_when_it_is_made(tmp_path: Path) -> None:
    watched(
        Classifier(),
        ConcentrationMonitor(every_n_steps=4, detail="all"),
        ModelCheckpoint(tmp_path),
        enable_checkpointing=True,
    )
    (path,) = tmp_path.glob("*.ckpt")

    with pytest.raises(ValueError, match=r"signals=\['gradient'\] include none of these"):
        ConcentrationMonitor(signals=["gradient"], reference=path, detail="all")


def test_a_checkpoint_that_was_not_watched_is_no_reference(tmp_path: Path) -> None:
    torch.save({"callbacks": {"other": {}}}, tmp_path / "other.ckpt")

    with pytest.raises(ValueError, match=r"no ConcentrationMonitor watched that run.*other"):
        ConcentrationMonitor(reference=tmp_path / "other.ckpt", detail="all")


@pytest.mark.parametrize(
    ("option", "value"),
    [("match", "*.attention"), ("exclude", "*.attention"), ("neurons", "*.fc2"), ("heads", {"*.o": 2})],
)
def test_a_pattern_that_fits_nothing_is_refused_before_training(option: str, value: Any) -> None:
    monitor = ConcentrationMonitor(**{option: value}, detail="all")

    with pytest.raises(ValueError, match=f"{option}: .*matches nothing"):
        watched(Classifier(), monitor)


def sharded(rank: int, size: int, root: Path) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    try:
        trained_sharded(
            Sharded(), ConcentrationMonitor(detail="all"), MemoryLogger(), root, strategy=strategy, devices=size
        )
    except ValueError as error:
        return str(error)
    return "no word"


@pytest.mark.slow
def test_sharded_parameters_are_refused_before_training(tmp_path: Path) -> None:
    for said in together(sharded, tmp_path):
        assert "is sharded" in said and "DDP" in said


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
    monitor, other = (
        ConcentrationMonitor(every_n_steps=1, detail="all"),
        RankMonitor(["gradients"], every_n_steps=1, detail="all"),
    )

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
        curve = logger.curve(full(tag))
        assert {step for step, value in curve.items() if math.isnan(value)} == gaps, tag
    # The whole model and two heads, in two steps.
    assert monitor.failures == 6


@pytest.mark.parametrize(
    ("unit", "advice"), [("head", "heads=.*1 modules, 0 heads"), ("neuron", "neurons="), ("direction", "vectors")]
)
def test_units_that_are_named_and_not_there_are_refused_before_training(unit: str, advice: str) -> None:
    monitor = ConcentrationMonitor(
        ["module", unit], ["gradient"], match="*.bias" if unit == "direction" else None, detail="all"
    )

    with pytest.raises(ValueError, match=f"found no {unit}s; .*{advice}"):
        watched(Classifier(nn.Linear(64, 10)), monitor)


def test_what_the_model_has_never_had_is_absent_and_what_it_has_lost_is_a_gap() -> None:
    source, net = Concentration(), Attending()
    source.plan(LoopTraining(nn.Linear(4, 3)))
    without = source.absent
    source.load_state_dict({})
    source.plan(LoopTraining(net))
    with_both = source.absent
    net.out.requires_grad_(False)
    source.plan(LoopTraining(net))

    assert {name.split("_")[1] for name in without} == {"head", "neuron"}
    assert "concentration_head_importance" in without and "concentration_neuron_count" in without
    assert with_both == source.absent == set()


def test_named_units_that_are_frozen_may_thaw() -> None:
    module, monitor = Classifier(Attending()), ConcentrationMonitor(["head"], every_n_steps=1, detail="all")
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
    monitor = ConcentrationMonitor(every_n_steps=1, **options, detail="all")

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
    monitor = ConcentrationMonitor(every_n_steps=4, detail="all")

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
    monitor = ConcentrationMonitor(every_n_steps=1, detail="all")

    with pytest.warns(UserWarning, match=r"2 of 3 sites, the first is 'net.out.h0'"):
        logger = watched(Skipping(Attending()), monitor)

    found = logger.curve("concentration_head_importance/net.out.h0")
    assert {step for step, value in found.items() if math.isnan(value)} == {1, 3, 5, 7}
    assert values(logger, "neuron_gate_gini").isfinite().all()
    assert monitor.failures == 8


def test_the_order_of_units_and_signals_is_no_other_monitor() -> None:
    one = ConcentrationMonitor(["head", "module", "head"], ["gate", "gradient"], detail="all")
    other = ConcentrationMonitor(["module", "head"], ["gradient", "gate"], detail="all")

    assert one.state_dict()["quantities"] == other.state_dict()["quantities"]
    assert len(set(one.recorders[0].quantities)) == len(one.recorders[0].quantities)


@pytest.mark.parametrize("densities", [[0.5, 0.5000001], [i / 300 for i in range(1, 300)]])
def test_masks_that_could_not_be_told_apart_are_refused(densities: list[float]) -> None:
    with pytest.raises(ValueError, match=r"densities=.*at most 255 different"):
        ConcentrationMonitor(densities=densities, detail="all")


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
        ConcentrationMonitor(reference=tmp_path / "odd.ckpt", detail="all")


def checkpoint(module: L.LightningModule, folder: Path) -> Path:
    watched(
        module, ConcentrationMonitor(every_n_steps=1, detail="all"), ModelCheckpoint(folder), enable_checkpointing=True
    )
    return next(folder.glob("*.ckpt"))


def test_a_reference_with_other_numbers_of_heads_is_refused_before_training(tmp_path: Path) -> None:
    path = checkpoint(Classifier(Attending()), tmp_path)
    monitor = ConcentrationMonitor(["head"], ["gate"], heads={"net.out": 4}, reference=path, detail="all")

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
    (state,) = (state for key, state in saved["callbacks"].items() if "Concentration" in key)
    change(state["probes"]["concentration"]["source"])
    torch.save(saved, path)

    monitor = ConcentrationMonitor(every_n_steps=1, detail="all")
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
    module, monitor = Stopped(), ConcentrationMonitor(every_n_steps=1, detail="all")

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        watched(module, monitor)

    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in module.trainer.optimizers] == [0]
    source = monitor.recorders[0].probe.source
    assert isinstance(source, Concentration) and not source._before and not source._read


def test_a_second_run_of_another_model_begins_anew() -> None:
    monitor = ConcentrationMonitor(every_n_steps=4, detail="all")
    watched(Classifier(Attending()), monitor)

    again = watched(Classifier(), monitor)

    alone = watched(Classifier(), ConcentrationMonitor(every_n_steps=4, detail="all"))
    tags = [tag for tag in alone.curves() if tag.startswith("concentration")]
    assert_close(
        {tag: again.curve(tag) for tag in tags}, {tag: alone.curve(tag) for tag in tags}, rtol=0, atol=0, equal_nan=True
    )
    source = monitor.recorders[0].probe.source
    assert isinstance(source, Concentration) and "concentration_head_count" in source.absent


def test_nothing_is_written_of_units_that_the_model_has_not() -> None:
    mlp, transformer = (
        watched(module, ConcentrationMonitor(every_n_steps=4, detail="all"))
        for module in (Classifier(), Classifier(Attending()))
    )

    assert not [tag for tag in mlp.curves() if tag.startswith(("concentration/head", "concentration_head"))]
    assert set(mlp.curves()) == {
        tag for tag in transformer.curves() if not tag.startswith(("concentration/head", "concentration_head"))
    }
    assert "concentration/neuron_gate_hill_exponent" in mlp.curves()
