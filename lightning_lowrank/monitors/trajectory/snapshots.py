"""Snapshots of parameters along a run: a bounded number of them, spread over it, and their inner products.

Shape letters:  K snapshots   P entries of all parameters
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_lowrank.distributed.shards import local
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

# Entries of all snapshots that are widened at a time.
CHUNK = 2**16


class Snapshots:
    """Moves of parameters since the first snapshot; when there are too many, every second one goes.

    Args:
        spacing: Least number of optimizer steps between two.
        most: How many are kept, the first included.
    """

    def __init__(self, spacing: int, most: int) -> None:
        self._first_spacing, self._most = spacing, most
        self.begin()

    def begin(self) -> None:
        """Forget all."""
        self.times: list[int] = []
        self.spacing = self._first_spacing
        self._start: dict[str, Tensor] = {}
        # Of the snapshots after the first, which has not moved.
        self._moves: list[Tensor] = []
        self._gram = torch.zeros(0, 0)

    @property
    def names(self) -> list[str]:
        """Parameters that it follows; none before the first snapshot."""
        return list(self._start)

    @property
    def num_bytes(self) -> int:
        """Memory that snapshots take here."""
        return sum(tensor.nbytes for tensor in [*self._start.values(), *self._moves])

    def follows(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the parameters are those of the first snapshot, by name and shape."""
        return {name: p.shape for name, p in parameters.items()} == {n: p.shape for n, p in self._start.items()}

    def seen(self, step: int, parameters: Mapping[str, Tensor]) -> tuple[list[int], Float[Tensor, "N N"]]:
        """Times of the snapshots and of now, and inner products of what was moved; kept if it is far enough from the
        last one.
        """
        if not self.times or not self.follows(parameters):
            self.begin()
            self._start = {name: local(p).clone() for name, p in parameters.items()}
            device = next(iter(self._start.values())).device
            self.times, self._gram = [step], torch.zeros(1, 1, dtype=working_dtype(device), device=device)
        if self.times[-1] == step:  # seen before, and the sample was lost
            return self.times, self._gram
        move = self._moved(parameters)
        gram = self._with(move)
        times = [*self.times, step]
        if step - self.times[-1] >= self.spacing:
            self._keep(times, [*self._moves, move], gram)
        return times, gram

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, as many bytes as are kept."""
        return {
            "times": list(self.times),
            "spacing": self.spacing,
            "start": dict(self._start),
            "moves": list(self._moves),
            "gram": self._gram,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with them."""
        self.times, self.spacing = list(state["times"]), state["spacing"]
        self._start, self._moves, self._gram = dict(state["start"]), list(state["moves"]), state["gram"]

    def _keep(self, times: list[int], moves: list[Tensor], gram: Tensor) -> None:
        """Take over; where there are too many, leave out every second one, so that they are twice as far apart."""
        if len(times) > self._most:
            times, moves, gram = times[::2], moves[1::2], gram[::2, ::2].clone()
            self.spacing *= 2
        self.times, self._moves, self._gram = times, moves, gram

    def _moved(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
        """All parameters less their first values, in float32 at least."""
        rows = []
        for name, start in self._start.items():
            now = local(parameters[name])
            wide = torch.promote_types(now.dtype, torch.float32)
            rows.append((now.to(wide) - start.to(now.device, wide)).flatten())
        flat = [torch.view_as_real(row).flatten() if row.is_complex() else row for row in rows]
        return torch.cat(flat)

    def _with(self, move: Float[Tensor, " P"]) -> Float[Tensor, "N N"]:
        """Inner products with one more."""
        found = _products([*(kept.to(move.device) for kept in self._moves), move], move)
        new = torch.cat([found.new_zeros(1), found])
        gram = new.new_zeros(len(new), len(new))
        gram[:-1, :-1] = self._gram.to(new)
        gram[-1], gram[:, -1] = new, new
        return gram


def _products(rows: Sequence[Float[Tensor, " P"]], move: Float[Tensor, " P"]) -> Float[Tensor, " K"]:
    """Inner products of each with one, in double precision where there is such: short steps of a long path cancel."""
    dtype = working_dtype(move.device)
    found = torch.zeros(len(rows), dtype=dtype, device=move.device)
    size = max(1, CHUNK // len(rows))
    with full_precision(move.device):
        for start in range(0, len(move), size):
            some = slice(start, start + size)
            found += torch.stack([row[some] for row in rows]).to(dtype) @ move[some].to(dtype)
    return found
