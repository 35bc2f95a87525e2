"""Noise of gradients in real trainings. Oracles: a quadratic whose noise is known, and gradients of parts by hand in
numpy.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lowrank import NoiseScaleMonitor, watching
from tests.processes import together
from tests.trainings import Adversaries, Classifier, InOrder, digits, half

QUIET: dict[str, Any] = {
    **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False},
    "use_distributed_sampler": False,
}
WIDTH, NOISE, MEAN = 40, 2.0, 0.25
# tr(S) / |G|^2 of the quadratic: the gradient of an example is N(-MEAN, NOISE^2) in each of WIDTH directions.
SCALE = NOISE**2 / MEAN**2


class Quadratic(L.LightningModule):
    """Half the squared distance to examples, seen from 0, where it stays."""

    def __init__(self, num_batches: int, batch_size: int, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(WIDTH))
        rng = torch.Generator().manual_seed(1)
        examples = MEAN + NOISE * torch.randn(num_batches * batch_size * size, WIDTH, generator=rng)
        data = TensorDataset(examples)
        self.loader = DataLoader(data, batch_size, sampler=DistributedSampler(data, size, rank, shuffle=False))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.place - batch[0]).square().sum(-1).mean() / 2

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watched(module: L.LightningModule, monitor: NoiseScaleMonitor, **options: Any) -> dict[str, float]:
    """The latest numbers, by quantity."""
    L.Trainer(**QUIET | {"max_epochs": 1, "accelerator": "cpu"} | options, callbacks=[monitor]).fit(module)
    assert monitor.latest is not None
    return {quantity: row[""] for quantity, row in monitor.latest.values.items()}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_noise_of_a_quadratic_is_found_within_its_error(accumulate: int) -> None:
    num_steps, size = 200, 16 // accumulate
    monitor = NoiseScaleMonitor(every_n_steps=1, window=num_steps)

    found = watched(Quadratic(num_steps * accumulate, size), monitor, accumulate_grad_batches=accumulate)

    assert monitor.failures == 0
    truths = {"noise_scale": SCALE, "noise_signal_share": 16 / (16 + SCALE)}
    for quantity, truth in truths.items():
        assert 0 < found[f"{quantity}_error"] < 0.3 * truth
        assert abs(found[quantity] - truth) < 3 * found[f"{quantity}_error"]
    assert found["noise_variance"] == pytest.approx(WIDTH * NOISE**2 / 16, rel=0.05)
    assert found["noise_gradient_energy"] == pytest.approx(WIDTH * MEAN**2, rel=0.2)
    assert (found["noise_examples"], found["noise_samples"]) == (16, num_steps)


def test_without_a_gradient_there_is_noise_and_no_scale() -> None:
    module = Quadratic(60, 16)
    with torch.no_grad():
        module.place += MEAN

    found = watched(module, NoiseScaleMonitor(every_n_steps=1, window=60))

    assert abs(found["noise_signal_share"]) < 3 * found["noise_signal_share_error"]
    assert np.isnan(found["noise_scale"]) or found["noise_scale"] > 10 * SCALE


def gradients_by_hand(net: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> NDArray[np.float64]:
    """One row per part."""
    rows = []
    for images, labels in parts:
        net.zero_grad()
        cross_entropy(net(images), labels).backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double().numpy())
    net.zero_grad()
    return np.stack(rows)


def expected(rows: NDArray[np.float64], num_examples: int) -> dict[str, float]:
    """From the sample variance of the parts, in another way than by energies."""
    variance = float(np.var(rows, axis=0, ddof=1).sum()) / len(rows)
    products = rows @ rows.T
    energy = float(products[~np.eye(len(rows), dtype=bool)].mean())  # of different parts: no noise in common
    return {
        "noise_variance": variance,
        "noise_gradient_energy": energy,
        "noise_examples": num_examples,
        "noise_signal_share": energy / (energy + variance),
    }


def of_digits(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """The first digits, in parts."""
    return [digits()[begin:end] for begin, end in pairwise(np.cumsum([0, *sizes]))]


def first(module: L.LightningModule, monitor: NoiseScaleMonitor, **options: Any) -> dict[str, float]:
    watched(module, monitor, **{"max_steps": 1} | options)
    assert monitor.first is not None
    return {quantity: row[""] for quantity, row in monitor.first.values.items()}


def assert_near(found: dict[str, float], truth: dict[str, float], rel: float = 1e-4) -> None:
    assert {name: found[name] for name in truth} == pytest.approx(truth, rel=rel)


def test_micro_batches_are_the_parts_under_accumulation() -> None:
    module = InOrder(0, 1)
    truth = expected(gradients_by_hand(module.net, of_digits(16, 16, 16)), 48)

    assert_near(first(module, NoiseScaleMonitor(), accumulate_grad_batches=3), truth)


def test_a_lone_batch_is_taken_apart() -> None:
    module = InOrder(0, 1)
    images, labels = digits()[:16]
    truth = expected(gradients_by_hand(module.net, [(images[i::2], labels[i::2]) for i in range(2)]), 16)

    assert_near(first(module, NoiseScaleMonitor()), truth)


class Uneven(Classifier):
    """Batches of different sizes."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(of_digits(5, 11, 20), batch_size=None)  # type: ignore[arg-type]


