"""A loop of the user's own gives the numbers of the same run in a Trainer, bit for bit.

Oracle: Lightning's own loop, which shares nothing with these loops but the monitors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_lowrank import (
    ActivationMonitor,
    Alert,
    ConcentrationMonitor,
    CoordinateCheckMonitor,
    CurvatureMonitor,
    DormantUnitsMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NoiseScaleMonitor,
    NTKMonitor,
    RankMonitor,
    RepresentationMonitor,
    RouterMonitor,
    watching,
)
from tests.processes import together
from tests.trainings import Adversaries, Classifier, MemoryLogger, digits

SOURCES = ["gradients", "weights", "updates", "displacement", "optimizer_state", "features"]
STEPS = 7


def loss_of(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1])


MONITORS: dict[str, Callable[[], Monitor]] = {
    "rank": lambda: RankMonitor(SOURCES, every_n_steps=2, detail="all"),
    "curvature": lambda: CurvatureMonitor("standard", every_n_steps=2, detail="all", loss_fn=loss_of),
    "ntk": lambda: NTKMonitor(every_n_steps=2, detail="all", loss_fn=loss_of),
    "multifractal": lambda: MultifractalMonitor(every_n_steps=2, detail="all"),
    "anatomy": lambda: GradientAnatomyMonitor(every_n_steps=2, detail="all"),
    "concentration": lambda: ConcentrationMonitor(every_n_steps=2, detail="all"),
    "dormant units": lambda: DormantUnitsMonitor(every_n_steps=2, detail="all"),
    "activation": lambda: ActivationMonitor(every_n_steps=2, detail="all"),
    "representation": lambda: RepresentationMonitor(every_n_steps=2, detail="all"),
    "classes": lambda: RepresentationMonitor(every_n_steps=2, detail="all", classifier="net.2", name="classes"),
    "coordinate check": lambda: CoordinateCheckMonitor(every_n_steps=2, detail="all"),
    "router": lambda: RouterMonitor(every_n_steps=2, match="type:Linear", top_k=2, detail="all"),
    "noise scale": lambda: NoiseScaleMonitor(every_n_steps=2, detail="all", loss_fn=loss_of),
}
# What a clock says.
TIMES = ("time_ms", "overhead_percent")


class Net(nn.Module):
    """The layers of `Classifier`, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Ordered(Classifier):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=8)


def curves(logger: MemoryLogger) -> dict[str, dict[int, float]]:
    return {tag: curve for tag, curve in logger.curves().items() if not tag.endswith(TIMES)}


def in_trainer(monitor: Monitor, steps: int = STEPS, **options: Any) -> tuple[dict[str, Any], list[Tensor]]:
    torch.manual_seed(0)
    module, logger = Ordered(optimizer=options.pop("optimizer", "adamw")), MemoryLogger()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_steps=steps, logger=logger, callbacks=[monitor], **quiet, **options).fit(module)
    return curves(logger), [p.detach() for p in module.parameters()]


def in_loop(
    monitor: Monitor,
    steps: int = STEPS,
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    scaler: Any = None,
    fused: Any = None,
) -> tuple[dict[str, Any], list[Tensor]]:
    torch.manual_seed(0)
    net, logger = Net(), MemoryLogger()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    with watching(net, optimizer, monitor, loggers=[logger]) as watch:
        for i, batch in enumerate(DataLoader(digits(), batch_size=8)):
            if i == steps * accumulate:
                break
            with watch.batch(batch):
                loss = watch.loss(loss_of(net, batch)) / accumulate
                (scaler.scale(loss) if scaler else loss).backward()
                if i % accumulate == accumulate - 1:
                    if clip:
                        watch.gradients()
                        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                    if scaler:
                        scaler.step(optimizer)
                        scaler.update()
                    else:
                        optimizer.step()
                    optimizer.zero_grad()
    return curves(logger), [p.detach() for p in net.parameters()]


