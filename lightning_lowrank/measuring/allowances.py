"""A budget that several monitors share: who gets how much of it, and who has to stay out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.schedules import COLD, Budget, Spent, cadence

# Fewer samples are no curve: a monitor that could not have so many is left out.
FEWEST = 3
# In a short run nobody has to wait longer than a fifth of it for the next sample.
MANY = 5
# Steps after its last trial until a cadence is chosen: what a step takes without is known by them.
SETTLING = 10


@dataclass(frozen=True)
class Wish:
    """The request of a monitor.

    Attributes:
        cost: Of a sample in steps of training, estimated beforehand.
        least: Fewest steps from one sample to the next: more often nobody would look.
        trials: Steps of the first samples, the last of them at step 20 or later. The first, where there are several, is
            no measure of the others.
        needed: It is never left out.
    """

    cost: float
    least: int
    trials: tuple[int, ...]
    needed: bool = False

    def share(self, total_steps: int | None) -> tuple[float, float]:
        """Share of the training time, for three samples and for the most useful number of samples."""
        fewest = FEWEST * self.cost / total_steps if total_steps else 0.0
        return fewest, max(fewest, self.cost / self.spacing(total_steps))

    def spacing(self, total_steps: int | None) -> int:
        """Fewest steps from one sample to the next in a run that may be short."""
        return min(self.least, max(1, (total_steps or self.least * MANY) // MANY))


def shared_out(wishes: Sequence[Wish], share: float, total_steps: int | None) -> list[float]:
    """The share of each: three samples for as many as there is room for, the cheapest first; what is left in equal
    parts, but to nobody more than it wishes.

    Those that have no room for three samples are left out and have 0. In a run of unknown length nobody is.

    Args:
        wishes: Of all monitors.
        share: By which all together may make training longer.
        total_steps: Of the run, if that is known.

    Examples:
        >>> cheap, dear = Wish(cost=0.1, least=10, trials=(0,)), Wish(cost=60.0, least=100, trials=(20,))
        >>> [round(share, 3) for share in shared_out([cheap, dear], 0.05, total_steps=10_000)]
        [0.01, 0.04]
        >>> shared_out([cheap, dear], 0.05, total_steps=1000)
        [0.01, 0.0]
    """
    asked = [wish.share(total_steps) for wish in wishes]
    given, left = [0.0] * len(wishes), share
    inside = []
    for i in sorted(range(len(wishes)), key=lambda i: (not wishes[i].needed, asked[i][0])):
        if wishes[i].needed or asked[i][0] <= left:
            given[i] = min(asked[i][0], left)
            left -= given[i]
            inside.append(i)
    inside.sort(key=lambda i: asked[i][1] - given[i])
    for n, i in enumerate(inside):
        more = min(asked[i][1] - given[i], left / (len(inside) - n))
        given[i] += more
        left -= more
    return given


class Purse:
    """The time that the monitors of a run may take together.

    Args:
        share: By which they may make training longer.
    """

    def __init__(self, share: float) -> None:
        self.share = Budget(share).share
        self.members: list[Allowance] = []

    def allowance(self, wish: Wish) -> "Allowance":
        """A schedule for one more monitor."""
        self.members.append(Allowance(self, wish))
        return self.members[-1]

    def share_out(self, total_steps: int | None) -> None:
        """Among those that have something to watch."""
        asking = [member for member in self.members if not member.is_idle]
        shares = shared_out([member.wish for member in asking], self.share, total_steps)
        for member, share in zip(asking, shares, strict=True):
            member.share, member.spacing = share, member.wish.spacing(total_steps)


class Allowance(Budget):
    """A budget of one monitor among several: its share is known when training starts, and may be nothing.

    Args:
        purse: Of all.
        wish: Of this one.

    Attributes:
        is_idle: There is nothing to watch in this model.
        trials: Steps of the samples of the warm-up: those that were wished, and as many more, as far apart, as make
            three where the cadence leaves no room for them.
    """

    def __init__(self, purse: Purse, wish: Wish) -> None:
        self.purse, self.wish, self.is_idle = purse, wish, False
        self.spacing = wish.least
        self._total_steps: int | None = None
        super().__init__(purse.share)

    @property
    def is_left_out(self) -> bool:
        """Whether three samples would take more than it has."""
        return self.share == 0 and self.every is None

    def plan(self, total_steps: int | None) -> None:
        """Training starts."""
        self._total_steps = total_steps
        self.purse.share_out(total_steps)

    def begin(self) -> None:
        """Training begins, or goes on in another process."""
        super().begin()
        self.trials = self.wish.trials

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        if self.is_left_out:
            return False
        if self.every is not None:
            return super().__call__(step)
        return step - (self._begun.step if self._begun else 0) in self.trials

    def count(self, total_steps: int) -> int | None:
        """Samples in a run of so many steps, as far as they are known."""
        if self.every is not None or self.is_left_out:
            return super().count(total_steps) if self.every is not None else 0
        return sum(step < total_steps for step in self.trials) if total_steps <= self._end else None

    def observe(self, step: int, own: float, total: float, team: Team) -> bool:
        """Note the seconds spent before a step begins, unless it is left out. If samples have come to take more than
        the share, sample half as often from then on. Several processes keep the first cadence.
        """
        if self.is_left_out:
            return False
        before = self.num_samples
        chosen = super().observe(step, own, total, team)
        sampled = self.num_samples > before and team.size == 1
        if self.every is not None and sampled and self.overhead > 100 * self.share:
            self.every, self._decided = 2 * self.every, step
        return chosen

    @property
    def exceeded(self) -> bool:
        """Never for long: it then takes fewer samples."""
        return False

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep to the cadence that was chosen, whatever the share is now."""
        super().load_state_dict(state | {"share": self.share} if state else state)

    @property
    def warm_up(self) -> int:
        """The steps of its trials."""
        return self._end

    @property
    def _end(self) -> int:
        return max(COLD, *self.trials) + SETTLING

    def _warm_up(self, now: Spent, team: Team) -> bool:
        seen = self._seen
        chosen = super()._warm_up(now, team)
        more = self._missing_trial() if chosen else None
        if more is None:
            return chosen
        self.trials, self.every, self._mark, self._seen = (*self.trials, more), None, None, seen
        return False

    def _missing_trial(self) -> int | None:
        """One more, as far from the last as that from the one before, where the run would have fewer than three."""
        assert self._begun is not None
        if self._total_steps is None or len(self.trials) + (super().count(self._total_steps) or 0) >= FEWEST:
            return None
        *_, before, last = 0, *self.trials
        more = min(2 * last - before, self._total_steps - 1 - self._begun.step)
        return more if more > self._decided - self._begun.step else None

    def _wanted(self) -> int:
        """The cadence by what trials took, save the first, which pays for what is made once."""
        start = self._begun.step if self._begun else 0
        measured = self.trials[1:] or self.trials
        parts = [(a.step - start, b.own - a.own, b.total - a.total - b.own + a.own) for a, b in pairwise(self._seen)]
        if not parts:
            return self.spacing
        self.step = median(rest for _, _, rest in parts)
        idle = median([own for age, own, _ in parts if age not in self.trials] or [0.0])
        # On a device what a sample took may be known steps later.
        since = [own for age, own, _ in parts if age >= measured[0]]
        self.sample = (sum(since) - idle * (len(since) - len(measured))) / len(measured)
        # From now on nothing is asked at other steps.
        return max(self.spacing, cadence(self.share, self.sample, self.step))
