"""A budget that several monitors share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.allowances import Allowance, Ask, Grant, Purse, Wish, shared_out

# Seconds of a step.
STEP = 0.01


def wish(cost: float, least: int = 50, *, fixed: float = 0.0, needed: bool = False) -> Wish:
    return Wish(cost, fixed, least, needed)


@dataclass
class Run:
    """A training by an artificial clock.

    Attributes:
        samples: Seconds that each sample of each monitor takes, by number and step.
        due: Steps of its samples.
        news: At which steps there was something to say of each.
        changes: At which steps each had another cadence than before.
    """

    purse: Purse
    samples: list[float]
    num_steps: int
    due: list[list[int]] = field(default_factory=list)
    news: list[list[int]] = field(default_factory=list)
    changes: list[list[int]] = field(default_factory=list)
    # Whether a monitor has said that its cadence stays although it costs too much.
    has_complained: bool = False
    # Seconds of ours and of all until each step.
    own: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def go(self, *, is_known: bool = True, dearer: float = 1.0, slower: Sequence[float] = ()) -> "Run":
        members, total = self.purse.members, 0.0
        self.due, self.news, self.changes = ([[] for _ in members] for _ in range(3))
        own = [0.0 for _ in members]
        for member in members:
            member.begin()
            member.plan(self.num_steps if is_known else None)
        for step in range(self.num_steps):
            self.own.append(sum(own))
            self.total.append(total)
            total += STEP * (slower[step] if slower else 1.0)
            before = [member.every for member in members]
            awake = [(i, member) for i, member in enumerate(members) if not member.rests(step)]
            for i, member in awake:
                if member.observe(step, own[i], self.total[-1], Team()):
                    for one in self.purse.news:
                        self.news[members.index(one)].append(step)
                    self.purse.news, self.purse.has_begun = set(), True
                self.has_complained |= member.exceeded
            for i, member in enumerate(members):
                self.changes[i] += [step] * (member.every != before[i])
            for i, member in awake:  # samples are taken when all have looked at the clock
                if member(step):
                    took = self.samples[i] * (dearer if step > self.num_steps / 2 else 1.0)
                    took *= slower[step] if slower else 1.0
                    self.due[i].append(step)
                    own[i], total = own[i] + took, total + took
        return self

    def share(self, begin: int = 0) -> float:
        """By which it took longer from a step on."""
        own, total = self.own[-1] - self.own[begin], self.total[-1] - self.total[begin]
        return own / (total - own)


def run(wishes: list[Wish], samples: list[float], num_steps: int, share: float = 0.05) -> Run:
    purse = Purse(share)
    for one in wishes:
        purse.allowance(one)
    return Run(purse, samples, num_steps)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 50.0])
def test_all_together_get_no_more_than_there_is_and_each_three_samples_or_nothing(seconds: float) -> None:
    asks = [Ask(sample, 3, 20) for sample in (0.001, 0.01, 0.3, 5.0)]

    given = shared_out(asks, seconds)

    assert sum(given) <= seconds * (1 + 1e-9)
    assert all(g == 0 or 3 * a.sample <= g <= a.most * a.sample for g, a in zip(given, asks, strict=True))


def test_what_is_left_is_shared_by_weight_and_nobody_gets_more_than_it_wishes() -> None:
    asks = [Ask(1.0, 0, 2), Ask(1.0, 0, 100), Ask(1.0, 0, 100, weight=3)]

    assert shared_out(asks, 42.0) == pytest.approx([2.0, 10.0, 30.0])


def test_three_samples_of_what_is_needed_take_nothing_from_others() -> None:
    assert shared_out([Ask(100.0, 3, 3, needed=True), Ask(1.0, 3, 3)], 6.0) == [300.0, 3.0]


@pytest.mark.parametrize("num_steps", [1000, 5000, 20_000])
@pytest.mark.parametrize("truth", [0.2, 1.0, 2.0])
def test_a_whole_run_keeps_the_budget_where_samples_take_what_was_thought_or_other_times(
    num_steps: int, truth: float
) -> None:
    costs = [0.1, 0.5, 2.0, 20.0, 60.0]

    ran = run([wish(cost) for cost in costs], [truth * cost * STEP for cost in costs], num_steps).go()

    assert ran.share() <= 0.051
    assert all(len(due) == 0 or len(due) >= 3 for due in ran.due), ran.due
    assert len(ran.due[0]) >= 3


@pytest.mark.parametrize("seed", range(50, 60))
def test_each_that_is_not_left_out_has_three_samples_on_a_machine_with_other_work(seed: int) -> None:
    draw, slower = random.Random(seed), [1.0]
    while len(slower) < 300:
        slower += [draw.choice([0.5, 1.0, 2.0, 6.0])] * draw.randint(1, 60)
    costs = [6.0, 0.2, 1.0, 3.0, 4.0, 5.0, 2.0]
    wishes = [wish(cost, 5, needed=i < 2) for i, cost in enumerate(costs)]

    ran = run(wishes, [cost * STEP for cost in costs], 300, 0.5).go(slower=slower)

    assert all(one.is_left_out or len(due) >= 3 for one, due in zip(ran.purse.members, ran.due, strict=True)), ran.due


@pytest.mark.parametrize(("taken", "last"), [(2, 86), (1, 60), (1, 86)])
def test_a_sample_that_is_overdue_at_a_new_cadence_is_taken_at_the_next_step(taken: int, last: int) -> None:
    """As in a run on a busy machine: shorter and longer cadences in turn passed over the third sample."""
    one = Purse(0.05).allowance(wish(1.0, 5))
    one.begin()
    one.plan(300)
    one.taken, one._last = taken, last
    due = []
    for step in range(last + 1, 300):
        if step in (120, 160, 202, 257):
            seconds = 0.0209 if step == 202 else 0.0107
            one.grant(Grant(step, 300 - step, seconds, sample=0.0107, step=0.005, first=0))
        if one(step):
            due.append(step)
            one.taken, one._last = one.taken + 1, step

    assert one.taken >= 3, due


def test_what_proves_dearer_comes_seldomer_and_what_proves_cheaper_oftener() -> None:
    dear, right, cheap = (
        run([wish(1.0, 10), wish(1.0, 10)], [truth * STEP, STEP], 2000).go() for truth in (4.0, 1.0, 0.25)
    )

    assert len(dear.due[0]) < len(right.due[0]) < len(cheap.due[0])


def test_who_could_not_have_three_samples_is_left_out_and_says_so_once() -> None:
    ran = run([wish(0.1), wish(7.0), wish(7.5), wish(1000.0)], [0.001, 0.07, 0.075, 10.0], 1000).go()

    in_it, out, dear = (ran.purse.members[i] for i in (1, 2, 3))
    assert not in_it.is_left_out and out.is_left_out and dear.is_left_out
    assert len(ran.due[1]) >= 3 and ran.due[2] == ran.due[3] == [] and out.count(1000) == 0
    # What could not be there alone is known before the first step.
    assert len(ran.news[2]) == 1 and ran.news[3] == []


def test_a_step_is_known_before_a_sample_is_taken_whose_fixed_cost_is_too_much() -> None:
    ran = run([wish(0.1), wish(0.1, fixed=1.0)], [0.001, 1.0], 1000).go()

    assert len(ran.due[0]) >= 3 and ran.due[1] == []


@pytest.mark.parametrize("sample", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("num_steps", [200, 230, 900])
def test_what_is_needed_has_three_samples_in_200_steps_and_the_first_at_the_start(
    sample: float, num_steps: int, *, is_known: bool
) -> None:
    ran = run([wish(1.0, needed=True), wish(1.0)], [sample, sample], num_steps).go(is_known=is_known)

    assert len(ran.due[0]) >= 3 and ran.due[0][0] == 0
    assert ran.share(num_steps // 2) < 0.05 or len(ran.due[0]) == 3


def test_what_was_spent_too_much_is_paid_by_later_steps() -> None:
    ran = run([wish(1.0, needed=True), wish(1.0)], [0.5, 0.01], 20_000).go()

    assert ran.share() <= 0.05 and sum(len(due) for due in ran.due) > 10


def test_a_run_of_unknown_length_leaves_nobody_out_and_keeps_the_budget_later() -> None:
    ran = run([wish(0.1), wish(30.0)], [0.001, 0.3], 10_000).go(is_known=False)

    assert len(ran.due[1]) >= 3 and ran.share(5000) <= 0.05


def test_samples_that_become_dearer_become_fewer() -> None:
    ran = run([wish(0.5, 20)], [0.005], 40_000).go(dearer=10.0)

    assert ran.share(25_000) <= 0.05 and ran.share() <= 0.05 and not ran.has_complained


@pytest.mark.parametrize(("seconds", "num_steps"), [([0.003, 0.003, 0.03], 600), ([0.003, 0.003, 0.2, 0.2], 300)])
def test_a_sample_that_is_due_is_taken_though_the_budget_is_shared_out_again_at_its_step(
    seconds: list[float], num_steps: int
) -> None:
    others = [wish(0.5, 100) for _ in seconds[2:]]
    found = run([wish(1.0, needed=True), wish(0.1, 5, needed=True), *others], seconds, num_steps).go()

    assert [member.taken for member in found.purse.members] == [len(due) for due in found.due]


def test_every_change_of_a_cadence_is_news() -> None:
    ran = run([wish(0.5, 20), wish(2.0)], [0.005, 0.02], 40_000).go(dearer=10.0)

    assert ran.news == ran.changes and all(len(steps) >= 2 for steps in ran.news)


def test_samples_are_evenly_spaced_once_their_cost_is_known() -> None:
    ran = run([wish(0.1, 10), wish(2.0), wish(20.0)], [0.002, 0.01, 0.3], 20_000).go()

    for due in ran.due:
        late = [b - a for a, b in pairwise(due) if a > 5000]
        assert len(late) < 2 or len(set(late)) <= 2


def test_who_proves_far_dearer_than_was_thought_stops_and_says_so() -> None:
    ran = run([wish(0.1), wish(2.0)], [0.001, 2.0], 1000).go()

    assert len(ran.due[1]) == 1 and ran.purse.members[1].is_left_out and len(ran.news[1]) >= 1
    assert len(ran.due[0]) >= 3


def test_one_that_finds_nothing_leaves_its_share_to_others() -> None:
    alone, idle = (run([wish(5.0, 10), wish(5.0, 10)], [0.05, 0.05], 2000) for _ in range(2))
    idle.purse.members[1].absent = "nothing"

    alone.go()
    for member in [idle.purse.members.pop()]:
        assert not member.asks
    idle.go()

    assert len(idle.due[0]) > 1.5 * len(alone.due[0])


def test_a_resumed_run_keeps_its_cadence_whatever_the_share_is_now() -> None:
    first = run([wish(1.0)], [0.01], 2000).go()
    state, second = first.purse.members[0].state_dict(), Purse(0.01).allowance(wish(1.0))
    second.load_state_dict(state)
    second.begin()

    for step in range(2000, 4000):
        second.observe(step, 0.0, STEP * (step - 2000), Team())

    one = first.purse.members[0]
    assert second.every == one.every is not None
    assert [second(step) for step in range(3000, 4000)] == [one(step) for step in range(3000, 4000)]


def test_processes_with_other_clocks_choose_the_same() -> None:
    class Two(Team):
        """Hears of another process, whose steps are half as long."""

        def all_gather_object(self, word: tuple[float, ...]) -> list[tuple[float, ...]]:  # type: ignore[override]
            step, without, own, *costs = word
            return [word, (step / 2, without / 2, own, *(2 * cost for cost in costs))]

    one, two = (Purse(0.05).allowance(wish(1.0, 10)) for _ in range(2))
    own, team = {one: 0.0, two: 0.0}, Two(size=2)
    for allowance, seconds, sample in ((one, STEP, 0.01), (two, STEP / 2, 0.02)):
        allowance.begin()
        allowance.plan(2000)
        total = 0.0
        for step in range(400):
            allowance.observe(step, own[allowance], total, team if allowance is one else Team(size=1))
            took = sample if allowance(step) else 0.0
            own[allowance], total = own[allowance] + took, total + took + seconds

    assert isinstance(one, Allowance) and one.every is not None and two.every is not None
    assert one.every == pytest.approx(two.every, rel=0.1)
