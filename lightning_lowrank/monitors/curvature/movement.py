"""How training moves within the steepest directions of the last sample.

Shape letters:  P entries of all parameters   k directions
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.maths.operators.eigenspaces import energy_share, of_directions
from lightning_lowrank.maths.operators.estimates import Found
from lightning_lowrank.maths.operators.operators import Layout
from lightning_lowrank.measuring.source import Step

Named = Mapping[str, Tensor]


class Movement:
    """The gradient, the update and the whole way from the start to the step, against directions that were found before
    this sample.

    Those of the sample itself are made for its very batch, and hold more of its gradient than they would of any other.

    Attributes:
        initial: The weights at the start of the run, by name: as many bytes as they have.
        before: Directions of the last sample.
        off: How far each may be from an eigenvector, as a sine.
        start: The parameters before the step.
    """

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] = {}
        self.drop()

    def drop(self) -> None:
        """The sample is over."""
        self.before: Float[Tensor, "k P"] | None = None
        self.off: Float[Tensor, " k"] | None = None
        self.start: dict[str, Tensor] = {}
        self._gradient: Float[Tensor, " P"] | None = None

    def begin(self, named: Named) -> None:
        """Keep the weights of parameters that are new."""
        self.initial |= {name: p.detach().clone() for name, p in named.items() if name not in self.initial}

    def step_begins(self, step: Step, trained: Named) -> None:
        """Keep what an optimizer is about to use, and the weights from which the update is reckoned."""
        self.start = self.start or {name: p.detach().clone() for name, p in trained.items()}
        if self.before is not None:
            own = [(p, p.grad if id(p) in step.parameters else None) for p in trained.values()]
            gradient = _flat(trained, [torch.zeros_like(p) if grad is None else grad for p, grad in own])
            gradient = gradient if step.scale is None else gradient / step.scale
            self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def note_shares(self, found: Found, trained: Named) -> None:
        """What part of each lies within the directions, and what part of a random vector would; nothing without
        directions.
        """
        if self.before is None or self.off is None:
            return
        now, before_step = _flat(trained, list(trained.values())), _placed(trained, self.start)
        size, gradient = self.before.shape[1], self._gradient
        if size != len(now):  # some were frozen, or thawed
            return
        initial, moves = _placed(trained, self.initial), {}
        if before_step:
            moves["update"] = now - _flat(trained, before_step)
        if before_step and initial:
            moves["displacement"] = _flat(trained, before_step) - _flat(trained, initial)
        moves |= {} if gradient is None or len(gradient) != size else {"gradient": gradient}
        for name, move in moves.items():
            found.note(f"{name}_in_top", of_directions(energy_share(move, self.before), self.off))
        found.values["in_top_chance"] = now.new_tensor(self.before.shape[0] / size)


def _placed(trained: Named, then: Named) -> list[Tensor]:
    """Where the parameters were; nothing if they were others then."""
    places = [then[name].to(p) for name, p in trained.items() if name in then]
    return places if [p.shape for p in places] == [p.shape for p in trained.values()] else []


def _flat(trained: Named, tensors: Sequence[Tensor]) -> Float[Tensor, " P"]:
    return Layout.of(trained).flatten([tensor.detach() for tensor in tensors])
