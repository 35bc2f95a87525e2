"""A sample of `RankMonitor` rehearsed on tensors without entries, by the code that takes it in training.

Nothing here knows which matrix is solved by which route, or who gets what of whom: it watches what happens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_lowrank.analysis.planning.counting import Counting, Work, counted
from lightning_lowrank.distributed.shards import Route, is_sharded
from lightning_lowrank.distributed.team import Team, traffic
from lightning_lowrank.maths.spectra.decompose import decompose
from lightning_lowrank.maths.spectra.spectrum import Needs, Spectrum
from lightning_lowrank.measuring.gathering import Gathered, gather
from lightning_lowrank.measuring.matrix_recorder import MatrixRecorder
from lightning_lowrank.measuring.source import Reading, Step
from lightning_lowrank.monitors.rank import RankMonitor
from lightning_lowrank.watching.loops import LoopTraining

META = torch.device("meta")
GRAM, SKETCH = "Gram", "sketch"


@dataclass(frozen=True)
class Solved:
    """Cost of decomposing matrices of one shape.

    Attributes:
        route: How.
        flops: By kind of work.
        peak: Most bytes at once.
    """

    route: str
    flops: Counter[Work]
    peak: int


@dataclass
class Costs:
    """Cost of a sample.

    Attributes:
        size: How many processes there are.
        rank: The one with most to do.
        matrices: By route, of all processes.
        flops: By route and kind of work, of the process with most to do.
        total_flops: Of all processes.
        summed: Matrices of which only Gram matrices moved to the process with most to do.
        sides: How many different short sides there are, over all sources.
        tensors: That the process with most to do reads.
        elements: Numbers that the process with most to do reads.
        sent: Bytes that each process sends to others.
        received: Bytes that each process receives from others.
        pooled: Bytes of the one vector that is added up over all processes.
        collectives: Exchanges of shards in a sample; one more adds up what was found.
        kept: Bytes that are held from before the step until after it, per process.
        peak: Most bytes at once, what is kept included, on the process with most to do.
        largest: Bytes of the largest matrix.
    """

    size: int
    rank: int = 0
    matrices: Counter[str] = field(default_factory=Counter)
    flops: Counter[tuple[str, Work]] = field(default_factory=Counter)
    total_flops: float = 0.0
    summed: int = 0
    sides: int = 0
    tensors: int = 0
    elements: int = 0
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    pooled: int = 0
    collectives: int = 0
    kept: int = 0
    peak: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        self.sent, self.received = [0] * self.size, [0] * self.size


class Rehearsed(Team):
    """A team of which one process is there, and no other: notes what each would send."""

    costs: Costs

    def gather(self, groups: Sequence[Sequence[Tensor]], owners: Sequence[int]) -> list[list[Tensor] | None]:
        """The whole tensors of this process."""
        routes = [Route(t, owner) for group, owner in zip(groups, owners, strict=True) for t in group if is_sharded(t)]
        self.costs.collectives += bool(routes)
        for rank in range(self.size):
            outgoing, incoming = traffic(routes, rank, self.size)
            self.costs.sent[rank] += sum(outgoing) - outgoing[rank]
            self.costs.received[rank] += sum(incoming) - incoming[rank]
        return super().gather(groups, owners)


def rehearsed(module: nn.Module, monitor: RankMonitor, num_devices: int = 1) -> Costs:
    """What a sample takes of the process that has most to do, the weights sharded over all by FSDP2 if there are
    several.

    Args:
        module: On the meta device; it is sharded in place.
        monitor: Of sources of parameters.
        num_devices: Processes.

    Raises:
        ValueError: The monitor finds no matrix, a pattern matches nothing, or this process is one of several already.
    """
    recorders = [recorder for recorder in monitor.recorders if isinstance(recorder, MatrixRecorder)]
    training = LoopTraining(module)
    for recorder in recorders:
        recorder.plan(training)
    team = Rehearsed(0, num_devices)
    for recorder in recorders:
        recorder.share(team)
    if not sum(team.loads):
        raise ValueError("there is no matrix to watch; give a module that has some, or another `match`")
    team.rank = max(range(num_devices), key=team.loads.__getitem__)
    team.costs = Costs(num_devices, team.rank)
    with as_one_of(num_devices, team.rank):
        if num_devices > 1:
            fully_shard(module, mesh=init_device_mesh("cpu", (num_devices,)))
        for recorder in recorders:
            recorder.plan(training)
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        _Sample(recorders, team).take(_step(module))
    return team.costs


@contextmanager
def as_one_of(size: int, rank: int) -> Iterator[None]:
    """One of several processes that say nothing to each other.

    Raises:
        ValueError: This process is one of several that do.
    """
    if size == 1:
        yield
        return
    if dist.is_initialized():
        raise ValueError("a plan for several devices needs a process without a process group, and this process has one")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _step(module: nn.Module) -> Step:
    """Of an optimizer that has Adam's state."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        optimizer.state[p] = {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
    return Step(optimizer, frozenset(id(p) for p in module.parameters()))


