"""How often the truth is within the errors that monitors give: one trial per seed, each of another network.

    python -m benchmarks.coverage                # the table of docs/evidence/errors.md, about ten minutes on one core
    python -m benchmarks.coverage --trials 40    # a quarter of the time

The truth comes from dense matrices: eigenvalues of Hessians and Gauss-Newton matrices by `torch.autograd` and
`torch.linalg`, kernels of Jacobians that `torch.func` forms. Networks are small and trained for 0 to 400 steps.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from lightning_lowrank import statistics
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.tap import LossTap
from lightning_lowrank.maths.operators.eigenspaces import energy_share, of_directions
from lightning_lowrank.maths.operators.estimates import Found
from lightning_lowrank.maths.operators.operators import Layout, Operator
from lightning_lowrank.maths.spectra.sketch import estimate, sketch
from lightning_lowrank.monitors.curvature.loss_operators import LossOperators
from lightning_lowrank.monitors.curvature.measurement import EFFORTS, Curvatures
from lightning_lowrank.monitors.curvature.stability import threshold
from lightning_lowrank.monitors.tangent_kernel import by_layer
from lightning_lowrank.monitors.tangent_kernel.kernels import KernelName
from lightning_lowrank.monitors.tangent_kernel.measurement import KernelEffort, TangentKernels
from lightning_lowrank.monitors.tangent_kernel.outputs import KernelOutputs, OwnOutputs, kernel_outputs
from lightning_lowrank.monitors.tangent_kernel.source import STEPS

PAGE = Path("docs/evidence/errors.md")
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
CLASSES, ROWS, TOP, STEPS_TRAINED = 4, 150, 3, (0, 20, 100, 400)
# Shares of trials within one and within two errors that are asked for; where more are within one it is a bound.
ONE, TWO, BOUND = 0.6, 0.9, 0.76
# What an error may lack by rounding alone.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Trial:
    """One number, what it should have been, and its error."""

    value: float
    truth: float
    error: float

    @property
    def off(self) -> float:
        """Distance from the truth in errors; 0 where both agree to rounding."""
        distance = abs(self.value - self.truth) - ROUNDING * abs(self.truth)
        return 0.0 if distance <= 0 else math.inf if self.error == 0 else distance / self.error


@dataclass(frozen=True)
class Coverage:
    """Of the trials of one quantity, how many were within one and within two errors."""

    one: float
    two: float
    trials: int
    relative_error: float
    relative_bias: float

    @classmethod
    def of(cls, trials: list[Trial]) -> "Coverage":
        """From all trials; sizes are relative to the mean size of the truth."""
        size = sum(abs(t.truth) for t in trials) / len(trials) or 1.0
        within = [sum(t.off <= limit for t in trials) / len(trials) for limit in (1, 2)]
        error, bias = (sum(of(t) for t in trials) / len(trials) / size for of in (cls._error, cls._deviation))
        return cls(within[0], within[1], len(trials), error, bias)

    @staticmethod
    def _error(trial: Trial) -> float:
        return trial.error

    @staticmethod
    def _deviation(trial: Trial) -> float:
        return trial.value - trial.truth

    @property
    def kind(self) -> str:
        """What the quantity's `_error` is."""
        return "bound" if self.one > BOUND else "error"


Trials = dict[str, list[Trial]]


