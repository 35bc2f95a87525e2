"""When to measure: any function `step -> bool`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from lightning_lowrank.distributed.team import Team

Schedule = Callable[[int], bool]

# The warm-up of a budget, in optimizer steps: nothing of the first ones counts, then a sample is taken every few.
COLD, SPACING, WARM_UP = 20, 10, 100
SAMPLED = {0, *range(COLD, WARM_UP, SPACING)}

# What is aimed at, of the budget: a warm-up of many is 20 % off.
AIM = 0.8

# A budget is exceeded beyond this much of it, after so many samples.
TOLERANCE, ENOUGH = 1.2, 5


@dataclass(frozen=True)
class Every:
    """Every `n` optimizer steps from `start` on, the first included.

    Raises:
        ValueError: `n` is below 1, `start` is below 0, or one of them is not a whole number.

    Examples:
        >>> [step for step in range(10) if Every(4)(step)]
        [0, 4, 8]
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        whole = type(self.n) is int and type(self.start) is int
        if not whole or self.n < 1 or self.start < 0:
            raise ValueError(
                f"Every(n={self.n!r}, start={self.start!r}): expected whole numbers of optimizer steps, n at least "
                "1 and start at least 0"
            )

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        return step >= self.start and (step - self.start) % self.n == 0

    def count(self, total_steps: int) -> int:
        """Number of samples in a run of this length."""
        return len(range(self.start, total_steps, self.n))


class Spent(NamedTuple):
    """Seconds before a step: ours, and of the whole training."""

    step: int
    own: float
    total: float


