"""A budget that several monitors share: who gets how much of it, and who has to stay out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.schedules import COLD, Budget, Spent

# Fewer samples are no curve: a monitor that could not have so many is left out.
FEWEST = 3
# In a short run nobody has to wait longer than a fifth of it for the next sample.
MANY = 5
# What is needed has three samples in a run of unknown length, too, if it has so many steps.
SHORT = 200
# First steps are slow: from this one on time is measured. The last samples say what one takes.
STEADY, RECENT = 5, 8
# A cadence stays as it is while another one would be this near, so that points are evenly spaced.
NEAR = 1.33
# First samples are taken one after the other, at so many times the share.
HASTE = 2
# Who was given a place has three samples, unless they take so many times what was thought.
SURPRISE = 4
# Where more is spent than there is, it is shared out again, but not before so many times the steps.
SOON = 1.25
# What is aimed at, of the budget, and what part of that is for monitors without a sample.
AIM, BREADTH = 0.9, 0.5


@dataclass(frozen=True)
class Wish:
    """What a monitor would have.

    Attributes:
        cost: Of a sample in steps of training, estimated beforehand.
        fixed: Seconds that it takes besides, however short a step is.
        least: Fewest steps from one sample to the next: more often nobody would look.
        needed: It is never left out, and has its first sample before anything was learnt.
        weight: Its part of what is left when all have three samples, beside 1 for others.
    """

    cost: float
    fixed: float
    least: int
    needed: bool = False
    weight: int = 1

    def spacing(self, total_steps: int | None) -> int:
        """Fewest steps from one sample to the next in a run that may be short."""
        return min(self.least, max(1, (total_steps or self.least * MANY) // MANY))


class Ask(NamedTuple):
    """What a monitor would have of the rest of a run.

    Attributes:
        sample: Seconds that one takes.
        fewest: Samples that it lacks for a curve.
        most: Samples that anybody would look at.
        needed: It is never left out.
        begun: It has been given a place, and takes about what was thought: it has its three.
        weight: Its part of what is left.
    """

    sample: float
    fewest: int
    most: float
    needed: bool = False
    begun: bool = False
    weight: int = 1


def shared_out(asks: Sequence[Ask], seconds: float) -> list[float]:
    """The seconds that each monitor gets.

    Three samples for as many monitors as there is room for come first. Monitors that have a place precede the others,
    cheap ones precede expensive ones, and newcomers may take half. The rest is shared out by weight, among monitors for
    which it buys a sample.

    A monitor without room for three samples is left out and gets 0. The three samples of a needed monitor are not
    charged here: later shares pay for them.

    Args:
        asks: Of all monitors.
        seconds: That all together may take.

    Examples:
        >>> cheap, dear = Ask(sample=0.1, fewest=3, most=50), Ask(sample=2.0, fewest=3, most=10)
        >>> [round(seconds, 2) for seconds in shared_out([cheap, dear], 14.0)]
        [4.15, 9.85]
        >>> [round(seconds, 2) for seconds in shared_out([cheap, dear], 12.0)]
        [5.0, 0.0]
    """
    least = [ask.fewest * ask.sample for ask in asks]
    given, left = [0.0] * len(asks), seconds
    for i in sorted(range(len(asks)), key=lambda i: (not asks[i].begun, least[i])):
        if asks[i].needed or asks[i].begun or least[i] <= left - (1 - BREADTH) * seconds:
            given[i], left = least[i], left - (0.0 if asks[i].needed else least[i])
    left = max(0.0, left)
    inside = [i for i, ask in enumerate(asks) if given[i] >= least[i]]
    # What buys nobody a sample is of no use to him.
    for i in sorted(inside, key=lambda i: -asks[i].sample / asks[i].weight):
        if left * asks[i].weight < asks[i].sample * sum(asks[j].weight for j in inside):
            inside.remove(i)
    wished = {i: max(0.0, asks[i].most * asks[i].sample - given[i]) for i in inside}
    inside.sort(key=lambda i: wished[i] / asks[i].weight)
    for n, i in enumerate(inside):
        more = min(wished[i], left * asks[i].weight / sum(asks[j].weight for j in inside[n:]))
        given[i], left = given[i] + more, left - more
    return given


class Purse:
    """The budget of all monitors of a run, shared out again and again by the measured costs of their samples.

    It is shared out at step 20, whenever the run has become twice as long, after each monitor's first sample, and when
    the budget is exceeded. At most half of what later steps allow pays for overspending.

    Args:
        share: By which they may make training longer.

    Attributes:
        members: Of all monitors.
        total_steps: Of the run, None while nobody knows.
        news: Members of which something was decided that nobody has said.
        said: The cadence of each that was said last.
        has_begun: That a run has begun was said.
    """

    def __init__(self, share: float) -> None:
        self.share = Budget(share).share
        self.members: list[Allowance] = []
        self.total_steps: int | None = None
        self.begin()

    def allowance(self, wish: Wish, name: str = "") -> "Allowance":
        """A schedule for one more monitor."""
        self.members.append(Allowance(self, wish, name))
        return self.members[-1]

    def begin(self) -> None:
        """Training begins, or goes on in another process."""
        self._begun: int | None = None
        self._marks: list[Spent] = []
        self._planned = -1
        # Steps of first samples: each member asks at every step.
        self.firsts: set[int] = set()
        self.news: set[Allowance] = set()
        self.said: dict[Allowance, int] = {}
        self.has_begun = False

    def wakes(self, step: int) -> bool:
        """Whether all have to look at the clock: one step after they did, all is known, and is shared out."""
        return self._begun is None or self._is_moment(step) or self._is_moment(step - 1)

    def observe(self, step: int, seconds: float, team: Team) -> None:
        """Take note of the seconds since training began, and share out where it is time to."""
        if self._begun is None:
            self._begun, self._marks = step, [Spent(step, 0.0, 0.0)]
        now, age = Spent(step, sum(member.own for member in self.members), seconds), step - self._begun
        # Processes can only decide together, where all look at the clock.
        is_over = team.size == 1 and now.own > self.share * _idle(self._marks[0], now) and age > SOON * self._planned
        if age == self._planned or not (self._is_moment(step - 1) or is_over):
            return
        self._planned = age
        if age > COLD:
            self._share_out(now, team)
        self._marks.append(now)

    def _is_moment(self, step: int) -> bool:
        age = step - (self._begun or 0)
        is_doubling = age >= COLD and age % COLD == 0 and (age // COLD).bit_count() == 1
        return age == STEADY or is_doubling or step - 1 in self.firsts

    def _share_out(self, now: Spent, team: Team) -> None:
        begun = self._marks[0]
        # The last mark may be a step ago.
        mark = next(mark for mark in reversed(self._marks) if now.step - mark.step > STEADY)
        asking = [member for member in self.members if member.asks]
        step = max(1e-6, _idle(mark, now) / (now.step - mark.step))
        # No process may decide by its own clock.
        said = team.all_gather_object((-step, _idle(begun, now), now.own, *(one.sample_cost(step) for one in asking)))
        step, without, own, *costs = (max(of) for of in zip(*said, strict=True))
        step = -step
        rest = max(1, (self.total_steps or 2 * now.step - begun.step) - now.step)
        later = self.share * step * rest
        room = AIM * min(later, max(later / 2, self.share * without + later - own))
        asks = [member.ask(rest, cost, step) for member, cost in zip(asking, costs, strict=True)]
        given = shared_out(asks, room)
        waiting = 0.0
        for i in sorted(range(len(asking)), key=costs.__getitem__):
            waiting += costs[i] if asking[i].taken == 0 and (given[i] or not asks[i].fewest) else 0.0
            first = now.step + 1 + i + math.ceil(waiting / (HASTE * self.share * step))
            latest = now.step + 1 + rest // 4 if self.total_steps else first
            asking[i].grant(Grant(now.step, rest, given[i], costs[i], step, min(first, latest)))
        self.firsts = {member.first for member in self.members if member.first is not None}


def _idle(a: Spent, b: Spent) -> float:
    """Seconds without ours."""
    return (b.total - a.total) - (b.own - a.own)


class Grant(NamedTuple):
    """What a monitor gets of the rest of a run.

    Attributes:
        now: Step at which it was decided.
        rest: Steps until the end, or as far as is planned.
        seconds: For all samples in them; 0 leaves it out.
        sample: Seconds that one takes.
        step: Seconds that a step takes without.
        first: Step of its first sample, if it had none.
    """

    now: int
    rest: int
    seconds: float
    sample: float
    step: float
    first: int


class Allowance(Budget):
    """The budget of one monitor among several. Its share follows the measured costs of all of them, and may be 0.

    Args:
        purse: Of all.
        wish: Of this one.
        name: Of its monitor.

    Attributes:
        absent: Why there is nothing to watch in this model; empty if there is.
        watches: Where its monitor looks, in words.
        own: Seconds that it has taken.
        taken: Samples so far.
        first: Step of the first sample, None while nobody knows it.
    """

    def __init__(self, purse: Purse, wish: Wish, name: str) -> None:
        self.purse, self.wish, self.name, self.absent = purse, wish, name, ""
        super().__init__(purse.share)

    def forget(self) -> None:
        """Choose anew: this is another run."""
        self._is_resumed = False
        super().forget()

    def begin(self) -> None:
        """Training begins, or goes on in another process."""
        super().begin()
        self.purse.begin()
        self.share = self.purse.share
        self.own, self.taken, self._last = 0.0, 0, 0
        self.first: int | None = None
        # Our seconds after each sample.
        self._after: list[float] = []
        self._was_due = self._is_out = False
        self.watches = ""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep to the cadence that was chosen, whatever the share is now."""
        super().load_state_dict(state | {"share": self.share} if state else state)
        self._is_resumed = self.every is not None

    @property
    def is_left_out(self) -> bool:
        """Whether there is no room for three samples."""
        return self._is_out

    @property
    def exceeded(self) -> bool:
        """Never to be warned of: what is overspent changes the cadence."""
        return False

    @property
    def asks(self) -> bool:
        """Whether it is to be given something."""
        return not (self.absent or self._is_out or self._is_resumed)

    def plan(self, total_steps: int | None) -> None:
        """Training starts: who would have no room for three samples alone is left out at once."""
        self.purse.total_steps = total_steps
        is_dear = total_steps is not None and FEWEST * self.wish.cost > self.purse.share * total_steps
        self._is_out = is_dear and not self.wish.needed and self.asks

    def rests(self, step: int) -> bool:
        """Whether nobody has to look at a step, not even at the clock."""
        if self._is_out or self._begun is None:
            return self._is_out
        return not (self.purse.wakes(step) or self._was_due or self(step))

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        # All look at the clock before any sample is taken: what another one makes of it holds from the next step on.
        if self._was_due and step == self._last:
            return True
        if self._is_out:
            return False
        return super().__call__(step) if self.every is not None else step == self.first

    def count(self, total_steps: int) -> int | None:
        """Samples in a run of so many steps, as far as they are known."""
        if self._is_out or self.every is None:
            return self.taken if self._is_out else None
        return self.taken + (super().count(total_steps) or 0)

    def observe(self, step: int, own: float, total: float, team: Team) -> bool:
        """Take note of the seconds spent before a step begins: whether there is something to say of any member."""
        self._now = Spent(step, own, total)
        if self._begun is None:
            self._begun = self._now
            if self.wish.needed:
                self.first = step
                self.purse.firsts.add(step)
        self.own = own
        if self._was_due:
            self._after, self.num_samples = [*self._after, own][-RECENT - 1 :], self.num_samples + 1
            self._mark = self._mark or self._now
        self.purse.observe(step, total - self._begun.total, team)
        self._was_due = self(step)
        self.taken, self._last = self.taken + self._was_due, step if self._was_due else self._last
        return bool(self.purse.news) or not self.purse.has_begun

    def sample_cost(self, step: float) -> float:
        """Seconds that a sample takes where a step takes so many: an estimate before the first one, which itself pays
        for what is made once.
        """
        if len(self._after) < 2:
            return self._after[0] / 2 if self._after else self.wish.fixed + self.wish.cost * step
        return fmean(b - a for a, b in pairwise(self._after))

    def ask(self, rest: int, sample: float, step: float) -> Ask:
        """What it would have of the rest of a run, in which a step takes so many seconds."""
        wish = self.wish
        begun = self.first is not None and sample <= SURPRISE * (wish.fixed + wish.cost * step)
        return Ask(sample, self._lacks, rest / self._spacing, wish.needed, begun=begun, weight=wish.weight)

    def grant(self, given: Grant) -> None:
        """Keep to what it gets."""
        self.sample, self.step = given.sample, given.step
        self.share = given.seconds / (given.step * given.rest)
        if not given.seconds and self._lacks:
            self._is_out = True
            self.purse.news.add(self)
        elif self.taken:
            self._keep_to(given)
        else:
            self.first = min(self.first or given.first, given.first)

    def _keep_to(self, given: Grant) -> None:
        ahead = given.now + given.rest - self._last
        # The last one is half a spacing before the end; where nothing is left the next one is beyond it.
        every = max(self._spacing, math.ceil(ahead * given.sample / (given.seconds + given.sample / 2)))
        start, lacks = self._last, self._lacks
        if lacks:
            every = max(1, min(every, (self._end - 1 - start) // lacks))
            if start + every <= given.now:  # overdue at the new cadence: at the next step, and the others after it
                if lacks > 1:
                    every = min(every, max(1, (self._end - 2 - given.now) // (lacks - 1)))
                start = given.now + 1 - every
        if self.every is None:
            self._mark, self.num_samples = self._now, 0
        elif every < NEAR * self.every and self.every < NEAR * every:
            return
        self.purse.news.add(self)
        self.every, self._decided = every, start

    @property
    def _lacks(self) -> int:
        """Samples until there is a curve; 0 in a run of unknown length, unless it is needed."""
        return max(0, FEWEST - self.taken) if self.purse.total_steps or self.wish.needed else 0

    @property
    def _end(self) -> int:
        return self.purse.total_steps or SHORT + (self._begun.step if self._begun else 0)

    @property
    def _spacing(self) -> int:
        return self.wish.spacing(self.purse.total_steps)
