"""One matrix trained in low rank: its bases, their refreshes, and what happens to moments then."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.methods.galore.bases import Bases, Basis, Projection, without_rounding
from lightning_lowrank.methods.galore.ranks import SAMPLES, energy_rank_of, measured_rank
from lightning_lowrank.methods.galore.residual import limited, residual_step
from lightning_lowrank.methods.matrices import sides

OnRefresh = Literal["keep", "reset", "rotate"]
Residual = Literal["fira"] | None

# Moments that turn with the basis, and squares of gradients, which turn as variances do.
LINEAR = ("exp_avg", "momentum_buffer")
SQUARES = ("exp_avg_sq", "square_avg")


@dataclass(frozen=True)
class Policy:
    """Options that all matrices share.

    Attributes:
        update_every: Steps between refreshes.
        basis: How bases are computed.
        on_refresh: What happens to moments.
        residual: What happens to the part of a gradient outside of the subspace.
        seed: Seed for random bases.
    """

    update_every: int
    basis: Basis
    on_refresh: OnRefresh
    residual: Residual
    seed: int


@dataclass(eq=False)
class LowRankMatrix:
    """A parameter and the subspace in which it trains.

    Attributes:
        name: Its tag.
        parameter: The user's parameter.
        projection: How its gradient is projected.
        policy: When and how bases are made.
        offset: Steps by which its refreshes come later than every `update_every`-th step.
        samples: Energy ranks of its first gradients, which determine its rank; None if the rank was given.
        bases: Current bases; None before the first gradient, and between steps if they are random.
        numbers: Numbers of the last refresh.
        residual_norm: Norm of the last step outside of the subspace, divided by its learning rate; None before.
        seconds: Time of refreshes since the last query.
    """

    name: str
    parameter: nn.Parameter
    projection: Projection
    policy: Policy
    offset: int = 0
    samples: list[float] | None = None
    bases: Bases | None = None
    num_steps: int = 0
    num_refreshes: int = 0
    is_due: bool = True
    numbers: dict[str, Tensor] = field(default_factory=dict)
    residual_norm: Tensor | None = None
    seconds: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return sides(self.parameter)

    @property
    def low_shape(self) -> tuple[int, int]:
        """Rows and columns of its projection."""
        return self.projection.shape(self.shape)

    @property
    def is_measuring(self) -> bool:
        """Whether its rank is still to be measured."""
        return self.samples is not None and len(self.samples) < SAMPLES

    def narrow(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """A gradient in low rank; first renews the bases if this is due.

        Args:
            gradient: The gradient as a matrix.
            state: The optimizer's state of this parameter, which changes according to `on_refresh`.
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

    def widen(self, step: Tensor, gradient: Callable[[], Tensor], group: dict[str, Any]) -> Tensor:
        """A low-rank step as a step of the full matrix, with the residual step if requested.

        Args:
            step: The optimizer's step of the projection.
            gradient: Returns the gradient as a matrix, as it was before the projection.
            group: Its parameter group.
        """
        bases = self.bases
        assert bases is not None
        wide = bases.back(step)
        if self.policy.residual is None:
            return wide
        rest = residual_step(gradient(), step, bases, ascends=bool(group.get("maximize")))
        rest, self.residual_norm = limited(rest, float(group.get("lr", 1.0)), self._last_residual_norm())
        return wide + rest

    def current(self) -> Bases | None:
        """The current bases; random ones are drawn again from their seed."""
        if self.policy.basis == "random" and self.bases is None and self.num_refreshes:
            like = self.parameter.detach().flatten(1)
            return self.projection.made("random", like, None, self._generator).to(self.parameter)
        return self.bases

    def release(self) -> None:
        """Drop bases that can be drawn again."""
        if self.policy.basis == "random" and self.num_refreshes:
            self.bases = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its stored bases and of the norm."""
        sides = [] if self.bases is None or self.policy.basis == "random" else self.bases.sides
        kept = sides if self.residual_norm is None else [*sides, self.residual_norm]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def planned_bytes(self) -> int:
        """The same, once they exist."""
        entries = 0 if self.policy.basis == "random" else self.projection.num_entries(self.shape)
        norm = 0 if self.policy.residual is None else self._last_residual_norm().element_size()
        return entries * self.parameter.element_size() + norm

    def take_seconds(self) -> float:
        """Time of refreshes since the last query."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        own = None if self.policy.basis == "random" and self.num_refreshes else self.bases
        bases = {} if own is None else {"left": own.left, "right": own.right}
        counts = {"num_steps": self.num_steps, "num_refreshes": self.num_refreshes, "is_due": int(self.is_due)}
        residual = {} if self.residual_norm is None else {"norm": self.residual_norm}
        ranks = {"rank": self.projection.rank, "samples": list(self.samples or []), "low_shape": list(self.low_shape)}
        return counts | ranks | {"bases": bases, "numbers": dict(self.numbers), "residual": residual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stopped run.

        Raises:
            ValueError: Its projection has another shape.
        """
        if self.samples is not None and state["samples"]:
            self.samples, self.projection = list(state["samples"]), replace(self.projection, rank=state["rank"])
        if list(state["low_shape"]) != list(self.low_shape):
            raise ValueError(
                f"{self.name!r} had the projected shape {tuple(state['low_shape'])} in the resumed run, and has "
                f"{self.low_shape} now, so its moments do not fit; give the same rank and side"
            )
        self.num_steps, self.num_refreshes = state["num_steps"], state["num_refreshes"]
        self.is_due = bool(state["is_due"])
        like = self.parameter.detach()
        self.bases = Bases(**state["bases"]).to(like) if state["bases"] else None
        self.numbers = {key: value.to(like.device) for key, value in state["numbers"].items()}
        self.residual_norm = state["residual"]["norm"].to(like.device) if state["residual"] else None

    def _refreshed(
        self, gradient: Tensor, old: Bases | None, state: dict[str, Any], group: dict[str, Any]
    ) -> Bases | None:
        """New bases, or the old ones where a decomposition fails."""
        begun = time.perf_counter()
        self.num_refreshes += 1
        with full_precision(gradient.device):
            samples = [*(self.samples or []), energy_rank_of(gradient)] if self.is_measuring else self.samples
            projection = self._measured(samples)
            last = old if projection == self.projection else None
            try:
                new = projection.made(self.policy.basis, gradient, last, self._generator).to(self.parameter)
            except RuntimeError as error:  # of LAPACK; the next step tries again
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.num_refreshes -= 1
                return old
            self.samples = samples
            if projection != self.projection:
                self.projection = projection
                state.clear()
            elif old is not None:
                self.numbers = {
                    "staleness": 1 - old.captured(gradient) / new.captured(gradient),
                    "overlap": new.overlap(old),
                }
                self._carry(new.turn(old), state, group)
        self.is_due = False
        self.seconds += time.perf_counter() - begun
        return new

    def _measured(self, samples: Sequence[float] | None) -> Projection:
        """That of the measured rank, once all samples are there."""
        if not self.is_measuring or samples is None or len(samples) < SAMPLES:
            return self.projection
        return replace(self.projection, rank=measured_rank(samples, min(self.shape), self.projection.rank))

    def _carry(self, turn: Bases, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Moments of the old coordinates to the new ones."""
        if self.policy.on_refresh == "reset":
            state.clear()
        if self.policy.on_refresh == "rotate":
            rotate_(state, turn, group)

    def _last_residual_norm(self) -> Tensor:
        """Infinite before the first step, which nothing limits."""
        if self.residual_norm is not None:
            return self.residual_norm
        like = self.parameter
        return torch.full((), float("inf"), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

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
    """Rotate the moments of an optimizer with the basis.

    First moments are vectors. Of second moments only the diagonal is known. Off-diagonal entries are taken from the
    first moments, as if the rest were uncorrelated.

    Args:
        state: State of one parameter; its moments are replaced.
        turn: Converts coordinates in the old basis to those in the new one.
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