@dataclass(eq=False)
class Budget:
    """Sample as often as a share of the training time allows. The cadence is chosen once, after a warm-up, and stays
    fixed for the run.

    The warm-up is the first 100 optimizer steps. A sample at the first step is ignored, like all of the first 20 steps
    (compilation, allocators, caches). Then there are 8 samples, one every 10 steps. Medians of three times determine
    the cadence: of a sample, of a step without a sample, and of the check at every step. The cadence uses 0.8 of the
    share. With several processes, the longest cadence of any process is used. The promise holds for the time after the
    warm-up. The cadence is in the checkpoint; a run that is resumed in its warm-up starts it again.

    If a sample waits for other processes, its time includes the wait.

    Args:
        share: Largest increase of training time (without validation); 0.01 is 1 %.

    Attributes:
        every: The cadence in optimizer steps; None in the warm-up.
        num_samples: Samples taken since the cadence was chosen; in a resumed run, since its first sample.
        sample: Seconds of a sample in the warm-up of this process, NaN elsewhere.
        step: Seconds of a step without a sample, NaN elsewhere.

    Raises:
        ValueError: The share is not between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not isinstance(self.share, float) or not 0 < self.share < 1:
            raise ValueError(
                f"max_overhead, Budget(share={self.share!r}) must be a share of the training time above 0 and below "
                "1, such as 0.01 for 1 %"
            )
        self.forget()

    def forget(self) -> None:
        """Choose again, since this is another run."""
        self.every: int | None = None
        self._decided = 0
        self.begin()

    def begin(self) -> None:
        """Training begins, or continues in another process."""
        self.num_samples = 0
        self.sample = self.step = math.nan
        self._seen: list[Spent] = []
        self._begun: Spent | None = None
        self._mark: Spent | None = None
        self._now: Spent | None = None

    @property
    def is_left_out(self) -> bool:
        """Whether there will be no sample at all."""
        return False

    def plan(self, total_steps: int | None) -> None:
        """Training starts, and its length may be known."""

    def rests(self, step: int) -> bool:
        """Whether nobody has to look at a step, not even at the clock: neither it nor the one before is due."""
        return self.every is not None and not self(step) and not self(step - 1)

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        if self.every is not None:
            return step > self._decided and (step - self._decided) % self.every == 0
        return step - (self._begun.step if self._begun else 0) in SAMPLED

    def count(self, total_steps: int) -> int | None:
        """Number of samples in a run of this length, after the choice if it has been made; None before the choice."""
        if self.every is not None:
            return len(range(self._decided + self.every, total_steps, self.every))
        return sum(step < total_steps for step in SAMPLED) if total_steps <= WARM_UP else None

    def observe(self, step: int, own: float, total: float, team: Team) -> bool:
        """Note the seconds spent before a step begins. Returns whether the cadence has just been chosen.

        All processes must call it at the same steps; they communicate when the warm-up ends.
        """
        before, self._now = self._now, Spent(step, own, total)
        if self.every is None:
            return self._warm_up(self._now, team)
        if before is not None and self(before.step):
            if self._mark is None:  # the first sample of a process is no measure
                self._mark = self._now
            else:
                self.num_samples += 1
        return False

    @property
    def overhead(self) -> float:
        """Increase of training time in percent since the cadence was chosen, or since the first sample of a resumed
        run; NaN before.
        """
        if self._mark is None or self._now is None or self._now.total <= self._mark.total:
            return math.nan
        own, total = self._now.own - self._mark.own, self._now.total - self._mark.total
        return 100 * own / (total - own)

    @property
    def exceeded(self) -> bool:
        """Whether the increase exceeds the share by more than noise explains."""
        return self.num_samples >= ENOUGH and self.overhead > 100 * TOLERANCE * self.share

    def state_dict(self) -> dict[str, float]:
        """The choice; empty in the warm-up."""
        return {} if self.every is None else {"share": self.share, "every": self.every, "decided": self._decided}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep the choice, unless the share is another one now."""
        self.forget()
        if state.get("share") == self.share:
            self.every, self._decided = int(state["every"]), int(state["decided"])

    def _warm_up(self, now: Spent, team: Team) -> bool:
        self._begun = self._begun or now
        age = now.step - self._begun.step
        if age >= COLD:
            self._seen.append(now)
        if age < WARM_UP:
            return False
        # No process may fail before it has said its word: the others wait for it.
        wanted = self._wanted()
        self.every, self._decided, self._mark, self._seen = max(team.all_gather_object(wanted)), now.step, now, []
        return True

    def _wanted(self) -> int:
        """The cadence that this process would choose."""
        own_of_steps = [(b.own - a.own) / (b.step - a.step) for a, b in pairwise(self._seen)]
        parts = list(pairwise(self._seen[::SPACING]))
        if not parts:
            return 1
        # Nine of ten steps are not due: their median is what asking costs.
        idle = median(own_of_steps)
        self.sample = median(b.own - a.own - idle * (b.step - a.step) for a, b in parts)
        self.step = median((b.total - a.total - b.own + a.own) / (b.step - a.step) for a, b in parts)
        return cadence(self.share, self.sample, self.step, idle)


def cadence(share: float, sample: float, step: float, idle: float = 0.0) -> int:
    """Steps from one sample to the next by which training takes longer by `AIM` of the share, rounded up.

    Args:
        share: Of the time without us.
        sample: Seconds of a sample.
        step: Seconds of a step of training, ours aside.
        idle: Seconds of ours at every step, due or not. If that is all there is to spend, samples have a tenth of it
            all the same.

    Examples:
        >>> cadence(0.01, sample=0.008, step=0.1)
        10
    """
    allowed = max(step, 1e-6) * AIM * share
    return max(1, math.ceil(sample / max(allowed - idle, allowed / 10)))


def shared_budget(schedules: Sequence[Schedule]) -> Budget | None:
    """The one budget among the schedules of a monitor, None without.

    Raises:
        ValueError: It would not be for all of them: what the others cost would be counted, but not chosen.
    """
    budgets = [schedule for schedule in schedules if isinstance(schedule, Budget)]
    if budgets and any(schedule is not budgets[0] for schedule in schedules):
        raise ValueError(
            "a Budget limits everything that a monitor does in training; give all its probes the same Budget object"
        )
    return budgets[0] if budgets else None