@dataclass(frozen=True)
class Example:
    """A network, a batch and the optimizer that trained it."""

    net: nn.Sequential
    inputs: Tensor
    labels: Tensor
    optimizer: torch.optim.SGD

    @classmethod
    def of(cls, seed: int, width: int = 10) -> "Example":
        """Of a teacher's labels on Gaussian inputs, in double precision."""
        torch.manual_seed(seed)
        sizes = [8, width, width, CLASSES]
        first, second, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
        net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last).double()
        inputs = torch.randn(ROWS, sizes[0]).double()
        labels = (inputs @ torch.randn(sizes[0], CLASSES).double()).argmax(1)
        example = cls(net, inputs, labels, torch.optim.SGD(net.parameters(), lr=0.3))
        for _ in range(STEPS_TRAINED[seed % len(STEPS_TRAINED)]):
            example.optimizer.zero_grad()
            example.loss().backward()
            example.optimizer.step()
        return example

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """Its parameters."""
        return dict(self.net.named_parameters())

    def loss(self) -> Tensor:
        """Cross-entropy of the batch."""
        return F.cross_entropy(self.net(self.inputs), self.labels)

    def jacobians(self) -> list[Tensor]:
        """Of each parameter, rows by classes by entries."""
        found = jacrev(lambda params: functional_call(self.net, params, (self.inputs,)))(self.named)
        return [part.detach().flatten(2) for part in found.values()]

    def root(self) -> Tensor:
        """The root of the loss's Hessian in each row of the outputs."""
        shares = self.net(self.inputs).detach().softmax(-1)
        return (torch.diag_embed(shares.sqrt()) - shares[:, :, None] * shares.sqrt()[:, None]) / ROWS**0.5

    def hessian(self) -> Tensor:
        """Of the loss, by double backward, row by row."""
        parameters = list(self.named.values())
        slopes = torch.autograd.grad(self.loss(), parameters, create_graph=True)
        flat = torch.cat([slope.flatten() for slope in slopes])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
        matrix = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        return (matrix + matrix.T) / 2

    def gauss_newton_root(self) -> Tensor:
        """A matrix whose Gram matrix over rows is the Gauss-Newton matrix."""
        return torch.einsum("rcd,rcp->rdp", self.root(), torch.cat(self.jacobians(), -1)).flatten(0, 1)

    def outputs(self, kernel: KernelName) -> KernelOutputs:
        """As a training step shows them."""
        tap = LossTap()
        with tap:
            loss = self.loss()
        found = kernel_outputs(OwnOutputs.of(tap.reproduce(loss), kernel, num_columns=256, seed=0), self.named, Team())
        assert found is not None
        return found

    def moved(self, share: float) -> "Example":
        """The same, with each parameter moved at random by so much of its length."""
        other = deepcopy(self)
        with torch.no_grad():
            for parameter in other.net.parameters():
                parameter.add_(share * torch.randn_like(parameter) * parameter.norm() / parameter.numel() ** 0.5)
        return other


def operator(matrix: Tensor) -> Operator:
    """That of a dense matrix."""
    return Operator(len(matrix), lambda vector: matrix @ vector, matrix.device, matrix.dtype)


def of_spectrum(eigenvalues: Tensor, name: str, top: int = TOP) -> dict[str, Tensor]:
    """Sums over eigenvalues, and the largest of them."""
    values = eigenvalues.flip(0)
    sizes = values.abs().sort(descending=True).values
    shares = sizes / sizes.sum()
    found = {
        "trace": values.sum(),
        "squared_norm": values.square().sum(),
        "participation_ratio": sizes.sum() ** 2 / sizes.square().sum(),
        "effective_rank_energy": torch.special.entr(shares).sum().exp(),
        "energy_rank": (shares.cumsum(0) < 0.9).sum() + 1.0,
        "negative_mass": sizes.new_tensor(float(values.clamp(max=0).abs().sum() / sizes.sum())),
        "lambda_max": values[0],
        "lambda_min": values[-1],
    }
    found |= {f"lambda_{i}": values[i - 1] for i in range(2, top + 1)}
    return {f"{name}_{label}": value for label, value in found.items()}


def curvatures(example: Example) -> tuple[LossOperators, dict[str, Tensor]]:
    """The loss as `CurvatureMonitor` sees it, and its dense matrices."""
    root, layout = example.gauss_newton_root(), Layout.of(example.named)
    matrices = {"hessian": example.hessian(), "gauss_newton": root.T @ root}
    slopes = torch.autograd.grad(example.loss(), list(example.named.values()))
    operators = {name: operator(matrix) for name, matrix in matrices.items()}
    edge = threshold(example.optimizer, list(example.named.values()))
    return LossOperators(example.loss().detach(), layout.flatten(slopes), operators, layout, edge), matrices


def curvature(seed: int, level: str) -> Iterator[tuple[str, Trial]]:
    """What `CurvatureMonitor` finds of one network, and of eigenvectors of the same a little later."""
    example, top = Example.of(seed), 5
    (loss, matrices), layout = curvatures(example), Layout.of(example.named)
    state = Curvatures(EFFORTS[level], top)
    found = state.measure(loss, torch.Generator().manual_seed(1000 + seed))
    for name in matrices:
        del found.layers[f"{name}_top_share"], found.layer_errors[f"{name}_top_share"]
    rest = matrices["hessian"] - matrices["gauss_newton"]
    truths = {"residual_trace": rest.trace(), "residual_squared_norm": rest.square().sum()}
    truths["sharpness_over_threshold"] = torch.linalg.eigvalsh(matrices["hessian"])[-1] * 0.15
    for name, matrix in matrices.items():
        values = torch.linalg.eigvalsh(matrix)
        truths |= of_spectrum(values if name == "hessian" else values.clamp(min=0), name, top)
        truths[f"{name}_layer_trace"] = torch.stack([part.sum() for part in matrix.diagonal().split(layout.sizes)])
        truths[f"{name}_layer_squared_norm"] = torch.stack([p.square().sum() for p in matrix.split(layout.sizes)])
    yield from trials_of(found, truths)
    yield from directions(state, matrices, example.moved(0.1), seed)


