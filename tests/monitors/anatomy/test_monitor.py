"""`GradientAnatomyMonitor`: both sides of a layer's gradient are heard as they are, and the numbers are those of the
sides.
"""

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
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from lightning_lowrank import GradientAnatomyMonitor, Monitor, NotLowRankAlert, ResidueSuppressedAlert, spiked_data
from lightning_lowrank.monitors.anatomy.pairs import Pairs, PairTap, as_matrix
from lightning_lowrank.monitors.anatomy.spikes import outlier
from lightning_lowrank.monitors.anatomy.split import SHARES, Basis, Sides, alignment, anatomy
from tests.processes import together
from tests.trainings import (
    Adversaries,
    Checkpointed,
    Classifier,
    Finetuned,
    ImageNet,
    InOrder,
    MemoryLogger,
    Tied,
    convnext,
    digits,
    gpt2,
    half,
    swin,
)

SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


def watched(
    module: L.LightningModule, monitor: Monitor | None = None, *others: L.Callback, **options: Any
) -> tuple[Monitor, MemoryLogger]:
    monitor, logger = monitor or GradientAnatomyMonitor(every_n_steps=1, per_site=True, detail="all"), MemoryLogger()
    L.seed_everything(0, verbose=False)
    L.Trainer(**(SILENT | {"logger": logger} | options), callbacks=[monitor, *others]).fit(module)
    return monitor, logger


def heard(layers: list[nn.Module], forward: Callable[[], Tensor], max_rows: int = 4096) -> tuple[Pairs, Tensor]:
    """Both sides, and the gradient, of one step."""
    weight = layers[0].weight
    assert isinstance(weight, nn.Parameter)
    weight.grad = None
    tap = PairTap(weight, layers)
    tap.attach(0, max_rows)
    forward().backward()
    tap.detach()
    tap.close()
    assert tap.gradient is not None
    pairs = tap.take()
    assert pairs is not None
    return pairs, as_matrix(layers[0], tap.gradient)


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "one by one": (nn.Conv2d(3, 5, 1), (4, 3, 6, 7)),
    "three by three": (nn.Conv2d(3, 5, 3), (4, 3, 6, 7)),
    "strided, padded, dilated": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 3, 9, 8)),
    "same, reflected": (nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (4, 3, 6, 7)),
    "over a line": (nn.Conv1d(3, 5, 4, stride=2, padding=1), (4, 3, 11)),
    "without a batch": (nn.Conv2d(3, 5, 3), (3, 6, 7)),
    "linear": (nn.Linear(6, 4), (9, 6)),
    "transposed, of transformers": (Conv1D(4, 6), (3, 5, 6)),
    "linear over sequences": (nn.Linear(6, 4, bias=False), (3, 5, 2, 6)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_product_of_both_sides_is_the_gradient(case: str) -> None:
    layer, shape = CONVOLUTIONS[case]
    pairs, gradient = heard([layer], lambda: layer(draws(*shape)).sin().sum())

    assert len(pairs.inputs) == pairs.num_rows
    assert_close(pairs.signals.mT @ pairs.inputs, gradient, rtol=1e-4, atol=1e-4)
    assert_close(pairs.product, gradient @ pairs.probes, rtol=1e-4, atol=1e-4)


def test_all_calls_of_a_reused_layer_count() -> None:
    layer = nn.Linear(6, 6)
    pairs, gradient = heard([layer], lambda: layer(torch.tanh(layer(draws(3, 6)))).sin().sum())

    assert pairs.num_rows == 6
    assert_close(pairs.signals.mT @ pairs.inputs, gradient, rtol=1e-4, atol=1e-5)


def test_calls_that_the_loss_does_not_depend_on_do_not_count() -> None:
    layer = nn.Linear(6, 6)

    def forward() -> Tensor:
        layer(draws(50, 6))
        return layer(draws(3, 6)).sum()

    assert heard([layer], forward)[0].num_rows == 3


def test_an_activation_that_works_in_place_does_not_matter() -> None:
    layer = nn.Linear(6, 6)
    pairs, gradient = heard([layer], lambda: F.relu(layer(draws(9, 6)), inplace=True).square().sum())

    assert_close(pairs.signals.mT @ pairs.inputs, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_rows", [16, 100])
@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 1, bias=False)], ids=["linear", "convolution"]
)
def test_a_sample_has_the_same_rows_on_both_sides(layer: nn.Module, max_rows: int) -> None:
    """The signal of half the square of the output is the output."""
    shape = (300, 6) if isinstance(layer, nn.Linear) else (10, 6, 5, 6)
    pairs, gradient = heard([layer], lambda: 0.5 * layer(draws(*shape)).square().sum(), max_rows)

    assert len(pairs.inputs) == len(pairs.signals) == max_rows
    assert pairs.num_rows == 300
    assert_close(pairs.signals, pairs.inputs @ layer.weight.detach().flatten(1).mT)
    assert_close(pairs.product, gradient @ pairs.probes, rtol=1e-4, atol=1e-3)