class _Sample:
    """One sample, as `Sampling` leads recorders through it."""

    def __init__(self, recorders: Sequence[MatrixRecorder], team: Rehearsed) -> None:
        self._recorders, self._team, self._costs = recorders, team, team.costs
        self._counting = Counting()
        self._solved: dict[tuple[torch.Size, torch.dtype, Needs], Solved] = {}

    def take(self, step: Step) -> None:
        """Count all of it."""
        for recorder in self._recorders:
            self._moment(recorder, recorder.probe.source.gradients_final, step)
        self._costs.kept = self._counting.held
        for recorder in self._recorders:
            self._moment(recorder, recorder.probe.source.step_done, step)
        self._costs.peak = max(self._costs.peak, self._counting.peak)
        if self._team.size > 1:
            packed = [recorder.packed(META) for recorder in self._recorders]
            # Beside what was found, one number of what was lost.
            self._costs.pooled = packed[0].element_size() * (1 + sum(map(len, packed)))

    def _moment(self, recorder: MatrixRecorder, read: Callable[[Step], list[Reading]], step: Step) -> None:
        """What one recorder reads at one moment."""
        with counted(self._counting):
            readings = read(step)
        if not readings:
            return
        for reading in readings:
            self._note(reading, recorder.needs)
        self._costs.sides += len({min(reading.shape[-2:]) for reading in readings})
        owners = [recorder.owners[reading.labels[0]] for reading in readings]
        rounds = gather(readings, owners, self._team, spectra_only=True, beside=False)
        while (taken := self._next(rounds)) is not None:
            self._measure(recorder.needs, taken)
            del taken

    def _note(self, reading: Reading, needs: Needs) -> None:
        """What counts for all processes."""
        dtype = reading.dtype or reading.like[0].dtype
        solved = self._of(reading.shape, dtype, needs)
        self._costs.matrices[solved.route] += reading.shape[:-2].numel()
        self._costs.total_flops += sum(solved.flops.values())
        self._costs.largest = max(self._costs.largest, reading.shape.numel() * dtype.itemsize)

    def _next(self, rounds: Iterator[list[Gathered]]) -> list[Gathered] | None:
        """What this process gets next, and what it takes to put it together."""
        before = Counter(self._counting.flops)
        with counted(self._counting):
            taken = next(rounds, None)
        made = self._counting.flops - before
        self._costs.flops.update({(GRAM, work): number for work, number in made.items()})
        return taken

    def _measure(self, needs: Needs, taken: Sequence[Gathered]) -> None:
        """What one round takes besides."""
        matrices = [one.value for one in taken if isinstance(one.value, Tensor)]
        self._costs.summed += len(taken) - len(matrices)
        self._costs.tensors += len(taken)
        self._costs.elements += sum(matrix.numel() for matrix in matrices)
        found = [self._of(matrix.shape, matrix.dtype, needs) for matrix in matrices]
        for solved in found:
            self._costs.flops.update({(solved.route, work): number for work, number in solved.flops.items()})
        # What is sketched is solved alone, and takes long to rehearse; the others share buffers.
        together = [m for m, solved in zip(matrices, found, strict=True) if solved.route != SKETCH]
        with counted(Counting()) as counting:
            decompose(together, needs)
        peaks = [counting.peak, *(solved.peak for solved in found if solved.route == SKETCH)]
        self._costs.peak = max(self._costs.peak, self._counting.held + max(peaks))

    def _of(self, shape: torch.Size, dtype: torch.dtype, needs: Needs) -> Solved:
        key = (shape, dtype, needs)
        if key not in self._solved:
            with counted(Counting()) as counting:
                (spectrum,) = decompose([torch.empty(shape, dtype=dtype, device=META)], needs).spectra
            route, made = _route(spectrum), shape.numel() * dtype.itemsize
            # A sketch is many products of a few vectors with one matrix: its side is what tells how fast they are.
            one = Work("products", torch.float32, min(shape[-2:]))
            flops = Counter({one: counting.flops.total()}) if route == SKETCH else counting.flops
            self._solved[key] = Solved(route, flops, counting.peak - made)
        return self._solved[key]


def _route(spectrum: Spectrum) -> str:
    """How a spectrum was found, from what it says of itself."""
    if spectrum.num_probes:
        return SKETCH
    return (
        f"{GRAM}, {str(spectrum.values.dtype).removeprefix('torch.')}" if spectrum.whole else "moments of Gram, float32"
    )