def assert_same(found: tuple[dict[str, Any], list[Tensor]], expected: tuple[dict[str, Any], list[Tensor]]) -> None:
    assert found[0].keys() == expected[0].keys()
    for tag, curve in expected[0].items():
        torch.testing.assert_close(found[0][tag], curve, rtol=0, atol=0, equal_nan=True, msg=tag)
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("name", MONITORS)
def test_a_plain_loop_gives_the_numbers_of_a_trainer(name: str) -> None:
    assert_same(in_loop(MONITORS[name]()), in_trainer(MONITORS[name]()))


def test_the_live_loss_is_seen_as_in_a_trainer() -> None:
    def monitor() -> Monitor:
        return CurvatureMonitor(every_n_steps=2, detail="standard")

    found, expected = in_loop(monitor()), in_trainer(monitor())
    # It takes replays, for which a loop has no step.
    for curves_of_one, _ in (found, expected):
        for tag in ("curvature/difference_defect", "curvature/valid", "lowrank/alert/curvature_valid_below"):
            curves_of_one.pop(tag, None)

    assert_same(found, expected)


@pytest.mark.parametrize("name", ["rank", "anatomy", "concentration"])
def test_accumulation_is_seen_as_in_a_trainer(name: str) -> None:
    found = in_loop(MONITORS[name](), 3, accumulate=2)

    assert_same(found, in_trainer(MONITORS[name](), 3, accumulate_grad_batches=2))


