"""A budget that several monitors share."""

import math
from itertools import pairwise

import pytest

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.allowances import Allowance, Purse, Wish, shared_out


def wish(cost: float, least: int = 50, *trials: int, needed: bool = False) -> Wish:
    return Wish(cost, least, trials or (20,), needed)


@pytest.mark.parametrize("total_steps", [None, 200, 1000, 50_000])
def test_all_together_have_no_more_than_there_is(total_steps: int | None) -> None:
    wishes = [wish(cost) for cost in (0.1, 1.0, 4.0, 30.0, 500.0)]

    shares = shared_out(wishes, 0.05, total_steps)

    assert sum(shares) <= 0.05 + 1e-12
    assert all(share <= one.share(total_steps)[1] for share, one in zip(shares, wishes, strict=True))
    assert total_steps is None or all(
        share == 0 or share * total_steps >= 3 * one.cost for share, one in zip(shares, wishes, strict=True)
    )


def test_who_could_not_have_three_samples_is_left_out_and_leaves_its_share_to_others() -> None:
    wishes = [wish(1.0, 10), wish(5.0, 10), wish(100.0, 10)]

    short, long = shared_out(wishes, 0.05, 1000), shared_out(wishes, 0.05, 100_000)

    assert short == pytest.approx([0.019, 0.031, 0.0]) and long == pytest.approx([0.01691, 0.01703, 0.01988], rel=0.2)


def test_who_is_needed_is_never_left_out() -> None:
    assert shared_out([wish(100.0), wish(100.0, needed=True)], 0.05, 200) == [0.0, 0.05]


def spent(allowance: Allowance, step_seconds: float, sample_seconds: float, num_steps: int) -> tuple[list[int], float]:
    """The steps of its samples in a run, and by which share it made the time after the warm-up longer."""
    own = total = 0.0
    due: list[int] = []
    begun = (0.0, 0.0)
    for step in range(num_steps):
        if allowance.observe(step, own, total, Team()):
            begun = own, total
        if allowance(step):
            due.append(step)
            own, total = own + sample_seconds, total + sample_seconds
        total += step_seconds
    own, total = own - begun[0], total - begun[1]
    return due, own / (total - own)


@pytest.mark.parametrize("sample_seconds", [0.0005, 0.01, 0.3])
def test_the_share_is_kept_after_the_warm_up_by_what_samples_really_take(sample_seconds: float) -> None:
    purse = Purse(0.05)
    allowance = purse.allowance(wish(2.0, 50, 0, 40))
    allowance.plan(20_000)

    due, share = spent(allowance, 0.01, sample_seconds, 20_000)

    assert due[:2] == [0, 40] and share <= allowance.share <= 0.05
    assert len(due) > 2 and allowance.every is not None and allowance.every >= 50


@pytest.mark.parametrize("trials", [(0, 40), (20,), (26, 106)])
@pytest.mark.parametrize("num_steps", [130, 600])
def test_where_samples_are_dearer_than_was_thought_three_come_in_the_warm_up(
    trials: tuple[int, ...], num_steps: int
) -> None:
    allowance = Purse(0.05).allowance(wish(0.5, 50, *trials))
    allowance.plan(num_steps)

    due, share = spent(allowance, 0.01, 0.5, num_steps)

    assert len(due) == 3 and due[: len(trials)] == list(trials)
    assert num_steps == 130 or share == 0
    assert num_steps == 130 or len({b - a for a, b in pairwise([0] * (len(trials) < 2) + due)}) == 1


def test_samples_that_become_dearer_become_fewer() -> None:
    allowance = Purse(0.05).allowance(wish(2.0, 20, 0, 40))
    allowance.plan(100_000)
    spent(allowance, 0.01, 0.01, 100)
    assert allowance.every is not None and allowance._mark is not None
    first, own, total = allowance.every, allowance._mark.own, allowance._mark.total

    for step in range(100, 100_000):
        allowance.observe(step, own, total, Team())
        dear = 0.1 if allowance(step) else 0.0
        own, total = own + dear, total + dear + 0.01

    assert allowance.every >= 4 * first and allowance.overhead <= 100 * allowance.share * 1.05


def test_one_that_is_left_out_takes_nothing() -> None:
    purse = Purse(0.05)
    cheap, dear = purse.allowance(wish(0.1)), purse.allowance(wish(1000.0))
    purse.share_out(500)

    due, share = spent(dear, 0.01, 1.0, 500)

    assert dear.is_left_out and not cheap.is_left_out
    assert due == [] and share == 0 and dear.count(500) == 0


def test_one_that_finds_nothing_leaves_its_share_to_others() -> None:
    purse = Purse(0.02)
    one, other = purse.allowance(wish(10.0, 10)), purse.allowance(wish(10.0, 10))
    other.is_idle = True

    purse.share_out(None)

    assert one.share == 0.02


def test_a_resumed_run_keeps_its_cadence_whatever_the_share_is_now() -> None:
    purse = Purse(0.05)
    first = purse.allowance(wish(1.0, 50, 0, 40))
    first.plan(1000)
    spent(first, 0.01, 0.01, 200)
    second = Purse(0.05).allowance(wish(1.0, 50, 0, 40))
    second.load_state_dict(first.state_dict())
    second.plan(400)

    assert second.every == first.every is not None and not math.isnan(first.sample)
    assert [second(step) for step in range(200, 400)] == [first(step) for step in range(200, 400)]
