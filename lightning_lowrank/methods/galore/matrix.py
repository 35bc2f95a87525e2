"""One matrix that is trained in low rank: its bases, when they are made anew, and what becomes of moments then."""

import time
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.methods.galore.bases import Bases, Basis, Projection, without_rounding
from lightning_lowrank.methods.matrices import sides

OnRefresh = Literal["keep", "reset", "rotate"]

# Moments that turn with the basis, and squares of gradients, which turn as variances do.
LINEAR = ("exp_avg", "momentum_buffer")
SQUARES = ("exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class Policy:
    """What all matrices have in common.

    Attributes:
        update_every: Steps between refreshes.
        basis: How bases are made.
        on_refresh: What becomes of moments.
        seed: Of what is drawn.
    """

    update_every: int
    basis: Basis
    on_refresh: OnRefresh
    seed: int


@dataclass(eq=False)
class LowRankMatrix:
    """A parameter, and the subspace that it is trained in.

    Attributes:
        name: Its tag.
        parameter: The user's.
        projection: How its gradient is projected.
        policy: When and how bases are made.
        offset: Steps by which its refreshes come later than every `update_every`-th.
        bases: Those of now; None before the first gradient, and between steps where they are drawn.
        numbers: Of the last refresh.
        seconds: That refreshes took since this was last asked.
    """

    name: str
    parameter: nn.Parameter
    projection: Projection
    policy: Policy
    offset: int = 0
    bases: Bases | None = None
    num_steps: int = 0
    num_refreshes: int = 0
    is_due: bool = True
    numbers: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return sides(self.parameter)

    @property
    def low_shape(self) -> tuple[int, int]:
        """Rows and columns of its projection."""
        return self.projection.shape(self.shape)

    def narrow(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """A gradient in low rank; the bases are made anew first where that is due.

        Args:
            gradient: As a matrix.
            state: The optimizer's, of this parameter: changed as `on_refresh` says.
            group: Its parameter group.
        """
        self.is_due = self.is_due or (self.num_steps - self.offset) % self.policy.update_every == 0
        self.num_steps += 1
        bases = self.current()
        # A zero gradient has no directions, and one that is not finite would spoil them for all steps to come.
        if self.is_due and bool(gradient.isfinite().all() & gradient.any()):
            bases = self._refreshed(gradient, bases, state, group)
        if bases is None:
            bases = self._axes()
        self.bases = bases
        low = bases.project(gradient)
        two_sided = len(bases.sides) == 2
        return without_rounding(low) if two_sided and not state else low

    def current(self) -> Bases | None:
        """The bases of now, drawn anew where only their seed is kept."""
        if self.policy.basis == "random" and self.bases is None and self.num_refreshes:
            like = self.parameter.detach().flatten(1)
            return self.projection.made("random", like, None, self._generator).to(self.parameter)
        return self.bases

    def release(self) -> None:
        """Keep no bases that can be drawn again."""
        if self.policy.basis == "random" and self.num_refreshes:
            self.bases = None

    @property
    def num_bytes(self) -> int:
        """Of the bases that it keeps."""
        sides = () if self.bases is None or self.policy.basis == "random" else self.bases.sides
        return sum(basis.numel() * basis.element_size() for basis in sides)

    @property
    def planned_bytes(self) -> int:
        """The same, once it has them."""
        entries = 0 if self.policy.basis == "random" else self.projection.num_entries(self.shape)
        return entries * self.parameter.element_size()

    def take_seconds(self) -> float:
        """That refreshes took since this was last asked."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        kept = None if self.policy.basis == "random" and self.num_refreshes else self.bases
        bases = {} if kept is None else {"left": kept.left, "right": kept.right}
        counts = {"num_steps": self.num_steps, "num_refreshes": self.num_refreshes, "is_due": int(self.is_due)}
        return counts | {"low_shape": list(self.low_shape), "bases": bases, "numbers": dict(self.numbers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was stopped.

        Raises:
            ValueError: Its projection has another shape.
        """
        if list(state["low_shape"]) != list(self.low_shape):
            raise ValueError(
                f"{self.name!r} was trained as {tuple(state['low_shape'])} in the run that is resumed, which is now "
                f"{self.low_shape}: moments of one do not fit the other; give the same rank and side"
            )
        self.num_steps, self.num_refreshes = state["num_steps"], state["num_refreshes"]
        self.is_due = bool(state["is_due"])
        like = self.parameter.detach()
        self.bases = Bases(**state["bases"]).to(like) if state["bases"] else None
        self.numbers = {key: value.to(like.device) for key, value in state["numbers"].items()}

    def _refreshed(
        self, gradient: Tensor, old: Bases | None, state: dict[str, Any], group: dict[str, Any]
    ) -> Bases | None:
        """New bases, or the old ones where a decomposition fails."""
        begun = time.perf_counter()
        self.num_refreshes += 1
        with full_precision(gradient.device):
            try:
                new = self.projection.made(self.policy.basis, gradient, old, self._generator).to(self.parameter)
            except RuntimeError as error:  # of LAPACK; the next step tries again
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.num_refreshes -= 1
                return old
            if old is not None:
                self.numbers = {
                    "staleness": 1 - old.captured(gradient) / new.captured(gradient),
                    "overlap": new.overlap(old),
                }
                self._carry(new.turn(old), state, group)
        self.is_due = False
        self.seconds += time.perf_counter() - begun
        return new

    def _carry(self, turn: Bases, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moments of the old coordinates to the new ones."""
        if self.policy.on_refresh == "reset":
            state.clear()
        if self.policy.on_refresh == "rotate":
            rotate_(state, turn, group)

    def _axes(self) -> Bases:
        """Coordinate axes, in the place of bases that no gradient has given yet."""
        p = self.parameter
        left, right = (
            torch.eye(size, self.projection.rank, dtype=p.dtype, device=p.device) if reduced else None
            for size, reduced in zip(self.shape, (self.projection.left, self.projection.right), strict=True)
        )
        return Bases(left, right)

    def _generator(self) -> torch.Generator:
        """The same at this refresh, whatever else was drawn."""
        seed = zlib.crc32(f"{self.policy.seed} {self.name} {self.num_refreshes}".encode())
        return torch.Generator(self.parameter.device).manual_seed(seed)


def rotate_(state: dict[str, Any], turn: Bases, group: dict[str, Any]) -> None:
    """Turn the moments of an optimizer with the basis.

    First moments are vectors. Of second moments only the diagonal is known: what lies off it is taken from the first
    moments, as if the rest were uncorrelated.

    Args:
        state: Of one parameter; its moments are replaced.
        turn: From coordinates in the old basis to those in the new.
        group: Its parameter group, for the bias corrections.

    References:
        Robert et al. (2024), LDAdam, arXiv:2410.16103, Algorithm 2.
    """
    first = state.get("exp_avg")
    square = Bases(*(None if side is None else side.square() for side in (turn.left, turn.right)))
    for key in SQUARES:
        if key in state:
            mean = torch.zeros_like(state[key]) if first is None else first
            share = _correction(state, group) if first is not None else 1.0
            spread = square.project(state[key] - share * mean.square())
            state[key] = (spread.abs() + share * turn.project(mean).square()).contiguous()
    for key in LINEAR:
        if state.get(key) is not None:
            state[key] = turn.project(state[key]).contiguous()


def _correction(state: dict[str, Any], group: dict[str, Any]) -> float:
    """Bias correction of squared means, for a second moment that is not corrected."""
    (first, second), step = group["betas"], float(state["step"])
    return float((1 - second**step) / (1 - first**step) ** 2)