def directions(state: Curvatures, before: Mapping[str, Tensor], now: Example, seed: int) -> Iterator[tuple[str, Trial]]:
    """What the next sample says of eigenvectors: its own, and those of the last."""
    loss, matrices = curvatures(now)
    earlier, later = ({name: _steepest(m, state.top_k) for name, m in some.items()} for some in (before, matrices))
    gradient = loss.gradient / loss.gradient.norm()
    off = state.off("hessian", state.tops["hessian"])
    share = of_directions(energy_share(gradient, state.tops["hessian"]), off)
    found, every = Found(), state.measure(loss, torch.Generator().manual_seed(2000 + seed))
    found.note("gradient_in_top", share)
    truths = {"gradient_in_top": (earlier["hessian"] @ gradient).square().sum()}
    for name, steepest in later.items():
        overlap, shares = f"{name}_eigenspace_overlap", f"{name}_top_share"
        found.values[overlap], found.errors[overlap] = every.values[overlap], every.errors[overlap]
        found.layers[shares], found.layer_errors[shares] = every.layers[shares], every.layer_errors[shares]
        truths[overlap] = (earlier[name] @ steepest.T).square().sum() / len(steepest)
        truths[shares] = torch.stack([part.sum() for part in steepest.square().mean(0).split(loss.layout.sizes)])
    yield from trials_of(found, truths)


