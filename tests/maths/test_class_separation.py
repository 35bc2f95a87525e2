"""Oracle: the published formulas on the examples themselves, one class at a time, in numpy and scipy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank.maths.class_separation import (
    ClassSums,
    angle_deviation,
    lidar,
    norm_variation,
    self_duality,
    variability_collapse,
)

Rows = NDArray[np.float64]
CLASSES, WIDTH = 4, 7


def examples(seed: int = 0, each: int = 9) -> tuple[Rows, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), each)
    return rng.normal(size=(CLASSES, WIDTH))[labels] + rng.normal(size=(len(labels), WIDTH)) * rng.random(WIDTH), labels


def sums_of(rows: Rows, labels: NDArray[np.int64], num_classes: int = CLASSES) -> ClassSums:
    member = np.eye(num_classes)[labels]
    parts = (rows.T @ rows, member.T @ rows, member.sum(0))
    return ClassSums(*(torch.from_numpy(part) for part in parts))


def covariances(rows: Rows, labels: NDArray[np.int64]) -> tuple[Rows, Rows, Rows]:
    """Within classes, of class means, and the centred means."""
    means = np.stack([rows[labels == c].mean(0) for c in np.unique(labels)])
    within = np.mean(
        [np.outer(d, d) for d in (row - rows[labels == c].mean(0) for row, c in zip(rows, labels, strict=True))], 0
    )
    centred = means - means.mean(0)
    return within, np.mean([np.outer(m, m) for m in centred], 0), centred


def test_numbers_are_those_of_the_published_formulas() -> None:
    rows, labels = examples()
    weight = np.random.default_rng(1).normal(size=(CLASSES, WIDTH))
    within, between, means = covariances(rows, labels)
    norms = np.linalg.norm(means, axis=1)
    cosines = (means / norms[:, None]) @ (means / norms[:, None]).T
    off = cosines[~np.eye(CLASSES, dtype=bool)]
    root = np.linalg.inv(np.real(sqrtm(within + 1e-4 * np.trace(within) / WIDTH * np.eye(WIDTH))))
    shares = np.linalg.eigvalsh(root @ between @ root).clip(1e-14)
    shares = shares / shares.sum()
    found = sums_of(rows, labels)

    for value, truth in (
        (variability_collapse(found), np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / CLASSES),
        (norm_variation(found), norms.std() / norms.mean()),
        (angle_deviation(found), np.abs(off + 1 / (CLASSES - 1)).mean()),
        (
            self_duality(found, torch.from_numpy(weight)),
            ((weight / np.linalg.norm(weight) - means / np.linalg.norm(means)) ** 2).sum(),
        ),
        (lidar(found), np.exp(-(shares * np.log(shares)).sum())),
    ):
        assert value.item() == pytest.approx(truth, rel=1e-6)


def simplex() -> Tensor:
    return torch.eye(CLASSES, WIDTH, dtype=torch.float64)


def test_a_collapsed_simplex_has_zeros_and_all_its_directions() -> None:
    labels = np.repeat(np.arange(CLASSES), 3)
    found = sums_of(3 * simplex().numpy()[labels], labels)
    centred = simplex() - simplex().mean(0)

    for value in (
        *(variability_collapse(found), norm_variation(found), angle_deviation(found)),
        self_duality(found, 5 * centred),
    ):
        assert value.item() == pytest.approx(0, abs=1e-7)
    assert lidar(found).item() == pytest.approx(CLASSES - 1)


def test_scale_and_shift_and_classes_without_examples_change_nothing() -> None:
    rows, labels = examples()
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(CLASSES + 2, WIDTH)))
    one, other = sums_of(rows, labels), sums_of(1e3 * (rows + 5), labels + 2, CLASSES + 2)

    for function in (variability_collapse, norm_variation, angle_deviation, lidar):
        assert_close(function(one), function(other), rtol=1e-6, atol=1e-9)
    assert_close(self_duality(one, weight[2:]), self_duality(other, weight), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_told_is_blank() -> None:
    rows, labels = examples()
    one_class, one_each = labels == 0, np.arange(0, len(rows), 9)
    lone, alone = sums_of(rows[one_class], labels[one_class]), sums_of(rows[one_each], labels[one_each])
    broken = sums_of(np.where(rows > 1, np.nan, rows), labels)
    nobody = ClassSums(torch.zeros(WIDTH, WIDTH), torch.zeros(CLASSES, WIDTH), torch.zeros(CLASSES))

    for function in (variability_collapse, lidar):
        assert all(function(sums).isnan() for sums in (lone, alone, broken, nobody))
    for function in (norm_variation, angle_deviation):
        assert all(function(sums).isnan() for sums in (lone, broken, nobody))
        assert function(alone).isfinite()