def test_parts_of_different_sizes_are_of_the_harmonic_mean() -> None:
    module = Uneven()
    truth = expected(gradients_by_hand(module.net, of_digits(5, 11, 20)), 0)
    truth["noise_examples"] = 3 / np.mean([1 / 5, 1 / 11, 1 / 20])

    assert_near(first(module, NoiseScaleMonitor(), accumulate_grad_batches=3), truth)


def test_a_gradient_scaler_and_clipping_change_nothing() -> None:
    module = InOrder(0, 1)
    truth = expected(gradients_by_hand(module.net, of_digits(16, 16)), 32)
    options = {"accumulate_grad_batches": 2, "plugins": half(), "gradient_clip_val": 1e-3}

    assert_near(first(module, NoiseScaleMonitor(), **options), truth, rel=0.02)


class Penalised(InOrder):
    """Differentiates its loss by the parameters, which accumulates nothing."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        slopes = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        return loss + 0.0 * sum(slope.square().sum() for slope in slopes)


def test_what_the_step_differentiates_besides_is_no_part() -> None:
    module = Penalised(0, 1)
    truth = expected(gradients_by_hand(module.net, of_digits(16, 16)), 32)

    assert_near(first(module, NoiseScaleMonitor(), accumulate_grad_batches=2), truth)


def test_a_loop_shows_its_micro_batches_and_is_told_if_it_does_not() -> None:
    net = InOrder(0, 1).net
    truth = expected(gradients_by_hand(net, of_digits(16, 16)), 32)

    def found(*, shows: bool) -> dict[str, float]:
        monitor = NoiseScaleMonitor(every_n_steps=1, replay=False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with watching(net, optimizer, monitor) as watch:
            for i, batch in enumerate(of_digits(16, 16)):
                with watch.batch(batch):
                    (watch.loss(cross_entropy(net(batch[0]), batch[1])) / 2).backward()
                    if shows:
                        watch.backward_done()
                    if i == 1:
                        optimizer.step()
                        optimizer.zero_grad()
        assert monitor.latest is not None
        return {quantity: row[""] for quantity, row in monitor.latest.values.items()}

    assert_near(found(shows=True), truth)
    with pytest.warns(UserWarning, match=r"call backward_done\(\) after each backward pass"):
        assert np.isnan(list(found(shows=False).values())).all()


def test_a_lone_batch_without_replay_is_said() -> None:
    with pytest.warns(UserWarning, match="a step of one batch on one process has no parts"):
        watched(InOrder(0, 1), NoiseScaleMonitor(every_n_steps=2, replay=False))


class Ragged(Classifier):
    """Tensors of different leading sizes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return self(batch["images"]).square().mean() + batch["other"].sum()

    def train_dataloader(self) -> DataLoader[Any]:
        batches = [{"images": part[0], "other": torch.zeros(3)} for part in of_digits(8, 8, 8, 8)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_batches_whose_size_is_not_to_be_told_have_a_share_and_no_scale() -> None:
    with pytest.warns(UserWarning, match="a batch of tensors with different leading sizes cannot be halved"):
        watched(Ragged(), NoiseScaleMonitor(every_n_steps=2))

    found = first(Ragged(), NoiseScaleMonitor(), accumulate_grad_batches=2)
    assert np.isnan([found["noise_scale"], found["noise_examples"]]).all()
    assert 0 < found["noise_signal_share"] < 1


@pytest.mark.parametrize("window", [0, 10**6])
def test_a_window_of_no_samples_or_too_many_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="window="):
        NoiseScaleMonitor(window=window)


def test_several_optimizers_without_a_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="several optimizers"):
        watched(Adversaries(), NoiseScaleMonitor(replay=False))


class Interleaved(InOrder):
    """One process that sees, batch by batch, what each of two processes would see of the first digits."""

    def train_dataloader(self) -> DataLoader[Any]:
        size = self.batch_size
        orders = [torch.arange(64)[which::2][i : i + size] for i in range(0, 32, size) for which in (0, 1)]
        return DataLoader(digits(), batch_sampler=[order.tolist() for order in orders])


def in_parallel(rank: int, size: int, root: Path) -> Any:
    """First numbers of a lone batch of 16, and of two micro-batches of 8: on two processes, which see half of each, and
    on one with as many parts.
    """
    found = {}
    for batch_size, accumulate in ((16, 1), (8, 2)):
        torch.manual_seed(0)
        if size > 1:
            module = InOrder(rank, size, batch_size=batch_size)
            options: dict[str, Any] = {"devices": size, "strategy": "ddp", "accumulate_grad_batches": accumulate}
        else:
            module, options = Interleaved(0, 1, batch_size=batch_size // 2), {"accumulate_grad_batches": 2 * accumulate}
        found[batch_size] = first(module, NoiseScaleMonitor(), **options)
    return found


@pytest.mark.slow
def test_two_processes_find_what_one_finds_with_as_many_parts(tmp_path: Path) -> None:
    one, other = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert str(one) == str(other)
    for batch_size, found in alone.items():
        assert one[batch_size] == pytest.approx(found, rel=1e-4, nan_ok=True)