def _steepest(matrix: Tensor, k: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, one a row."""
    return torch.linalg.eigh(matrix).eigenvectors.T[-k:]


def kernel_of(jacobian: Tensor, kernel: KernelName) -> Tensor:
    """From the Jacobian, rows by classes by entries."""
    if kernel == "class_summed":
        return torch.einsum("icp,jcp->ij", jacobian, jacobian)
    flat = jacobian.flatten(0, 1) if kernel == "full" else jacobian.sum(1) / CLASSES**0.5
    return flat @ flat.T


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Between two matrices."""
    return (one * other).sum() / (one.norm() * other.norm())


@contextmanager
def estimated() -> Iterator[None]:
    """Class-summed kernels are estimated also where they could be known exactly."""
    usual, by_layer.ROWS = by_layer.ROWS, 0
    try:
        yield
    finally:
        by_layer.ROWS = usual


def tangent_kernel(seed: int, kernel: KernelName, moved: float = 0.1) -> Iterator[tuple[str, Trial]]:
    """What `NTKMonitor` finds of one network and of the same a little later."""
    before, rate, steps = Example.of(seed), 0.1, 300
    now = before.moved(moved)
    state = TangentKernels(kernel, KernelEffort(TOP, 16, steps=STEPS[kernel]), seed)
    with estimated():
        state.measure(before.outputs(kernel), rate, 1, torch.Generator().manual_seed(seed))
        found = state.measure(now.outputs(kernel), rate, steps, torch.Generator().manual_seed(5000 + seed))
    assert not state.exact
    earlier, later = before.jacobians(), now.jacobians()
    matrix = kernel_of(torch.cat(later, -1), kernel)
    truths = of_spectrum(torch.linalg.eigvalsh(matrix).clamp(min=0), "ntk")
    truths |= of_labels(matrix, now.labels)
    motion = 1 - cosine(matrix, kernel_of(torch.cat(earlier, -1), kernel))
    truths |= {"ntk_velocity": motion, "ntk_distance_to_start": motion}
    kind: KernelName = "full" if kernel == "class_summed" else kernel
    pairs = [(kernel_of(a, kind), kernel_of(b, kind)) for a, b in zip(later, earlier, strict=True)]
    sizes = torch.stack([one.trace() for one, _ in pairs])
    truths["ntk_layer_share"] = sizes / sizes.sum()
    truths["ntk_layer_velocity"] = torch.stack([1 - cosine(one, other) for one, other in pairs])
    root = now.gauss_newton_root()
    values = torch.linalg.eigvalsh(root @ root.T).clamp(min=0)
    truths |= of_spectrum(values, "ntk_gauss_newton")
    constants = 1 / (rate * values.flip(0))
    truths |= {f"ntk_time_constant{end}": constants[i] for i, end in enumerate(("", "_2", "_3"))}
    truths["ntk_modes_learnt"] = (values * rate * steps >= 1).sum() + 0.0
    yield from trials_of(found, truths)


def of_labels(matrix: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a kernel and its top modes have in common with one-hot labels."""
    wanted = F.one_hot(labels, CLASSES).to(matrix)
    columns = wanted.reshape(len(matrix), -1)
    middle = torch.kron(torch.eye(ROWS).to(matrix) - 1 / ROWS, torch.eye(len(matrix) // ROWS).to(matrix))
    top = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :TOP]
    energies = (top.T @ columns).square().sum(-1) / wanted.square().sum()
    target = columns @ columns.T
    return {
        "ntk_condition": torch.linalg.eigvalsh(matrix)[-1] / torch.linalg.eigvalsh(matrix)[-TOP],
        "ntk_label_alignment": cosine(matrix, target),
        "ntk_centred_label_alignment": cosine(middle @ matrix @ middle, middle @ target @ middle),
        "ntk_label_energy_in_top": energies.sum(),
    } | {f"ntk_label_energy_{i}": energy for i, energy in enumerate(energies, 1)}


def trials_of(found: Found, truths: Mapping[str, Tensor]) -> Iterator[tuple[str, Trial]]:
    """Of every number that has an error; what is blank because it could be anything claims nothing."""
    for values, errors in ((found.values, found.errors), (found.layers, found.layer_errors)):
        for name, error in errors.items():
            rows = (part.double().reshape(-1).tolist() for part in (values[name], truths[name], error))
            trials = (Trial(*row) for row in zip(*rows, strict=True))
            yield from ((name, trial) for trial in trials if not (math.isnan(trial.value) and trial.error >= 1))


def sketched(seed: int) -> Iterator[tuple[str, Trial]]:
    """What a sketch says of a matrix with known singular values."""
    draw = torch.Generator().manual_seed(seed)
    decay = (0.5, 1.0, 2.0)[seed % 3]
    values = torch.arange(1, 301).double() ** -decay
    left, right = (torch.linalg.qr(torch.randn(n, 300, generator=draw).double()).Q for n in (400, 300))
    spectrum = sketch(((left * values) @ right.T).float(), generator=torch.Generator().manual_seed(9000 + seed))
    energies = values.square() / values.square().sum()
    truths = {
        "effective_rank": torch.special.entr(values / values.sum()).sum().exp(),
        "effective_rank_energy": torch.special.entr(energies).sum().exp(),
        "participation_ratio": 1 / energies.square().sum(),
        "energy_rank": (energies.cumsum(0) < 0.9).sum() + 1.0,
    }
    for name, truth in truths.items():
        value, error = estimate(statistics.find(name), spectrum)
        yield f"{name} (above 1500 a side)", Trial(float(value), float(truth), float(error))


SETUPS: dict[str, Callable[[int], Iterator[tuple[str, Trial]]]] = {
    "CurvatureMonitor, standard": lambda seed: curvature(seed, "standard"),
    "CurvatureMonitor, full": lambda seed: curvature(seed, "full"),
    **{
        f"NTKMonitor, {kernel}": lambda seed, kernel=kernel: tangent_kernel(seed, kernel)  # type: ignore[misc]
        for kernel in get_args(KernelName)
    },
    "Sketches": sketched,
}


def coverage(setup: str, seeds: range) -> dict[str, Coverage]:
    """Of every estimated quantity of a setup."""
    trials: Trials = {}
    for seed in seeds:
        for name, trial in SETUPS[setup](seed):
            trials.setdefault(name, []).append(trial)
    return {name: Coverage.of(of_name) for name, of_name in trials.items()}


def row(setup: str, name: str, found: Coverage) -> str:
    """One line of the table."""
    sizes = f"{found.relative_error:.1%} | {found.relative_bias:+.1%}"
    return f"| {setup} | `{name}` | {found.one:.2f} | {found.two:.2f} | {found.trials} | {sizes} | {found.kind} |"


def main(trials: int = 160, page: Path = PAGE) -> None:
    """Write the table into the page.

    Args:
        trials: Seeds of each setup.
        page: Its table is replaced.
    """
    lines = ["| of | quantity | within one | within two | numbers | mean error | mean deviation | its `_error` is |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for setup in SETUPS:
        lines += [row(setup, name, found) for name, found in sorted(coverage(setup, range(trials)).items())]
        print(setup, flush=True)
    before, rest = page.read_text().split(BEGIN)
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    auto_cli(main)
