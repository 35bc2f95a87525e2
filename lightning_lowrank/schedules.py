"""When to measure: any function `step -> bool`."""

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class Every:
    """Every `n` optimizer steps from `start` on, the first included.

    Raises:
        ValueError: `n` is below 1 or `start` below 0.

    Example:
        >>> [step for step in range(10) if Every(4)(step)]
        [0, 4, 8]
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.start < 0:
            raise ValueError(f"Every(n={self.n}, start={self.start}): n is at least 1 and start at least 0, in optimizer steps")

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        return step >= self.start and (step - self.start) % self.n == 0
