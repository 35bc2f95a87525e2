"""Inputs and outputs of blocks on a due step, as sums over rows, micro-batches and processes.

Shape letters:  U channels of what a block puts out
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.distributed.shards import unspent, whole
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import working_dtype
from lightning_lowrank.measuring.sources.features import rows_of
from lightning_lowrank.models.taps import Listener, Timed, in_training, refuse_fast_path

# Energies of one block: of what comes in (with its number of entries), of what the block adds to it, of the part of
# that which its branches do not explain, of the gradients of the loss at both ends.
PLAIN = ("rows", "entering", "num_entering", "added", "unexplained", "gradient_in", "gradient_out")


@dataclass
class Flow:
    """Sums of one block over a due step.

    Attributes:
        magnitudes: Sum over rows of the absolute values of each channel.
        squares: Of their squares.
        tops: Largest absolute value of each channel.
        energies: One number for each of `PLAIN`.
        branches: Energy of what each branch puts out.
    """

    magnitudes: Float[Tensor, " U"]
    squares: Float[Tensor, " U"]
    tops: Float[Tensor, " U"]
    energies: dict[str, Tensor]
    branches: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "Flow":
        """Before the first row."""
        zeros = torch.zeros(width, dtype=working_dtype(device), device=device)
        return cls(zeros, zeros, zeros, dict.fromkeys(PLAIN, zeros.sum()))

    def add(self, rows: Float[Tensor, "*B U"]) -> None:
        """Add an output of the block."""
        flat, dtype = rows.flatten(0, -2), self.squares.dtype
        self.magnitudes = self.magnitudes + torch.linalg.vector_norm(flat, 1, 0, dtype=dtype)
        self.squares = self.squares + torch.linalg.vector_norm(flat, 2, 0, dtype=dtype).square()
        self.tops = torch.maximum(self.tops, torch.linalg.vector_norm(flat, torch.inf, 0, dtype=dtype))
        self.count("rows", float(len(flat)))

    def count(self, name: str, value: Tensor | float) -> None:
        """Add to one of `PLAIN`."""
        self.energies[name] = self.energies[name] + value

    def layout(self) -> tuple[int, tuple[str, ...]]:
        """The layout that other processes must share."""
        return len(self.tops), tuple(sorted(self.branches))

    def sums(self) -> Tensor:
        """All that adds up over processes."""
        single = [*self.energies.values(), *(self.branches[name] for name in sorted(self.branches))]
        return torch.cat([self.magnitudes, self.squares, torch.stack(single)])

    def with_sums(self, sums: Tensor, tops: Tensor) -> "Flow":
        """A copy with the sums of all processes."""
        width, branches = self.layout()
        magnitudes, squares, single = sums.split([width, width, len(sums) - 2 * width])
        values = iter(single.unbind())
        energies = {name: next(values) for name in self.energies}
        return Flow(magnitudes, squares, tops, energies, {name: next(values) for name in branches})


@dataclass
class Seen:
    """A tensor on its way, and how often it had been written to when it was seen.

    Attributes:
        energy: What it had then.
    """

    name: str
    tensor: Tensor
    version: int
    energy: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Seen":
        """As it is now."""
        return cls(name, tensor, tensor._version, _energy(_plain(tensor)))

    @property
    def value(self) -> Tensor | None:
        """The tensor; None if it has been written to since."""
        return _plain(self.tensor) if self.tensor._version == self.version else None


class Streams:
    """Listens to blocks, to their branches and to the gradients at both ends of each."""

    def __init__(self) -> None:
        self._entries = Listener(self._enter, before=True)
        self._exits = Listener(self._leave)
        self._timed: Timed = nullcontext
        self._around: dict[str, nn.Module] = {}
        self._block_of: dict[str, str] = {}
        self._error: Exception | None = None
        self._hooks: list[RemovableHandle] = []
        self._flows: dict[str, Flow] = {}
        self._lost: set[str] = set()
        # While a block runs: what came in, and what its branches gave.
        self._entered: dict[str, Seen] = {}
        self._written: dict[str, list[Seen]] = {}

    @property
    def blocks(self) -> list[str]:
        """In the order of the module."""
        return list(self._entries.layers)

    def plan(self, root: nn.Module, blocks: Mapping[str, str], branches: Mapping[str, str]) -> None:
        """Choose the layers.

        Args:
            root: The module that they are in.
            blocks: Tag of each by its name.
            branches: By the name of each the block that it is a part of.

        Raises:
            ValueError: One is inside a compiled module, or hooks would change what it computes.
        """
        for name in blocks:
            refuse_fast_path(root, name, "activations")
        layers = {tag: root.get_submodule(name) for name, tag in blocks.items()}
        self._around = {tag: root.get_submodule(name.rpartition(".")[0]) for name, tag in blocks.items()}
        inner = {blocks[block] + name.removeprefix(block): name for name, block in branches.items()}
        self._block_of = {tag: blocks[branches[name]] for tag, name in inner.items()}
        self._entries.plan(root, layers, "activations")
        self._exits.plan(root, {t: root.get_submodule(name) for t, name in inner.items()} | layers, "activations")

    def attach(self, timed: Timed) -> None:
        """Listen to this batch."""
        self._timed = timed
        self._entries.attach(timed)
        self._exits.attach(timed)

    def batch_over(self) -> Exception | None:
        """Stop listening; what went wrong."""
        for listener in (self._entries, self._exits):
            listener.detach()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._entered, self._written = [], {}, {}
        return self._entries.take_error() or self._exits.take_error() or self._error

    def detach(self) -> None:
        """Stop listening, and drop the unfinished sample."""
        self.batch_over()
        self._error, self._flows, self._lost = None, {}, set()

    def pooled(self, team: Team) -> dict[str, Flow]:
        """Sums of all processes together, of the blocks that all of them heard, in the order of the module."""
        heard = team.all_gather_object({name: flow.layout() for name, flow in self._flows.items()})
        names = [name for name in self.blocks if all(one.get(name) == heard[0].get(name, ()) for one in heard)]
        if not names:
            return {}
        flows = [self._flows[name] for name in names]
        sums = [flow.sums() for flow in flows]
        tops = torch.cat([flow.tops for flow in flows])
        every = tops.new_zeros(team.size, len(tops))
        every[team.rank] = tops  # a largest value is no sum: each process has a row
        largest = team.all_reduce(every).amax(0).split([len(flow.tops) for flow in flows])
        summed = team.all_reduce(torch.cat(sums)).split([len(part) for part in sums])
        return {n: f.with_sums(s, t) for n, f, s, t in zip(names, flows, summed, largest, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches a run of its own."""
        alone: dict[str, Any] = {
            "_error": None,
            "_hooks": [],
            "_flows": {},
            "_lost": set(),
            "_entered": {},
            "_written": {},
        }
        return vars(self) | alone | {"_around": {}, "_timed": nullcontext}

    def _enter(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        entering = next((part for part in inputs if isinstance(part, Tensor) and part.is_floating_point()), None)
        self._written.pop(name, None)
        self._entered.pop(name, None)
        if entering is not None:
            self._entered[name] = Seen.of(name, entering)
            if entering.requires_grad:
                self._hooks.append(entering.register_hook(partial(self._arrived, name, "gradient_in")))

    def _leave(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if name in self._block_of:
            self._of_branch(name, _tensor(output))
            return
        try:
            self._of_block(name, rows_of(layer, output, self._around[name]), _tensor(output))
        except Exception:
            self._lost.add(name)
            self._flows.pop(name, None)
            raise

    def _of_block(self, name: str, rows: Tensor | None, left: Tensor | None) -> None:
        entered, written = self._entered.pop(name, None), self._written.pop(name, [])
        if rows is None or left is None or name in self._lost:
            return
        flow = self._flows.setdefault(name, Flow.empty(rows.shape[-1], rows.device))
        flow.add(rows)
        if left.requires_grad:
            self._hooks.append(left.register_hook(partial(self._arrived, name, "gradient_out")))
        if entered is None or not (entered.tensor.requires_grad and left.requires_grad):
            flow.count("gradient_in", torch.nan)
        for part in written:
            flow.branches[part.name] = flow.branches.get(part.name, 0.0) + part.energy
        flow.count("entering", torch.nan if entered is None else entered.energy)
        flow.count("num_entering", 0.0 if entered is None else float(entered.tensor.numel()))
        added = None if entered is None else _difference(_plain(left), entered.value)
        flow.count("added", torch.nan if added is None else _energy(added))
        for part in written:
            added = _difference(added, part.value)
        flow.count("unexplained", torch.nan if added is None or not written else _energy(added))

    def _of_branch(self, name: str, output: Tensor | None) -> None:
        """Of a part of a block: one that puts out what may be added to the stream."""
        block = self._block_of[name]
        entered = self._entered.get(block)
        if output is not None and entered is not None and output.shape == entered.tensor.shape:
            self._written.setdefault(block, []).append(Seen.of(name, output))

    def _arrived(self, name: str, end: str, gradient: Tensor) -> None:
        """The gradient of the loss in what flows; called by the user's backward pass."""
        if not in_training():
            return
        with self._timed(), torch.no_grad():
            try:
                if name in self._flows:
                    self._flows[name].count(end, _energy(_plain(gradient)))
            except Exception as error:  # this runs inside the user's backward pass
                self._error = self._error or error.with_traceback(None)


def _tensor(output: Any) -> Tensor | None:
    """The first tensor of what a layer puts out."""
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


def _plain(tensor: Tensor) -> Tensor:
    return whole(unspent(tensor.detach()))


def _energy(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=working_dtype(tensor.device))
    return norm.square()


def _difference(now: Tensor | None, before: Tensor | None) -> Tensor | None:
    """In float32 at least; None where one is not known, or no change of the other."""
    if now is None or before is None or now.shape != before.shape:
        return None
    return now.to(torch.promote_types(now.dtype, torch.float32)) - before