@pytest.mark.parametrize("name", ["rank", "anatomy", "concentration"])
def test_gradients_shown_before_clipping_are_those_of_a_trainer(name: str) -> None:
    found = in_loop(MONITORS[name](), clip=0.1)

    assert_same(found, in_trainer(MONITORS[name](), gradient_clip_val=0.1))


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaled_loss_gives_the_numbers_of_an_unscaled_one(fused: bool | None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    found, _ = in_loop(MONITORS["rank"](), scaler=scaler, fused=fused)
    expected, _ = in_loop(MONITORS["rank"](), fused=fused)

    assert found.keys() == expected.keys()
    for tag in expected:
        torch.testing.assert_close(found[tag], expected[tag], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_step_that_a_scaler_skips_is_no_sample() -> None:
    net, logger = Net(), MemoryLogger()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with watching(net, optimizer, RankMonitor("updates", every_n_steps=1), loggers=[logger]) as watch:
        for i in range(3):
            with watch.batch():
                scaler.scale(net(torch.ones(2, 64)).sum() * (torch.inf if i == 1 else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    assert [step for step, _ in logger.rows] == [0, 1]


def test_two_optimizers_are_seen_as_in_a_trainer() -> None:
    def monitor() -> Monitor:
        return RankMonitor(["gradients", "updates"], every_n_steps=2, detail="all")

    torch.manual_seed(0)
    module, logger = Adversaries(), MemoryLogger()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, logger=logger, callbacks=[monitor()], **quiet).fit(module)

    torch.manual_seed(0)
    net, own = Adversaries(), MemoryLogger()
    first, second = net.configure_optimizers()
    with watching(net, [first, second], monitor(), loggers=[own]) as watch:
        for batch in DataLoader(digits(), batch_size=8):
            with watch.batch(batch):
                real, fake = batch[0], net.generator(batch[0].roll(1, 0))
                loss = net.critic(fake.detach()).mean() - net.critic(real).mean() + net.critic.weight.square().sum()
                second.zero_grad()
                loss.backward()
                second.step()
                first.zero_grad()
                (-net.critic(fake).mean()).backward()
                first.step()

    assert_same((curves(own), list(net.parameters())), (curves(logger), list(module.parameters())))


@pytest.mark.parametrize("name", MONITORS)
def test_fabric_gives_the_numbers_of_a_trainer(name: str) -> None:
    fabric, logger = Fabric(accelerator="cpu", devices=1), MemoryLogger()
    torch.manual_seed(0)
    plain = Net()
    net, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    with watching(net, optimizer, MONITORS[name](), loggers=[logger]) as watch:
        for i, batch in enumerate(fabric.setup_dataloaders(DataLoader(digits(), batch_size=8))):
            if i == STEPS:
                break
            with watch.batch(batch):
                fabric.backward(watch.loss(loss_of(net, batch)))
                optimizer.step()
                optimizer.zero_grad()

    assert_same((curves(logger), [p.detach() for p in plain.parameters()]), in_trainer(MONITORS[name]()))


def test_fabric_shows_the_live_loss() -> None:
    fabric, monitor = Fabric(accelerator="cpu", devices=1), CurvatureMonitor(every_n_steps=2, detail="all")
    net, optimizer = fabric.setup(plain := Net(), torch.optim.AdamW(plain.parameters(), lr=1e-2))
    with watching(net, optimizer, monitor) as watch:
        for batch in list(DataLoader(digits(), batch_size=8))[:STEPS]:
            with watch.batch(batch):
                fabric.backward(watch.loss(loss_of(net, batch)))
                optimizer.step()
                optimizer.zero_grad()

    assert monitor.failures == 0
    assert monitor.latest is not None and np.isfinite(monitor.latest.values["batch_sharpness"][""])


def test_a_loss_that_is_never_shown_is_said_with_what_to_do() -> None:
    net, monitor = Net(), CurvatureMonitor(every_n_steps=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loop() -> None:
        with watching(net, optimizer, monitor) as watch:
            for batch in list(DataLoader(digits(), batch_size=8))[:STEPS]:
                with watch.batch(batch):
                    loss_of(net, batch).backward()
                    optimizer.step()

    with pytest.warns(UserWarning, match=r"call watch\.loss") as caught:
        loop()

    assert len([w for w in caught if "lightning_lowrank" in str(w.message)]) == 1


def test_a_batch_that_fails_is_no_sample_and_those_after_it_are() -> None:
    net, logger = Net(), MemoryLogger()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    monitors = [RankMonitor(SOURCES, every_n_steps=1), GradientAnatomyMonitor(every_n_steps=1)]
    with watching(net, optimizer, *monitors, loggers=[logger]) as watch:
        for i, batch in enumerate(list(DataLoader(digits(), batch_size=8))[:STEPS]):
            try:
                with watch.batch(batch):
                    loss = watch.loss(loss_of(net, batch))
                    if i == 2:
                        raise MemoryError
                    loss.backward()
                    optimizer.step()
            except MemoryError:
                optimizer.zero_grad()
            assert not any(part._forward_hooks for part in net.modules())

    assert list(logger.curve("rank/gradient_stable_rank_median")) == list(range(STEPS - 1))
    assert [monitor.failures for monitor in monitors] == [0, 0]


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "is not a monitor; expected watching": ((RankMonitor,), {}),
    "put a star before it": (([RankMonitor()],), {}),
    "a list of loggers": ((RankMonitor(),), {"loggers": "runs"}),
    "must be a list of loggers, such as": ((RankMonitor(),), {"loggers": MemoryLogger()}),
    "a logger needs a method log_metrics": ((RankMonitor(),), {"loggers": ["runs"]}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_in_words(message: str) -> None:
    monitors, options = WRONG[message]
    net = Net()
    make = watching.__wrapped__  # type: ignore[attr-defined]
    function = getattr(make, "__wrapped__", make)  # without the type checks of the tests
    with pytest.raises(ValueError, match=message):
        next(function(net, torch.optim.SGD(net.parameters(), lr=0.1), *monitors, **options))


def test_a_loop_that_shows_no_batch_is_told_so() -> None:
    net = Net()
    with (
        pytest.warns(UserWarning, match=r"no batch was seen.*with watch\.batch"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), RankMonitor()),
    ):
        pass


@pytest.mark.parametrize("name", MONITORS)
def test_a_loop_that_is_resumed_goes_on_as_if_it_had_not_stopped(name: str) -> None:
    expected = in_loop(MONITORS[name]())

    torch.manual_seed(0)
    net, logger = Net(), MemoryLogger()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batches = list(DataLoader(digits(), batch_size=8))[:STEPS]
    saved: dict[str, Any] = {}
    for part in (batches[:4], batches[4:]):
        with watching(net, optimizer, MONITORS[name](), loggers=[logger]) as watch:
            if saved:
                watch.load_state_dict(saved)
            for batch in part:
                with watch.batch(batch):
                    watch.loss(loss_of(net, batch)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            saved = watch.state_dict()

    assert_same((curves(logger), [p.detach() for p in net.parameters()]), expected)


def test_an_alert_stops_the_loop_and_saves() -> None:
    net, saved = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rule = Alert("weight_stable_rank", below=1e9, for_samples=1, warm_up_samples=0, actions=["stop", "checkpoint"])
    steps = 0
    monitor = RankMonitor("weights", every_n_steps=1, alerts=[rule])
    with watching(net, optimizer, monitor, save_checkpoint=saved.append) as watch:
        while not watch.should_stop and steps < 5:
            with watch.batch():
                net(torch.ones(2, 64)).sum().backward()
                optimizer.step()
            steps += 1

    assert (steps, len(saved), len(monitor.events)) == (1, 1, 1)


def test_nothing_is_left_behind_after_an_exception() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def interrupted() -> None:
        monitors = [RankMonitor(SOURCES, every_n_steps=1), GradientAnatomyMonitor(every_n_steps=1)]
        with watching(net, optimizer, *monitors) as watch, watch.batch():
            net(torch.ones(2, 64)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()

    assert not any(part._forward_hooks for part in net.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_what_is_not_there_is_refused_before_the_first_batch() -> None:
    net = Net()
    with (
        pytest.raises(ValueError, match="no such layer"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), RankMonitor(match="no such layer")),
    ):
        pytest.fail("begun")


def test_a_loss_that_has_to_be_run_again_takes_a_function() -> None:
    net = Net()
    with (
        pytest.raises(ValueError, match=r"no training_step to run again; give loss_fn"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), NTKMonitor()),
    ):
        pytest.fail("begun")


def test_two_monitors_of_one_kind_are_told_apart_by_name() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match=r"two RankMonitor in one training.*name='\.\.\.'"),
        watching(net, optimizer, RankMonitor(), RankMonitor()),
    ):
        pytest.fail("begun")


def on_fabric(rank: int, size: int, root: Path) -> dict[str, Any]:
    """What a process of a data-parallel run ends with, unwatched and watched."""
    fabric = (
        Fabric(accelerator="cpu", devices=size, strategy="ddp") if size > 1 else Fabric(accelerator="cpu", devices=1)
    )
    fabric.launch()
    ends: dict[str, Any] = {}
    for name, monitors in (("unwatched", []), ("watched", [MONITORS[name]() for name in ("rank", "anatomy", "ntk")])):
        torch.manual_seed(0)
        plain, logger = Net(), MemoryLogger()
        net, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        with watching(net, optimizer, *monitors, loggers=[logger]) as watch:
            for batch in DataLoader(digits(), batch_size=8):
                part = [tensor[rank::size] for tensor in batch]
                with watch.batch(part):
                    fabric.backward(watch.loss(loss_of(net, part)))
                    optimizer.step()
                    optimizer.zero_grad()
        ends[name] = {"weights": [p.detach() for p in plain.parameters()], "curves": curves(logger)}
    return ends


@pytest.mark.slow
def test_two_processes_of_fabric_find_what_one_finds_on_the_same_batches(tmp_path: Path) -> None:
    first, second = together(on_fabric, tmp_path)
    (alone,) = together(on_fabric, tmp_path, 1)

    for a, b, c in zip(
        *(end["watched"]["weights"] for end in (first, second)), first["unwatched"]["weights"], strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not second["watched"]["curves"]
    found, expected = first["watched"]["curves"], alone["watched"]["curves"]
    for tag in ("rank/gradient_stable_rank_median", "rank/update_effective_rank_max", "anatomy/residue_median"):
        torch.testing.assert_close(found[tag], expected[tag], rtol=1e-3, atol=1e-6)
    assert "ntk/velocity" in found
