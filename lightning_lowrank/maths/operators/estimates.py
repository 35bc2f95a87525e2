"""Numbers that chance had a part in, and what a measurement of operators finds.

Shape letters:  B any batch axes   L parameters   G cells of a density
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with an error from chance, or from work that ended early.

    Attributes:
        value: Unbiased, up to second order if it is not a mean.
        error: Half width of a two-sided interval around the value, with a coverage of at least 68 %. The truth is
            within one error of the value in at least two of three samples. It is within two errors in at least nine of
            ten.
    """

    value: Float[Tensor, "*B"]
    error: Float[Tensor, "*B"]


def student(num_samples: int) -> float:
    """Error of a mean in its standard errors, which were estimated from the same samples: half the half width of
    Student's two-sided 95 % interval.

    That is 1.59 for four samples, 1.07 for 16 and 0.98 for infinitely many. Few samples of a skewed quantity, such as
    traces and squares, often miss the large ones. With the half width of 68 %, the truth was beyond two errors in one
    of eight trials.

    Raises:
        ValueError: There are fewer than two samples.

    References:
        Abramowitz & Stegun (1964), equation 26.7.5: within 1 % from four samples on.
    """
    if num_samples < 2:
        raise ValueError(f"an estimate with an error needs at least 2 samples, not {num_samples}")
    z, freedom = 1.96, num_samples - 1
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return (z + first / freedom + second / freedom**2 + third / freedom**3) / 2


@dataclass
class Found:
    """Numbers with their errors, of the whole model and per parameter, and densities."""

    values: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Float[Tensor, " L"]] = field(default_factory=dict)
    layer_errors: dict[str, Float[Tensor, " L"]] = field(default_factory=dict)
    curves: dict[str, Float[Tensor, " G"]] = field(default_factory=dict)

    def note(self, name: str, estimate: Estimate) -> None:
        """Keep a number and its error."""
        self.values[name], self.errors[name] = estimate.value, estimate.error

    def note_layers(self, name: str, estimate: Estimate) -> None:
        """The same of each parameter."""
        self.layers[name], self.layer_errors[name] = estimate.value, estimate.error
