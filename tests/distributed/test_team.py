"""Processes share the work: every matrix is measured by one of them, none of them does much more than its part."""

from collections import Counter
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from examples.char_transformer import CharTransformer
from lightning_lowrank.distributed.team import ROUND, Team, in_rounds
from lightning_lowrank.maths.spectra.decompose import flops
from lightning_lowrank.measuring.gathering import Gathered, gather
from lightning_lowrank.measuring.source import Step
from lightning_lowrank.measuring.sources.gradients import Gradients
from lightning_lowrank.watching.loops import LoopTraining


def work(shape: torch.Size) -> float:
    """Products and sums of the Gram matrices, and four thirds of the cube for their eigenvalues (Golub & Van Loan,
    8.3).
    """
    short, long = sorted(shape[-2:])
    return prod(shape[:-2]) * (2 * short**2 * long + 4 / 3 * short**3)


def shares(module: nn.Module, size: int) -> list[list[Gathered]]:
    """What each of some processes measures of the gradients of a module."""
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    source, optimizer = Gradients(), torch.optim.SGD(module.parameters())
    source.plan(LoopTraining(module))
    readings = source.gradients_final(Step(optimizer, frozenset(map(id, module.parameters()))))
    owners = Team(0, size).assign([flops(reading.shape) for reading in readings])
    taken = [gather(readings, owners, Team(rank, size), spectra_only=True, beside=False) for rank in range(size)]
    return [[one for part in rounds for one in part] for rounds in taken]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_matrix_is_measured_by_one_process(size: int) -> None:
    module = CharTransformer(vocabulary=65)

    parts = shares(module, size)

    seen = Counter(label for part in parts for taken in part for label in taken.labels)
    assert set(seen.values()) == {1}
    alone = {taken.labels: taken.value for taken in shares(module, 1)[0]}
    assert_close({taken.labels: taken.value for part in parts for taken in part}, alone, rtol=0, atol=0)


def test_four_processes_have_at_most_two_fifths_of_the_work_of_one() -> None:
    def total(part: list[Gathered]) -> float:
        return sum(work(taken.value.shape) for taken in part if isinstance(taken.value, Tensor))

    alone = total(shares(CharTransformer(vocabulary=65), 1)[0])
    parts = [total(part) for part in shares(CharTransformer(vocabulary=65), 4)]

    assert sum(parts) == pytest.approx(alone)
    assert max(parts) <= 0.4 * alone


def test_work_goes_to_who_has_least() -> None:
    team = Team(0, 3)

    assert team.assign([1.0, 5.0, 3.0, 1.0]) == [2, 0, 1, 2]
    assert team.assign([1.0]) == [2]
    assert team.loads == [5.0, 3.0, 3.0]


def test_one_process_alone_says_nothing_to_anybody() -> None:
    team, tensor = Team(), torch.ones(3)

    assert team.all_gather_object("word") == ["word"]
    assert team.all_reduce(tensor) is tensor
    assert team.summand(tensor) is tensor


def test_no_owner_gets_more_at_once_than_the_largest_or_the_least_that_is_worth_a_round() -> None:
    sizes, owners = [ROUND, 5 * ROUND, 3 * ROUND, 3 * ROUND, ROUND, 0, 0], [0, 1, 0, 0, 1, 0, 1]

    rounds = in_rounds(sizes, owners)

    assert rounds == [[0, 1, 2], [3, 4, 5, 6]]
    assert in_rounds([1] * 100, [0] * 100) == [list(range(100))]
    assert in_rounds([], []) == [[]]