def test_all_rows_of_all_calls_have_the_same_chance_to_be_kept() -> None:
    layer = nn.Linear(1, 1)
    kept = torch.zeros(60)
    for seed in range(300):
        tap = PairTap(layer.weight, [layer])
        tap.attach(seed, 20)
        sum(layer(rows[:, None]).sum() for rows in torch.arange(60.0).split([10, 45, 5])).backward()
        tap.detach()
        pairs = tap.take()
        assert pairs is not None and len(pairs.inputs) == 20
        kept[pairs.inputs[:, 0].long()] += 1

    # Binomial, of mean 100 and deviation 8.2.
    assert kept.min() > 100 - 4 * 8.2
    assert kept.max() < 100 + 4 * 8.2


class Twice(nn.Module):
    """A checkpointed layer that is used outside of the checkpoint too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layer, torch.relu(self.layer(x)), use_reentrant=False))


HEARD: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any]]] = {
    "plain": (Classifier, {}),
    "images": (lambda: Classifier(ImageNet()), {}),
    "accumulation": (Classifier, {"accumulate_grad_batches": 4}),
    "clipping": (Classifier, {"gradient_clip_val": 0.01}),
    "tied": (lambda: Classifier(Tied()), {}),
    "checkpoint": (lambda: Classifier(Checkpointed(False)), {}),
    "reentrant checkpoint": (lambda: Classifier(Checkpointed(True)), {}),
    "twice, once in a checkpoint": (lambda: Classifier(Twice()), {}),
    "LBFGS": (lambda: Classifier(optimizer="lbfgs", max_iter=3), {}),
    "two optimizers": (Adversaries, {}),
    "two optimizers in turn": (lambda: Adversaries(every=3), {}),
    "unfrozen backbone": (Finetuned, {}),
}


@pytest.mark.parametrize("case", HEARD)
def test_in_any_training_the_product_is_the_gradient(case: str) -> None:
    make, options = HEARD[case]
    monitor, logger = watched(make(), **options)

    assert monitor.failures == 0
    curves = {tag: curve for tag, curve in logger.curves().items() if tag.startswith("anatomy_deviation/")}
    assert curves and all(curves.values())
    # The critic's loss has a square of its weights in it, which is in no row.
    apart = {tag for tag, curve in curves.items() if max(curve.values()) > 1e-4}
    assert apart == ({"anatomy_deviation/critic.weight"} if "optimizers" in case else set())


@pytest.mark.parametrize(
    ("options", "bound"), [({"precision": "bf16-mixed"}, 0.02), ({"precision": "bf16-true"}, 0.02), ("half", 0.002)]
)
def test_in_half_precision_the_product_is_the_gradient_but_for_rounding(options: Any, bound: float) -> None:
    monitor, logger = watched(Classifier(), **({"plugins": half()} if options == "half" else options))

    assert monitor.failures == 0
    assert 0 < max(logger.curve("anatomy_deviation/net.0.weight").values()) < bound
    assert all(value == value for value in logger.curve("anatomy_residue/net.0.weight").values())


class Sides0(L.Callback):
    """Both sides of the first layer, by hooks and gradients of its own."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kept: list[Sides] = []
        layer = module.net[0]
        layer.register_forward_hook(lambda _, inputs, output: self.hear(inputs[0], output))

    def hear(self, inputs: Tensor, output: Tensor) -> None:
        self.inputs = inputs.detach().clone()
        output.register_hook(lambda gradient: setattr(self, "signals", gradient.clone()))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.kept.append(Sides(self.inputs, self.signals, module.net[0].weight.grad.clone(), len(self.inputs)))


def test_numbers_are_those_of_both_sides() -> None:
    sides, module = Sides0(), Classifier()
    _, logger = watched(module, None, sides)

    for step, kept in enumerate(sides.kept):
        for name, value in anatomy(kept, 10).values.items():
            if not value.isnan():
                assert_close(logger.curve(f"anatomy_{name}/net.0.weight")[step], value.item(), rtol=1e-3, atol=1e-4)
    assert_close(list(logger.curve("anatomy/loss").values()), module.losses)


