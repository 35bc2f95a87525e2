"""Oracles: kernels of Jacobians that `torch.func` forms, closed forms of linear nets, and gradient flow integrated step
by step.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_lowrank.maths.operators.eigenspaces import top_eigenpairs
from lightning_lowrank.maths.operators.operators import Jacobian, Layout, gauss_newton
from lightning_lowrank.maths.operators.traces import random_signs, spectral_estimate
from lightning_lowrank.maths.spectra.sketch import estimate
from lightning_lowrank.monitors.tangent_kernel import estimates
from lightning_lowrank.monitors.tangent_kernel.kernels import (
    exact_kernel,
    exact_modes,
    kernel_operator,
    layer_kernels,
    sampled_outputs,
    spectrum_of_modes,
)
from lightning_lowrank.statistics import effective_rank_energy, energy_rank, numerical_rank, participation_ratio
from tests.oracles.kernels import (
    COLUMNS,
    NAMES,
    ROWS,
    convolutional,
    filled,
    generator,
    inputs_of_nets,
    jacobian_of,
    matrix_of,
    mlp,
    moved_nets,
    one_hot,
    oracle,
    per_parameter,
    random,
    with_norms,
)


@pytest.fixture(scope="module")
def inputs():
    return inputs_of_nets()


@pytest.fixture(scope="module")
def moved():
    return moved_nets()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [mlp, with_norms, convolutional], ids=["mlp", "norms", "convolutional"])
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
def test_the_exact_kernel_is_that_of_the_jacobian(build, name, dtype, within):
    model, inputs = build(dtype=dtype), random(7, 5, dtype=torch.float64).to(dtype)
    expected = oracle(model.double(), inputs.double(), name)

    found = matrix_of(exact_modes(kernel_operator(jacobian_of(model.to(dtype), inputs), name)))

    assert_close(found, expected, rtol=0, atol=within * expected.norm().item())


def test_a_linear_model_has_the_gram_matrix_of_its_inputs_for_each_output():
    inputs = random(9, 5)
    found = exact_modes(kernel_operator(jacobian_of(filled(nn.Linear(5, COLUMNS, bias=False)), inputs), "full"))

    assert_close(
        matrix_of(found), torch.kron(inputs @ inputs.T, torch.eye(COLUMNS, dtype=torch.float64)), rtol=1e-10, atol=1e-10
    )


def test_a_two_layer_linear_net_has_the_closed_form():
    inputs, model = random(9, 5), filled(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, COLUMNS, bias=False)))
    first, second = (layer.weight.detach() for layer in model)
    hidden = inputs @ first.T
    expected = torch.kron(inputs @ inputs.T, second @ second.T) + torch.kron(
        hidden @ hidden.T, torch.eye(COLUMNS, dtype=torch.float64)
    )

    assert_close(
        matrix_of(exact_modes(kernel_operator(jacobian_of(model, inputs), "full"))), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicated_examples_add_no_rank(dtype):
    inputs = random(4, 5, dtype=torch.float64).to(dtype).repeat(3, 1)
    modes = exact_modes(kernel_operator(jacobian_of(mlp(dtype=dtype), inputs), "full"))

    assert numerical_rank(spectrum_of_modes(modes)) == 4 * COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_behind_a_dead_layer_only_the_last_bias_has_a_kernel(dtype):
    model = filled(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, COLUMNS)), dtype)
    model[0].bias.data.fill_(-100)
    jacobian = jacobian_of(model, random(6, 5, dtype=torch.float64).to(dtype))
    layers = layer_kernels(jacobian, Layout.of(dict(model.named_parameters())), "full", num_probes=4, seed=0)

    assert numerical_rank(spectrum_of_modes(exact_modes(kernel_operator(jacobian, "full")))) == COLUMNS
    assert_close(estimates.layer_shares(layers).value, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64))


def test_the_kernel_and_the_gauss_newton_matrix_share_their_spectrum():
    jacobian = jacobian_of(mlp(width=3), random(12, 5))
    kernel = exact_modes(kernel_operator(jacobian, "full")).values
    other = exact_modes(gauss_newton(jacobian, lambda rows: rows)).values

    assert_close(kernel[: len(other)], other[: len(kernel)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_top_modes_lie_within_their_residuals(name):
    model, inputs = mlp(), random(ROWS, 5)
    found = top_eigenpairs(kernel_operator(jacobian_of(model, inputs), name), 3, num_products=12, generator=generator())
    truth = torch.linalg.eigvalsh(oracle(model, inputs, name))

    assert ((found.values[:, None] - truth).abs().amin(1) <= found.residuals + 1e-9).all()
    assert_close(found.values[0], truth[-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("statistic", [effective_rank_energy, energy_rank, participation_ratio])
def test_ranks_by_quadrature_in_output_space_are_within_their_error(statistic):
    model, inputs = mlp(), random(40, 5)
    operator = kernel_operator(jacobian_of(model, inputs), "full")
    known = top_eigenpairs(operator, 5, num_products=10, generator=generator())
    found = spectral_estimate(operator, random_signs(operator, 6, generator(1)), known=known, steps=12).spectrum
    value, error = estimate(statistic, found)

    assert abs(value - statistic(spectrum_of_modes(exact_modes(operator)))) <= error
    assert error < 0.4 * value


def test_some_of_the_outputs_stand_for_all(moved, inputs):
    model, few = moved[0], inputs[:5]
    kernels = []
    for seed in range(40):
        outputs = sampled_outputs(model(few), 2, generator=generator(seed))
        kernels.append(
            matrix_of(exact_modes(kernel_operator(Jacobian(outputs, list(model.parameters())), "class_summed")))
        )
    off = torch.stack(kernels) - oracle(model, few, "class_summed")

    assert off.mean(0).norm() < 3 * off.flatten(1).norm(dim=1).mean() / len(off) ** 0.5


def test_a_kernel_of_the_labels_alone_is_aligned_with_them():
    targets = one_hot(12)
    modes = exact_modes(
        kernel_operator(jacobian_of(filled(nn.Linear(COLUMNS, COLUMNS, bias=False)), targets), "class_summed")
    )

    assert_close(estimates.alignment(exact_kernel(modes, 12), targets).value, torch.tensor(1.0).double())
    assert_close(estimates.label_energies(modes, targets, 3)[1].value, torch.tensor(1.0).double())


def test_condition_compares_the_ends_of_the_modes(moved, inputs):
    operator = kernel_operator(jacobian_of(moved[0], inputs), "class_summed")
    truth = torch.linalg.eigvalsh(oracle(moved[0], inputs, "class_summed")).flip(0)
    found = top_eigenpairs(operator, 3, num_products=ROWS, generator=generator())

    assert_close(estimates.condition(found), truth[0] / truth[2], rtol=1e-8, atol=0)


def linearised_flow(matrix, left, time, steps=400):
    """What gradient flow of half the squared error leaves after a time, by Runge-Kutta in the parameters of a
    linearised model.
    """
    parameters, step = torch.zeros(matrix.shape[1], dtype=left.dtype), time / steps

    def slope(at):
        return -matrix.T @ (left.flatten() + matrix @ at)

    for _ in range(steps):
        one = slope(parameters)
        two = slope(parameters + step / 2 * one)
        three = slope(parameters + step / 2 * two)
        parameters = parameters + step / 6 * (one + 2 * two + 2 * three + slope(parameters + step * three))
    return left + (matrix @ parameters).view(left.shape)


def test_modes_of_a_linearised_model_decay_exponentially(moved, inputs):
    model, left = moved[0], random(ROWS, COLUMNS, seed=3)
    modes = exact_modes(kernel_operator(jacobian_of(model, inputs), "full"))
    time = (3 / modes.values[0]).item()
    flown = linearised_flow(torch.cat(list(per_parameter(model, inputs).values()), 1), left, time)
    along = [modes.vectors @ rows.flatten() for rows in (left, flown)]

    assert_close(estimates.decayed(modes, left, time), flown, rtol=0, atol=1e-9)
    assert_close(along[1], along[0] * torch.exp(-time / estimates.time_constants(modes, 1.0)), rtol=0, atol=1e-9)


class Wide(nn.Module):
    """A net whose kernel has a limit as it widens."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Parameter(random(width, 5, seed=1)), nn.Parameter(random(COLUMNS, width, seed=2))

    def forward(self, inputs):
        return torch.tanh(inputs @ self.first.T / 5**0.5) @ self.second.T / len(self.first) ** 0.5


