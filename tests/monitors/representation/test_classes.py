"""Separation of classes in real trainings. Oracle: outputs computed by hand on the same batches, in numpy."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lowrank import Monitor, RepresentationMonitor
from tests.processes import together
from tests.trainings import Classifier, InOrder, MemoryLogger, digits

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
Rows = NDArray[np.float64]


class Net(nn.Module):
    """Two blocks over eight positions of a digit, their mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(-1, (8, 8)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[monitor], **QUIET, **{"max_steps": 1} | options).fit(module)
    return logger


def features(net: Net, images: Tensor) -> list[Rows]:
    """After each block, the mean over positions."""
    found, x = [], net.embed(images.unflatten(-1, (8, 8)))
    for block in net.blocks:
        x = block(x)
        found.append(x.mean(1).detach().double().numpy())
    return found


def covariances(rows: Rows, labels: NDArray[np.int64]) -> tuple[Rows, Rows, Rows]:
    seen = np.unique(labels)
    means = np.stack([rows[labels == c].mean(0) for c in seen])
    off = rows - means[np.searchsorted(seen, labels)]
    centred = means - means.mean(0)
    return off.T @ off / len(rows), centred.T @ centred / len(seen), centred


def lidar(rows: Rows, labels: NDArray[np.int64]) -> float:
    within, between, _ = covariances(rows, labels)
    solved = np.linalg.solve(within + 1e-4 * np.trace(within) / len(within) * np.eye(len(within)), between)
    shares = np.linalg.eigvals(solved).real.clip(1e-14)
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def collapse(rows: Rows, labels: NDArray[np.int64], weight: Rows) -> dict[str, float]:
    within, between, means = covariances(rows, labels)
    seen = np.unique(labels)
    norms = np.linalg.norm(means, axis=1)
    cosines = (means / norms[:, None]) @ (means / norms[:, None]).T
    own = weight[seen]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / len(seen),
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": np.abs(cosines[~np.eye(len(seen), dtype=bool)] + 1 / (len(seen) - 1)).mean(),
        "nc3": ((own / np.linalg.norm(own) - means / np.linalg.norm(means)) ** 2).sum(),
        "class_rows": len(rows) / len(seen),
        "classes": len(seen),
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_numbers_are_those_of_what_blocks_put_out(accumulate: int) -> None:
    net = Net()
    images, labels = digits()[: 16 * accumulate]
    rows, weight = features(net, images), net.head.weight.detach().double().numpy()
    truth = collapse(rows[-1], labels.numpy(), weight)
    ranks = [lidar(one, labels.numpy()) for one in (*rows, rows[-1])]
    monitor = RepresentationMonitor(classifier="net.head")
    watched(InOrder(0, 1, net), monitor, accumulate_grad_batches=accumulate)
    assert monitor.first is not None and monitor.failures == 0
    found = monitor.first.values

    assert {name: found[f"representation_{name}"][""] for name in truth} == pytest.approx(truth, rel=1e-3)
    known = {site: value for site, value in found["representation_lidar"].items() if not np.isnan(value)}
    assert list(known) == ["net.blocks.0.out", "net.blocks.1.out", "net.head.in"]
    assert list(known.values()) == pytest.approx(ranks, rel=1e-3)


def test_classes_come_apart_in_training_and_shuffled_ones_do_not() -> None:
    class Wide(Classifier):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(digits(256), batch_size=256)

    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    monitor = RepresentationMonitor(every_n_steps=20, classifier="net.2")
    watched(Wide(net), monitor, max_steps=61, max_epochs=61)
    assert monitor.first is not None and monitor.latest is not None
    before, after = (sample.values for sample in (monitor.first, monitor.latest))

    assert after["representation_nc1"][""] < 0.5 * before["representation_nc1"][""]
    assert after["representation_nc1"][""] < 0.1 * after["representation_nc1_shuffled"][""]
    assert after["representation_nc3"][""] < before["representation_nc3"][""]


class Named(Classifier):
    """Batches with names, one of whose labels is to be left out."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return nn.functional.cross_entropy(self(batch["images"]), batch["labels"])

    def train_dataloader(self) -> Any:
        images, labels = digits()[:32]
        labels = labels.clone()
        labels[5] = -100
        return torch.utils.data.DataLoader([{"images": images, "labels": labels}], batch_size=None)


def test_labels_are_found_by_name_and_an_ignored_one_takes_its_example_out() -> None:
    net = Net()
    images, labels = digits()[:32]
    kept = np.arange(32) != 5
    truth = lidar(features(net, images)[0][kept], labels.numpy()[kept])
    found = []
    for given in (None, lambda batch: batch["labels"]):
        monitor = RepresentationMonitor(classifier="net.head", labels=given)
        watched(Named(Net()), monitor)
        assert monitor.first is not None
        found.append(monitor.first.values["representation_lidar"]["net.blocks.0.out"])

    assert found == pytest.approx([truth, truth], rel=1e-3)


def test_a_classifier_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"classifier='net' is not a linear layer of the module; its linear layers are .*'net.head'"
    ):
        watched(Classifier(Net()), RepresentationMonitor(classifier="net"))
    with pytest.raises(ValueError, match="such as classifier="):
        RepresentationMonitor(labels=lambda batch: batch[1])


def test_a_batch_without_labels_is_told_and_the_rest_is_there() -> None:
    monitor = RepresentationMonitor(classifier="net.head", labels=lambda batch: batch[0])
    with pytest.warns(UserWarning, match="no whole number for each example"):
        watched(Classifier(Net()), monitor)

    assert monitor.first is not None
    assert np.isfinite(monitor.first.values["representation_alpha"]["net.blocks.0.out"])


def in_parallel(rank: int, size: int, root: Path) -> Any:
    monitor = RepresentationMonitor(every_n_steps=2, classifier="net.head")
    options: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp"} if size > 1 else {}
    watched(InOrder(rank, size, Net()), monitor, **options)
    return monitor.first and monitor.first.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert str(first) == str(second)
    for quantity, row in alone.items():
        if "shuffled" not in quantity:
            assert first[quantity] == pytest.approx(row, rel=1e-3, nan_ok=True)


def test_reading_labels_changes_nothing() -> None:
    ends = []
    for callbacks in ([], [RepresentationMonitor(every_n_steps=1, classifier="net.head")]):
        L.seed_everything(0, verbose=False)
        module = Classifier(Net())
        L.Trainer(max_steps=6, logger=False, callbacks=list(callbacks), **QUIET).fit(module)
        ends.append([p.detach().clone() for p in module.parameters()] + [torch.get_rng_state()])

    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
