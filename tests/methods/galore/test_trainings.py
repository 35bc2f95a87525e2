"""Trainings in low rank: what is kept, what monitors see, what clipping and scaling act on, and what is said."""

import logging
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import GaLore, Monitor, RankMonitor, watching
from lightning_lowrank.measuring.number_source import WHOLE_MODEL
from lightning_lowrank.methods.galore.matrix import LowRankMatrix
from lightning_lowrank.methods.galore.residual import limited
from lightning_lowrank.methods.matrices import matrices
from tests.trainings import QUIET, Classifier, ImageNet, MemoryLogger, Ordered, Quiet, digits, mlp

OPTIONS: dict[str, Any] = {"rank": 3, "update_every": 4, "every_n_steps": 1, "match": "*weight"}


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, MemoryLogger]:
    L.seed_everything(3, verbose=False)
    logger = MemoryLogger()
    trainer = L.Trainer(**QUIET | {"max_steps": 8, "logger": logger} | options, callbacks=list(callbacks))
    trainer.fit(module)
    return trainer, logger


def made(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp(32), **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def bytes_kept(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    states = [optimizer.state[p] for p in parameters]
    return sum(x.numel() * x.element_size() for state in states for x in state.values())


def test_the_bytes_of_the_table_are_those_that_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    module, galore = made(), GaLore(**OPTIONS, basis="subspace")
    with caplog.at_level(logging.INFO):
        trainer, logger = fit(module, galore)
    matrices = [p for p in module.parameters() if p.ndim == 2]

    kept = bytes_kept(trainer.optimizers[0], matrices)
    bases = 4 * 3 * (32 + 32 + 10)  # the short sides of 32 x 64, 40 x 32 and 10 x 40
    full = sum(2 * 4 * p.numel() + 4 for p in matrices)

    assert kept == sum(2 * 4 * 3 * max(p.shape) + 4 for p in matrices)
    assert logger.curve("galore/state_bytes")[7] == kept + bases
    assert f"optimizer state, bases included: {full:,} -> {kept + bases:,} bytes" in caplog.text
    assert "net.2.weight  40 x 32 as 40 x 3" in caplog.text


def test_what_is_left_out_is_said_and_a_mapping_gives_each_its_rank(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(made(), GaLore())
        fit(made(), GaLore({"*0.weight": 5, "*.weight": 0.5}))

    assert "left alone: net.4.weight (head)" in caplog.text
    for line in (
        "net.0.weight  32 x 64 as 8 x 64",
        "net.0.weight  32 x 64 as 5 x 64",
        "net.4.weight  10 x 40 as 5 x 40",
    ):
        assert line in caplog.text


def test_monitors_see_the_full_gradient_and_the_update_in_low_rank() -> None:
    asked = {
        "statistics": ["numerical_rank", "energy_rank_0.001"],
        "every_n_steps": 1,
        "per_site": True,
        "detail": "all",
    }
    alone = RankMonitor("gradients", **asked)
    fit(made(optimizer="sgd", lr=0.1), alone, max_steps=1)
    for order in (1, -1):
        monitor = RankMonitor(["gradients", "updates"], **asked)
        galore = GaLore(**OPTIONS)
        fit(made(optimizer="sgd", lr=0.1), *[galore, monitor][::order], max_steps=1)

        assert monitor.latest is not None and alone.latest is not None and monitor.failures == 0
        found = monitor.latest.values
        assert found["gradient_numerical_rank"] == alone.latest.values["gradient_numerical_rank"]
        assert set(found["update_energy_rank_0.001"].values()) <= {1, 2, 3}
        assert min(found["gradient_energy_rank_0.001"].values()) > 3


def test_steps_of_plain_sgd_stay_within_their_subspaces() -> None:
    module = made(optimizer="sgd", lr=0.1)
    before = weights(module)
    fit(module, GaLore(**OPTIONS | {"update_every": 100}))

    for name, p in module.named_parameters():
        if p.ndim == 2:
            values = torch.linalg.svdvals(p.detach() - before[name])
            # Each of the eight steps rounds the weights once.
            rounding = 8 * torch.finfo(p.dtype).eps * before[name].norm()
            assert values[2] > 100 * rounding and values[3] < rounding


class Clips(L.Callback):
    """Norms and gradients as they are clipped, and what the optimizer leaves."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.gradients: list[Tensor] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        found = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if found:
            self.norms.append(torch.cat([g.flatten() for g in found]).norm().item())
            self.gradients += [g.clone() for g in found]
            assert all(p.grad is None or p.grad.shape == p.shape for p in pl_module.parameters())


def test_clipping_by_norm_is_of_the_full_gradient_and_leaves_it_there() -> None:
    clips = Clips()

    fit(made(), GaLore(**OPTIONS), clips, gradient_clip_val=0.01)

    assert clips.norms == pytest.approx([0.01] * len(clips.norms), rel=1e-3) and len(clips.norms) > 5


def test_clipping_by_value_is_of_the_full_gradient() -> None:
    """By hand: one step of SGD on the projection of the clipped gradient."""
    module = made(optimizer="sgd", lr=0.1)
    before, seen = weights(module), {}

    class See(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            seen.update({name: p.grad.clamp(-0.002, 0.002) for name, p in pl_module.named_parameters()})

    fit(
        module,
        GaLore(**OPTIONS, basis="svd"),
        See(),
        max_steps=1,
        gradient_clip_val=0.002,
        gradient_clip_algorithm="value",
    )

    for name, p in module.named_parameters():
        if p.ndim == 2:
            u, s, v = torch.linalg.svd(seen[name], full_matrices=False)
            expected = before[name] - 0.25 * 0.1 * (u[:, :3] * s[:3]) @ v[:3]
            assert_close(p.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("optimizer", "residual"), [("AdamW", None), ("Adam", None), ("Adam", "fira")])
def test_a_grad_scaler_unscales_once(optimizer: str, residual: Any, fused: bool) -> None:
    """In a loop in float32, with a scale and without."""
    found = []
    for scale in (2.0**12, None):
        net = made().net
        stepper = getattr(torch.optim, optimizer)(net.parameters(), lr=1e-2, weight_decay=0.1, fused=fused, eps=1e-3)
        scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        with watching(net, stepper, GaLore(**OPTIONS, residual=residual)) as watch:
            for i in range(6):
                images, labels = digits(64)[8 * i : 8 * i + 8]
                with watch.batch():
                    stepper.zero_grad()
                    scaler.scale(cross_entropy(net(images), labels)).backward()
                    scaler.step(stepper)
                    scaler.update()
        found.append(weights(net))

    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def scaled() -> MixedPrecision:
    """Mixed precision whose first step overflows."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-8))


@pytest.mark.parametrize("residual", [None, "fira"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_changes_no_weight(fused: bool, residual: Any) -> None:
    module, options = made(fused=fused), OPTIONS | {"residual": residual}
    before = weights(module)

    fit(module, GaLore(**options), plugins=[scaled()], max_steps=1, limit_train_batches=1, max_epochs=1)
    first = weights(module)
    fit(module, GaLore(**options), plugins=[scaled()], max_steps=6, max_epochs=1)

    assert_close(first, before, rtol=0, atol=0)
    assert all(p.isfinite().all() for p in module.parameters()) and not torch.equal(
        module.net[0].weight, before["net.0.weight"]
    )


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("at", [0, 4])
def test_a_gradient_without_directions_refreshes_nothing_and_the_next_one_does(at: int, value: float) -> None:
    net = nn.Linear(12, 8, bias=False)
    optimizer, galore = torch.optim.SGD(net.parameters(), lr=0.0), GaLore(2, 4, match="*", side="left", stagger=False)
    with watching(net, optimizer, galore) as watch:
        refreshes = []
        for i in range(8):
            with watch.batch():
                generator = torch.Generator().manual_seed(i)
                drawn = torch.randn(8, 12, generator=generator)
                net.weight.grad = torch.full_like(drawn, value) if i == at else drawn
                optimizer.step()
            refreshes.append(watch.state_dict()["monitors"]["GaLore"]["act"]["weight"]["num_refreshes"])

    assert refreshes == ([0, 1, 1, 1, 2, 2, 2, 2] if at == 0 else [1, 1, 1, 1, 1, 2, 2, 2])


def test_moments_that_are_empty_get_no_rounding_of_both_sides() -> None:
    """Bases of its own gradient make a diagonal of it, and Adam would make full steps of what is rounded off it."""
    net = nn.Linear(12, 8, bias=False)
    optimizer, counts = torch.optim.AdamW(net.parameters()), []
    galore = GaLore(3, 2, match="*", side="both", basis="svd", on_refresh="reset", stagger=False)
    with watching(net, optimizer, galore) as watch:
        for i in range(4):
            with watch.batch():
                net.weight.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(i))
                optimizer.step()
            counts.append(int(optimizer.state[net.weight]["exp_avg"].count_nonzero()))

    assert counts == [3, 9, 3, 9]


def test_staggered_refreshes_are_one_at_a_time() -> None:
    module, counts = made(), []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append([m["num_refreshes"] for m in galore.state_dict()["act"].values()])

    galore = GaLore(**OPTIONS | {"update_every": 6})
    fit(module, galore, Count(), max_steps=14)

    steps = [sum(now) - sum(before) for before, now in pairwise(counts)]
    assert sum(counts[0]) == 3 and max(steps) == 1 and sum(steps) == 6


def test_curves_stand_beside_chance_and_the_best() -> None:
    galore = GaLore(**OPTIONS, detail="all", per_site=True, stagger=False, basis="svd")

    trainer, logger = fit(made(), galore)

    captured, best = (logger.curve(f"galore_captured{end}/net.0.weight") for end in ("", "_best"))
    assert logger.curve("galore_captured_random/net.0.weight")[7] == pytest.approx(3 / 32)
    assert captured[0] == pytest.approx(best[0], rel=1e-5) and captured[4] == pytest.approx(best[4], rel=1e-5)
    assert all(3 / 32 < captured[i] < best[i] for i in (1, 2, 3, 5, 6, 7))
    assert 0 < logger.curve("galore_staleness/net.0.weight")[4] < 1
    assert 0 < logger.curve("galore_overlap/net.0.weight")[4] < 1
    assert logger.curve("galore/refreshes")[7] == 6 and logger.curve("galore/refresh_time_ms")[4] > 0
    assert galore.failures == 0 and "galore/captured_median" in trainer.callback_metrics
    assert galore.latest is not None and WHOLE_MODEL in galore.latest.values["galore_state_bytes"]


def test_by_default_loggers_get_what_must_be_read_together() -> None:
    _, logger = fit(made(), GaLore(every_n_steps=1))

    medians = {f"galore/captured{end}_median" for end in ("", "_best", "_random")}
    assert {tag for tag in logger.tags() if tag.startswith("galore")} == medians | {"galore/state_bytes"}


def test_kernels_of_convolutions_are_matrices() -> None:
    module = Classifier(ImageNet())

    trainer, _ = fit(module, GaLore(2, 4, match="*convolution.weight"))

    kernel = module.net.convolution.weight
    assert kernel.shape == (8, 1, 3, 3) and trainer.optimizers[0].state[kernel]["exp_avg"].shape == (2, 9)


def test_moments_of_a_run_without_it_begin_anew() -> None:
    net = made().net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    cross_entropy(net(digits().tensors[0]), digits().tensors[1]).backward()
    optimizer.step()

    with watching(net, optimizer, GaLore(**OPTIONS)) as watch, watch.batch():
        optimizer.step()

    assert [optimizer.state[p]["step"] for p in net.parameters()] == [1 if p.ndim == 2 else 2 for p in net.parameters()]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_full_moments_is_resumed_with_new_ones_for_the_matrices(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    quiet = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    fit(Ordered(mlp(32)), keep, max_steps=3, **quiet)
    (path,) = tmp_path.glob("*.ckpt")
    module = Ordered(mlp(32))
    trainer = L.Trainer(**QUIET, max_steps=8, logger=False, num_sanity_val_steps=0, callbacks=[GaLore(**OPTIONS)])

    trainer.fit(module, ckpt_path=path)

    states = trainer.optimizers[0].state
    assert [int(states[p]["step"]) for p in module.parameters()] == [5, 8] * 3


class Whole(Ordered):
    """Drops moments of low rank when it is resumed, if it is told to."""

    def __init__(self, drops: bool) -> None:
        super().__init__(mlp(32))
        self.drops, self.dropped = drops, 0

    def on_train_start(self) -> None:
        if self.drops:
            self.dropped = GaLore.drop_state(*self.trainer.optimizers)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("drops", [True, False])
def test_a_run_goes_on_without_it_once_its_moments_are_dropped(drops: bool, tmp_path: Path) -> None:
    keep, quiet = ModelCheckpoint(tmp_path, every_n_train_steps=3), {"num_sanity_val_steps": 0}
    fit(Ordered(mlp(32)), keep, GaLore(**OPTIONS), max_steps=3, enable_checkpointing=True, **quiet)
    (path,) = tmp_path.glob("*.ckpt")
    module = Whole(drops)
    trainer = L.Trainer(**QUIET, max_steps=8, logger=False, **quiet)

    with nullcontext() if drops else pytest.raises(RuntimeError, match="size"):
        trainer.fit(module, ckpt_path=path)

    if drops:
        states = trainer.optimizers[0].state
        assert [int(states[p]["step"]) for p in module.parameters()] == [5, 8] * 3 and module.dropped == 3
        assert all(states[p]["exp_avg"].shape == p.shape for p in module.parameters())


def test_the_measured_rank_is_that_of_the_first_samples_of_a_monitor(caplog: pytest.LogCaptureFixture) -> None:
    """Of gradients 0, 2 and 4: the largest energy rank, up to a quarter of the short side."""
    options: dict[str, Any] = {"match": "*weight", "stagger": False, "every_n_steps": 1}
    monitor = RankMonitor("gradients", statistics="energy_rank", every_n_steps=2, per_site=True)
    with caplog.at_level(logging.INFO):
        trainer, logger = fit(made(), GaLore("measured", 2, 1.0, **options), monitor, max_steps=6)

    for tag, p in trainer.lightning_module.named_parameters():
        if p.ndim == 2:
            curve = logger.curve(f"gradient_energy_rank/{tag}")
            seen = [int(curve[step]) for step in (0, 2, 4)]
            begun, moment = round(min(p.shape) / 4), trainer.optimizers[0].state[p]
            rank = min(max(seen), begun)
            assert min(moment["exp_avg"].shape) == rank and moment["step"] == (6 if rank == begun else 2)
            assert f"bytes (energy ranks {seen[0]}, {seen[1]}, {seen[2]})" in caplog.text
    assert "the ranks have been measured: 3 matrices" in caplog.text
    assert any(
        p.ndim == 2 and min(p.shape) > 4 * min(s["exp_avg"].shape) for p, s in trainer.optimizers[0].state.items()
    )


def test_the_norm_of_a_residual_grows_by_a_hundredth_at_most_and_outlives_what_has_none() -> None:
    """Norms over the rate: 1; 10, which is cut; none of a rate of 0, of zeros and of infinities; and 1, let through."""
    one = torch.tensor([[0.6, 0.8]])
    last, found = torch.tensor(float("inf")), []
    for step, rate in ((one, 1.0), (5 * one, 0.5), (0 * one, 0.0), (0 * one, 1.0), (one / 0, 1.0), (0.1 * one, 0.1)):
        step, last = limited(step, rate, last)
        found.append(step.norm().item() / (rate or 1.0))

    assert found == pytest.approx([1, 1.01, 0, 0, 0, 1]) and last == pytest.approx(1.0)


def test_lack_of_memory_in_a_projection_leaves_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made().net
    optimizer, before = torch.optim.AdamW(net.parameters()), weights(net)

    narrow = LowRankMatrix.narrow

    def fail(self: LowRankMatrix, *given: Any) -> Tensor:
        if self.name == "4.weight":
            raise torch.OutOfMemoryError("none left")
        return narrow(self, *given)

    with watching(net, optimizer, GaLore(**OPTIONS)) as watch, watch.batch():
        cross_entropy(net(digits().tensors[0]), digits().tensors[1]).backward()
        monkeypatch.setattr(LowRankMatrix, "narrow", fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()

        assert_close(weights(net), before, rtol=0, atol=0)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_parameters_without_a_shape_or_of_complex_numbers_are_no_matrices() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 8, dtype=torch.complex64), nn.Linear(8, 8))

    assert list(matrices(net, "*", None).matrices) == ["2.weight"]


class Chain(torch.optim.AdamW):
    """Hands its step on, so that hooks are called twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_subclass_whose_step_calls_its_parents_steps_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    found = []
    for kind in (torch.optim.AdamW, Chain):
        net = made().net
        optimizer = kind(net.parameters(), lr=1e-2)
        with watching(net, optimizer, GaLore(**OPTIONS)) as watch:
            for i in range(3):
                with watch.batch():
                    images, labels = digits(64)[8 * i : 8 * i + 8]
                    cross_entropy(net(images), labels).backward()
                    optimizer.step()
        found.append(weights(net))

    assert_close(found[0], found[1], rtol=0, atol=0)


def test_schedulers_and_groups_are_followed() -> None:
    """At full rank plain SGD is the same in any basis."""

    class Grouped(Classifier):
        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            groups = [{"params": [first], "lr": 0.05, "weight_decay": 0.1}, {"params": others, "momentum": 0.9}]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"},
            }

    found = []
    for callbacks in ([], [GaLore(1.0, 100, 1.0, match="*weight")]):
        torch.manual_seed(0)
        module = Grouped(mlp(32))
        fit(module, *callbacks)
        found.append(weights(module))

    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_it_is_a_monitor_that_can_be_shown() -> None:
    assert repr(GaLore(rank=8, basis="svd")) == "GaLore(rank=8, basis='svd')" and isinstance(GaLore(), Monitor)


def test_it_acts_in_barebones_too() -> None:
    module = Quiet(mlp(32))
    trainer = L.Trainer(barebones=True, max_steps=2, callbacks=[GaLore(**OPTIONS)])

    trainer.fit(module)

    assert trainer.optimizers[0].state[module.net[0].weight]["exp_avg"].shape == (3, 64)
