"""What only a GPU can show, of every monitor and method in the tables: numbers, neutrality, waits and memory.

LOWRANK_TEST_DEVICE=cpu python -m pytest -c tests/gpu/pytest.ini tests/gpu    # a rehearsal
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank import Monitor
from lightning_lowrank.watching.watch import Watch
from tests.dispatch import Scarce, within_monitors
from tests.methods import METHODS
from tests.monitors import MONITORS
from tests.trainings import Attending, Checkpointed, Classifier, ImageNet, InOrder, MemoryLogger, Quiet, half, trained

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

# Numbers of a device and of the CPU: relative deviation of what is exact.
CLOSE = 2e-3
# Of what is drawn at random, on each device by its own generator: in reported errors, and relative.
ERRORS, DRAWN = 6.0, 0.5
# Of the optimizer of the tests' modules.
LEARNING_RATE = 1e-2
# Monitors whose numbers are drawn at random.
RANDOM = ("curvature", "ntk", "multifractal")


class Flash(nn.Module):
    """Eight pixels a token, attention by `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out, self.head = nn.Linear(8, 48), nn.Linear(16, 8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (8, 8))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, 8)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.out(attended.transpose(1, 2).flatten(2))).flatten(1))


class Aside(Classifier):
    """Computes its loss on a stream of its own."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            loss = super().training_step(batch, batch_idx)
        usual.wait_stream(side)
        return loss


def _half(device: str) -> dict[str, Any]:
    return {"plugins": half()} if device == "cpu" else {"precision": "16-mixed"}


Case = tuple[Callable[[], Any], Callable[[str], dict[str, Any]]]
CASES: dict[str, Case] = {
    "plain": (Classifier, lambda _: {}),
    "dropout and batch norm": (lambda: Classifier(ImageNet()), lambda _: {}),
    "bf16-mixed": (Classifier, lambda _: {"precision": "bf16-mixed"}),
    "16-mixed": (Classifier, _half),
    "16-mixed, fused AdamW": (lambda: Classifier(fused=True), _half),
    "fused AdamW": (lambda: Classifier(fused=True), lambda _: {}),
    "flash attention": (lambda: Classifier(Flash()), lambda _: {"precision": "bf16-mixed"}),
    "activation checkpointing": (lambda: Classifier(Checkpointed(dropout=0.2)), lambda _: {}),
    "compiled": (lambda: torch.compile(Quiet()), lambda _: {}),
}
ON_CUDA: dict[str, Case] = {
    "capturable AdamW": (lambda: Classifier(capturable=True), lambda _: {}),
    "CUDA graphs": (lambda: torch.compile(Quiet(), mode="reduce-overhead"), lambda _: {}),
    "side stream": (Aside, lambda _: {}),
}


def on(device: str, **options: Any) -> dict[str, Any]:
    """Options of a Trainer that trains there."""
    return {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1} | options


def accepted(make: Callable[[], Any], options: dict[str, Any], root: Path) -> list[Monitor]:
    """The monitors that do not refuse the case before training."""
    names = []
    for name in MONITORS:
        try:
            trained(make, options | {"max_steps": 1, "max_epochs": 1}, [MONITORS[name]()], root)
        except ValueError as error:
            if not any(word in str(error) for word in ("compiled", "activation", "attention")):
                raise
        else:
            names.append(name)
    return [MONITORS[name](every_n_steps=2) for name in names]


@pytest.mark.parametrize("case", [*CASES, *ON_CUDA])
def test_training_is_the_same_with_all_monitors(case: str, device: str, tmp_path: Path) -> None:
    if device == "cpu" and case in ON_CUDA:
        pytest.skip("is of CUDA only")
    make, more = (CASES | ON_CUDA)[case]

    def options() -> dict[str, Any]:
        return on(device, max_steps=6, max_epochs=1, **more(device))

    monitors = accepted(make, options(), tmp_path)
    alone, watched = (trained(make, options(), callbacks, tmp_path) for callbacks in ([], monitors))

    assert_close(watched, alone, rtol=0, atol=0, equal_nan=True)
    assert all(monitor.latest is not None and monitor.latest.values for monitor in monitors)
    assert [monitor.failures for monitor in monitors] == [0] * len(monitors)


def numbers(name: str, device: str) -> dict[str, float]:
    """What a monitor logs of the first step of a net."""
    L.seed_everything(3, verbose=False)
    module, logger, monitor = Classifier(Attending()), MemoryLogger(), MONITORS[name](every_n_steps=1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(**quiet, **on(device), max_steps=1, logger=logger, callbacks=[monitor]).fit(module)
    assert monitor.failures == 0
    return {tag: next(iter(curve.values())) for tag, curve in logger.numbers().items() if "lowrank/" not in tag}


@pytest.mark.parametrize("name", MONITORS)
def test_numbers_of_the_device_are_those_of_the_cpu(name: str, device: str) -> None:
    here, there = numbers(name, "cpu"), numbers(name, device)

    assert here.keys() == there.keys()
    wrong = {}
    for tag, value in here.items():
        known = max(here.get(f"{tag}_error", 0.0), there.get(f"{tag}_error", 0.0))
        allowed = ERRORS * known + (DRAWN if name in RANDOM else CLOSE) * abs(value) + 1e-5
        if not (math.isnan(value) and math.isnan(there[tag])) and not abs(there[tag] - value) <= allowed:
            wrong[tag] = (value, there[tag])
    assert wrong == {}


def acted(name: str, device: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights after five steps with a method, and what it logged last."""
    L.seed_everything(3, verbose=False)
    # Without so large an epsilon AdamW makes a whole step of a gradient that is rounding.
    module, logger, method = Quiet(eps=1e-3), MemoryLogger(), METHODS[name]()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(**quiet, **on(device), max_steps=5, logger=logger, callbacks=[method]).fit(module)
    curves = {tag: [*curve.values()][-1] for tag, curve in logger.numbers().items() if "lowrank/" not in tag}
    return {key: value.cpu() for key, value in module.state_dict().items()}, curves


@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_on_the_device_what_it_does_on_the_cpu(name: str, device: str) -> None:
    here, there = acted(name, "cpu"), acted(name, device)

    assert there[1].keys() == here[1].keys() != set()
    if "random" in name:  # another subspace on each device, by its own generator
        assert_close(there[0], here[0], rtol=0, atol=5 * LEARNING_RATE)
    else:
        assert_close(there[0], here[0], rtol=0, atol=CLOSE * LEARNING_RATE)
        assert_close(there[1], here[1], rtol=CLOSE, atol=1e-5, equal_nan=True)


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """What makes the host wait inside of monitors."""
    guard, seen = Watch._guard, []

    @contextmanager
    def guarded(watch: Watch, **options: Any) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with guard(watch, **options), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.extend(str(w.message) for w in caught if "synchroniz" in str(w.message))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_guard", guarded)
        yield seen


@pytest.mark.parametrize("name", MONITORS)
def test_steps_that_are_not_due_wait_for_nothing(name: str, device: str, record_property: Any) -> None:
    """Waits of a sample are counted and recorded; of steps without one there is none."""
    if device == "cpu":
        pytest.skip("nothing waits for a CPU")
    counts = {}
    for steps in (1, 5):
        with waits_counted() as seen:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            L.Trainer(**quiet, **on(device), max_steps=steps, logger=MemoryLogger(), callbacks=[MONITORS[name]()]).fit(
                Quiet(Attending())
            )
        counts[steps] = len(seen)

    record_property("waits of a sample", counts[1])
    assert counts[5] == counts[1]


@pytest.mark.parametrize("name", MONITORS)
def test_memory_is_given_back(name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("counts what CUDA's allocator has")
    after = []
    for steps in (3, 9):
        torch.cuda.empty_cache()
        L.seed_everything(3, verbose=False)
        monitor = MONITORS[name](every_n_steps=1)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        L.Trainer(**quiet, **on(device), max_steps=steps, logger=MemoryLogger(), callbacks=[monitor]).fit(
            Classifier(Attending())
        )
        after.append(torch.cuda.memory_allocated())

    assert after[1] <= after[0] + 4096


@pytest.mark.parametrize("name", MONITORS)
def test_where_memory_runs_out_in_a_monitor_training_goes_on(name: str, device: str, tmp_path: Path) -> None:
    alone = trained(Classifier, on(device, max_steps=4, max_epochs=1), [], tmp_path)
    monitor, scarce = MONITORS[name](every_n_steps=2), Scarce(lambda index, size: index % 5 == 4)

    try:
        with within_monitors(scarce):
            watched = trained(Classifier, on(device, max_steps=4, max_epochs=1), [monitor], tmp_path)
    except ValueError as error:
        pytest.skip(f"refused before training: {error}")

    assert scarce.count > 4
    assert_close(watched, alone, rtol=0, atol=0, equal_nan=True)


def test_one_process_of_nccl_finds_what_a_run_without_finds(device: str) -> None:
    found = []
    for more in ({}, {"strategy": "ddp"}):
        L.seed_everything(3, verbose=False)
        logger, monitor = MemoryLogger(), MONITORS["rank"](every_n_steps=1)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = L.Trainer(
            **quiet,
            **on(device, **more),
            max_steps=3,
            use_distributed_sampler=False,
            logger=logger,
            callbacks=[monitor],
        )
        trainer.fit(InOrder(0, 1))
        found.append({tag: c for tag, c in logger.numbers().items() if not tag.startswith("lowrank/")})

    assert_close(found[1], found[0], rtol=1e-4, atol=1e-6, equal_nan=True)
