"""Numbers that chance had a part in, and what a measurement of operators finds.

Shape letters:  B any batch axes   L parameters   G cells of a density
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number that chance had a part in.

    Attributes:
        value: Free of bias, up to second order where it is no mean.
        error: Its standard error.
    """

    value: Float[Tensor, "*B"]
    error: Float[Tensor, "*B"]


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