def test_shares_of_a_layer_sum_to_one() -> None:
    _, logger = watched(Classifier())

    for site in ("net.0.weight", "net.2.weight"):
        rows = zip(*(logger.curve(f"anatomy_{share}/{site}").values() for share in SHARES), strict=True)
        assert_close([sum(row) for row in rows], [1.0] * 8, rtol=0, atol=1e-10)


class Functional(nn.Module):
    """Uses a weight also without its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.linear(torch.relu(self.layer(x)), self.layer.weight)))


def test_a_gradient_that_is_not_the_product_leaves_a_blank() -> None:
    monitor, _ = watched(Classifier(Functional()))
    assert monitor.latest is not None
    values = {name: sites.get("net.layer.weight") for name, sites in monitor.latest.values.items()}

    assert values["anatomy_deviation"] > 0.05
    assert all(values[f"anatomy_{share}"] != values[f"anatomy_{share}"] for share in SHARES)
    assert values["anatomy_gradient_stable_rank"] >= 1


@pytest.mark.parametrize("how", ["module", "layer"])
def test_layers_inside_a_compiled_module_are_refused(how: str) -> None:
    module = Classifier()
    (module if how == "module" else module.net).compile(backend="eager")

    with pytest.raises(ValueError, match="cannot be measured, since hooks inside a compiled module never run"):
        watched(module)


@pytest.mark.parametrize("options", [{"match": "*.bias"}, {"match": "nothing"}, {"max_rows": 3}, {"num_outputs": 11}])
def test_what_cannot_be_had_is_refused_before_training(options: dict[str, Any]) -> None:
    module = Classifier()

    with pytest.raises(ValueError, match=next(iter(options))):
        watched(module, GradientAnatomyMonitor(**options, detail="all"))
    assert not module.losses


class Named(nn.Module):
    """Calls a layer by the name of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(input=x)))


def test_a_layer_that_cannot_be_heard_costs_its_numbers_alone() -> None:
    with pytest.warns(UserWarning, match=r"no number for 1 of 3 sites, the first is 'net.layer.weight'"):
        monitor, logger = watched(module := Classifier(Named()))

    assert len(module.losses) == 8
    assert monitor.failures == 1
    assert len(logger.curve("anatomy_residue/net.head.weight")) == 8


class Planted(L.LightningModule):
    """A layer whose signals are planted: of the residue at first, of the spike after `change` steps."""

    def __init__(self, change: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.data, self.change, self.layer = (
            spiked_data(256, 40, nu=0.3, generator=draw, dtype=torch.float32),
            change,
            nn.Linear(40, 30),
        )
        residue, spike = torch.linalg.qr(torch.randn(30, 2, generator=draw))[0].mT
        along = F.normalize(self.data.bulk @ torch.randn(40, generator=draw), dim=0)
        noise = F.normalize(torch.randn(256, generator=draw), dim=0)
        at = F.normalize(self.data.coordinates, dim=0)
        self.signals = torch.outer(along, residue), torch.outer(2 * noise, residue) + torch.outer(at, spike)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(self.data.inputs) * self.signals[self.global_step >= self.change]).sum()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(8)), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize(("change", "steps"), [(4, [4]), (0, []), (100, [])])
def test_going_from_residue_to_spike_is_an_event(change: int, steps: list[int]) -> None:
    """A gradient that the spike ruled from the start has gone nowhere."""
    monitor, logger = watched(
        Planted(change), GradientAnatomyMonitor(every_n_steps=1, num_outputs=1, per_site=True, detail="all")
    )

    assert [(event.step, event.severity) for event in monitor.events] == [(step, "info") for step in steps]
    dominance = list(logger.curve("anatomy_spike_dominance/layer.weight").values())
    assert all(value > 0.6 if step >= change else value < 0.4 for step, value in enumerate(dominance))