def deviation(width, inputs, targets, time=0.3, steps=50):
    """How far gradient flow, by the midpoint rule, ends from where the kernel at the start predicts."""
    model = Wide(width)
    start, left = [p.detach().clone() for p in model.parameters()], model(inputs).detach() - targets
    predicted = estimates.decayed(exact_modes(kernel_operator(jacobian_of(model, inputs), "full")), left, time)
    for _ in range(steps):
        move(model, start, loss_slope(model, inputs, targets), time / steps / 2)
        move(model, start, loss_slope(model, inputs, targets), time / steps)
        start = [p.detach().clone() for p in model.parameters()]
    return ((model(inputs) - targets - predicted).norm() / targets.norm()).item()


def loss_slope(model, inputs, targets):
    return torch.autograd.grad((model(inputs) - targets).square().sum() / 2, list(model.parameters()))


def move(model, start, slope, step):
    for parameter, begin, part in zip(model.parameters(), start, slope, strict=True):
        parameter.data = begin - step * part


def test_wider_nets_deviate_less_from_the_linearised_one(inputs):
    found = [deviation(width, inputs, one_hot(ROWS)) for width in (20, 200, 2000)]

    assert found[0] > 10**0.5 * found[1] > 10 * found[2]


def test_modes_are_learnt_when_their_time_constant_is_over(moved, inputs):
    modes = exact_modes(kernel_operator(jacobian_of(moved[0], inputs), "full"))
    rate = 0.01
    halfway = (estimates.time_constants(modes, rate)[4] + estimates.time_constants(modes, rate)[5]) / 2

    assert estimates.num_learnt(spectrum_of_modes(modes), rate * halfway) == 5
    assert_close(
        estimates.learnt_energy(modes, one_hot(ROWS), rate * halfway),
        estimates.label_energies(modes, one_hot(ROWS), 5)[1].value,
        rtol=1e-12,
        atol=0,
    )


def test_a_mode_without_eigenvalue_is_never_learnt():
    modes = exact_modes(kernel_operator(jacobian_of(mlp(), random(2, 5).repeat(2, 1)), "full"))

    assert estimates.time_constants(modes, 0.1)[-1] == torch.inf
    assert estimates.condition(modes) == torch.inf


def test_a_kernel_that_is_not_finite_stays_so():
    modes = exact_modes(kernel_operator(jacobian_of(mlp(), random(4, 5) * torch.nan), "full"))

    assert modes.values.isnan().all()
    assert estimates.num_learnt(spectrum_of_modes(modes), 1.0).isnan()
    assert estimates.participation_ratio(exact_kernel(modes, 4)).value.isnan()
