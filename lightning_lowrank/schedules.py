"""When to measure: any function `step -> bool`."""

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class Every:
    """Every `n` optimizer steps from `start` on, the first included.

    Raises:
        ValueError: `n` is below 1 or `start` below 0, or they are no whole numbers.

    Example:
        >>> [step for step in range(10) if Every(4)(step)]
        [0, 4, 8]
    """

    n: int
    start: int = 0

    def __post_init__(self) -> None:
        whole = isinstance(self.n, int) and isinstance(self.start, int)
        if not whole or self.n < 1 or self.start < 0:
            raise ValueError(
                f"Every(n={self.n!r}, start={self.start!r}): whole numbers of optimizer steps, n at least 1 and start at least 0"
            )

    def __call__(self, step: int) -> bool:
        """Whether this step is due."""
        return step >= self.start and (step - self.start) % self.n == 0