def test_a_suppressed_residue_and_a_full_rank_are_warned_of() -> None:
    alerts = [ResidueSuppressedAlert(actions=["log"]), NotLowRankAlert(below=1.1, actions=["log"])]
    monitor, _ = watched(
        Planted(0), GradientAnatomyMonitor(every_n_steps=1, num_outputs=1, alerts=alerts, detail="all")
    )

    assert {event.rule for event in monitor.events} == {"anatomy_spike_dominance_above", "anatomy_low_rank_share_below"}
    assert all(event.step == 2 for event in monitor.events)


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
def test_the_top_direction_is_followed_from_the_start_through_a_restart(tmp_path: Path) -> None:
    def run(steps: int, resume: Any = None) -> MemoryLogger:
        monitor, logger = (
            GradientAnatomyMonitor(every_n_steps=1, num_outputs=1, per_site=True, detail="all"),
            MemoryLogger(),
        )
        torch.manual_seed(0)
        trainer = L.Trainer(**(SILENT | {"max_epochs": -1}), max_steps=steps, logger=logger, callbacks=[monitor])
        trainer.fit(Planted(4), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return logger

    whole = run(8)
    run(3)
    rest = run(8, tmp_path / "run.ckpt")
    for quantity in ("stability", "stability_to_start", "phase_shift"):
        tag = f"anatomy_{quantity}/layer.weight"
        expected = {step: value for step, value in whole.curve(tag).items() if step >= 3}
        assert_close(rest.curve(tag), expected)
        assert len(expected) == 5


def across(rank: int, size: int, root: Path) -> Any:
    """One training, watched, on one process or several."""
    curves = {}
    for max_rows in (2048, 16):
        L.seed_everything(0, verbose=False)
        monitor, logger = (
            GradientAnatomyMonitor(every_n_steps=1, per_site=True, max_rows=max_rows, detail="all"),
            MemoryLogger(),
        )
        strategy = "ddp" if size > 1 else "auto"
        settings = SILENT | {
            "devices": size,
            "strategy": strategy,
            "use_distributed_sampler": False,
            "accumulate_grad_batches": 2,
        }
        L.Trainer(**settings, logger=logger, callbacks=[monitor]).fit(InOrder(rank, size))
        curves[max_rows] = (
            {tag: c for tag, c in logger.curves().items() if tag.startswith("anatomy")},
            monitor.failures,
        )
    return curves


@pytest.mark.slow
def test_two_processes_find_what_one_finds_on_the_same_batches(tmp_path: Path) -> None:
    first, second = together(across, tmp_path)
    alone = across(0, 1, tmp_path)

    assert not second[2048][0] and first[16][1] == first[2048][1] == second[16][1] == 0
    assert max(v for tag, c in first[16][0].items() if tag.startswith("anatomy_deviation/") for v in c.values()) < 1e-4
    assert first[2048][0].keys() == alone[2048][0].keys()
    for tag, curve in alone[2048][0].items():
        assert_close(
            first[2048][0][tag], curve, rtol=1e-2, atol=1e-3, equal_nan=True, msg=lambda text, tag=tag: f"{tag}: {text}"
        )


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
    with pytest.warns(UserWarning, match="no number since step 3 .weights are NaN"):
        monitor, logger = watched(Wrong())

    assert monitor.failures == 3 * 5
    assert numbers_at(logger, "net.0.weight", 2) and not numbers_at(logger, "net.0.weight", 3)


UNHEARD: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "weight used alone": (lambda layer, x: F.linear(x, layer.weight), "its weight was used without the layer"),
    "mapped": (lambda layer, x: torch.func.vmap(layer)(x), "called in a compiled or mapped function"),
    "by keyword": (lambda layer, x: layer(input=x), "is called with keyword arguments"),
    "no rows": (lambda layer, x: layer(x[:0]).sum() + x[:, :32], "the batch had none"),
}


@pytest.mark.parametrize("case", UNHEARD)
def test_why_a_layer_was_not_heard_is_said(case: str) -> None:
    use, why = UNHEARD[case]
    with pytest.warns(UserWarning, match=f"no number for 1 of 3 sites, the first is 'net.layer.weight' .*{why}"):
        monitor, logger = watched(Classifier(Hidden(nn.Linear(64, 32), use)))

    assert monitor.failures == 1
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
    assert_close(list(logger.curve("anatomy/loss").values()), module.losses)


@pytest.mark.parametrize("options", [{"max_rows": True}, {"max_rows": 0}, {"num_outputs": True}, {"num_outputs": 0}])
def test_what_is_no_count_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GradientAnatomyMonitor(**options, detail="all")


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
        monitor, logger = GradientAnatomyMonitor(every_n_steps=1, per_site=True, detail="all"), MemoryLogger()
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

    assert [failures for failures, _ in first] == [failures for failures, _ in second] == [0, 0, 1]
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

    _, logger = watched(Classifier(net), GradientAnatomyMonitor(every_n_steps=4, per_site=per_site, detail="all"))

    found = {tag for tag in logger.curves() if tag.endswith("/net.0.weight")}
    assert len([tag for tag in found if "_error" not in tag]) == curves
    assert ("anatomy_residue/net.0.weight" in found) == (curves > 0)


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
