"""Oracles: kernels of Jacobians that `torch.func` forms, and dense matrices of the loss."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.tap import LossTap
from lightning_lowrank.monitors.curvature.measurement import Found
from lightning_lowrank.monitors.tangent_kernel import by_layer
from lightning_lowrank.monitors.tangent_kernel.kernels import KernelName
from lightning_lowrank.monitors.tangent_kernel.measurement import EXACT, KernelEffort, TangentKernels, quantities
from lightning_lowrank.monitors.tangent_kernel.outputs import KernelOutputs, OwnOutputs, kernel_outputs
from tests.oracles.kernels import (
    COLUMNS,
    NAMES,
    cosine,
    filled,
    generator,
    mlp,
    moved_nets,
    one_hot,
    oracle,
    per_parameter,
    random,
)

FEW, MANY = 12, 60


def outputs_of(
    model: nn.Module,
    num: int,
    kernel: KernelName = "full",
    *,
    num_columns: int = 64,
    ignored: int = 0,
    dtype: torch.dtype = torch.float64,
) -> KernelOutputs:
    """As a training step with cross-entropy shows them; the last rows do not count."""
    targets = torch.arange(num) % COLUMNS
    targets[num - ignored :] = -100
    tap = LossTap()
    with tap:
        loss = F.cross_entropy(model(random(num, 5, seed=7).to(dtype)), targets)
    own = OwnOutputs.of(tap.reproduce(loss), kernel, num_columns=num_columns, seed=0)
    found = kernel_outputs(own, dict(model.named_parameters()), Team())
    assert found is not None
    return found


def measured(state: TangentKernels, model: nn.Module, num: int, steps: int = 10, **options: Any) -> Found:
    return state.measure(outputs_of(model, num, state.kernel, **options), 0.1, steps, generator(steps))


def fresh(kernel: KernelName = "full", top_k: int = 3, num_projections: int = 32) -> TangentKernels:
    return TangentKernels(kernel, KernelEffort(top_k, num_projections), 0)


def true_values(matrix: Tensor, num: int, labels: Tensor) -> dict[str, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    values, top = values.flip(0), vectors.flip(1)[:, :3]
    shares = values.clamp(min=0) / values.sum()
    columns = len(matrix) // num
    middle = torch.kron(torch.eye(num, dtype=torch.float64) - 1 / num, torch.eye(columns, dtype=torch.float64))
    kind = labels.reshape(-1, 1) if columns > 1 else labels
    return {
        "ntk_trace": values.sum(),
        "ntk_squared_norm": values.square().sum(),
        "ntk_lambda_max": values[0],
        "ntk_lambda_3": values[2],
        "ntk_condition": values[0] / values[2],
        "ntk_participation_ratio": values.sum() ** 2 / values.square().sum(),
        "ntk_effective_rank_energy": torch.exp(torch.special.entr(shares).sum()),
        "ntk_label_alignment": cosine(matrix, kind @ kind.T),
        "ntk_centred_label_alignment": cosine(middle @ matrix @ middle, middle @ kind @ kind.T @ middle),
        "ntk_label_energy_in_top": (top.T @ kind).square().sum() / labels.square().sum(),
    }


@pytest.mark.parametrize("kernel", NAMES)
def test_few_outputs_give_the_exact_kernel(kernel: KernelName) -> None:
    state = fresh(kernel)
    found = measured(state, mlp(), FEW)
    truth = true_values(oracle(mlp(), random(FEW, 5, seed=7), kernel), FEW, one_hot(FEW))

    assert state.exact
    assert_close({name: found.values[name] for name in truth}, truth, rtol=1e-8, atol=1e-10)
    assert all(error == 0 for name, error in found.errors.items() if name in truth)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of rows is so small that a class-summed kernel is found by layer."""
    monkeypatch.setattr(by_layer, "ROWS", 0)


@pytest.mark.usefixtures("estimated")
@pytest.mark.parametrize("kernel", ["full", "class_summed"])
def test_many_outputs_give_estimates_within_a_few_of_their_errors(kernel: KernelName) -> None:
    state = fresh(kernel)
    found = measured(state, mlp(), MANY)
    truth = true_values(oracle(mlp(), random(MANY, 5, seed=7), kernel), MANY, one_hot(MANY))

    assert not state.exact
    off = {
        name: ((found.values[name] - truth[name]).abs() / (found.errors[name] + 1e-6 * truth[name])).item()
        for name in found.errors
        if name in truth
    }
    assert max(off.values()) < 4 and sorted(off.values())[len(off) // 2] < 2, off
    assert all(
        found.errors[f"ntk_{name}"] < 0.3 * truth[f"ntk_{name}"]
        for name in ("trace", "participation_ratio", "label_alignment")
    )


@pytest.mark.parametrize("num", [FEW, MANY])
def test_a_kernel_that_stays_has_no_velocity(num: int) -> None:
    state = fresh("class_summed")
    measured(state, mlp(), num)
    found = measured(state, mlp(), num, steps=11)

    still = {name: found.values[name] for name in ("ntk_velocity", "ntk_distance_to_start")}
    assert_close(still, dict.fromkeys(still, torch.zeros(()).double()), rtol=0, atol=1e-9)
    assert_close(found.layers["ntk_layer_velocity"], torch.zeros(4).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", ["full", "class_summed"])
@pytest.mark.parametrize("num", [FEW, MANY])
def test_velocity_is_what_the_cosine_of_both_kernels_lacks(num: int, kernel: KernelName) -> None:
    state, models = fresh(kernel), moved_nets()
    measured(state, models[0], num)
    found = measured(state, models[1], num, steps=11)
    truth = 1 - cosine(*(oracle(model, random(num, 5, seed=7), kernel) for model in models))

    assert (found.values["ntk_velocity"] - truth).abs() <= 4 * found.errors["ntk_velocity"] + 1e-10
    assert found.values["ntk_distance_to_start"] == found.values["ntk_velocity"]


@pytest.mark.parametrize("share", [1e-6, 1e-4, 1e-3])
def test_velocities_in_half_precision_have_its_rounding_in_their_error(share: float) -> None:
    """Of a network with kinks, on whose other side units fall when the weights move by less than rounding."""
    net = filled(nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, COLUMNS)))
    models = net.float(), deepcopy(net).float()
    with torch.no_grad():
        for i, parameter in enumerate(models[1].parameters()):
            parameter += share * parameter.std() * random(*parameter.shape, seed=i).float()
    state = fresh("class_summed")
    outputs = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(outputs_of(model, MANY, "class_summed", dtype=torch.float32))
    state.measure(outputs[0], 0.1, 10, generator())
    found = state.measure(outputs[1], 0.1, 11, generator())
    truths = [per_parameter(model.double(), random(MANY, 5, seed=7)).values() for model in models]
    truth = torch.stack([1 - cosine(a @ a.T, b @ b.T) for a, b in zip(*truths, strict=True)])

    assert ((found.layers["ntk_layer_velocity"] - truth).abs() <= 2 * found.layer_errors["ntk_layer_velocity"]).all()


def test_the_kernel_of_a_linear_model_stays() -> None:
    linear, state = filled(nn.Linear(5, COLUMNS)), fresh()
    first = measured(state, linear, FEW).values["ntk_trace"]
    with torch.no_grad():
        linear.weight.add_(1)

    found = measured(state, linear, FEW, steps=11)

    assert_close(found.values["ntk_trace"], first)
    assert_close(found.values["ntk_velocity"], torch.zeros(()).double(), rtol=0, atol=1e-12)


def test_shares_of_the_parameters_are_those_of_their_traces() -> None:
    found = measured(fresh("full"), mlp(), MANY)
    model = mlp()
    traces = torch.stack(
        [sum(row.square().sum() for row in rows_of(model, parameter)) for parameter in model.parameters()]
    )

    assert_close(found.layers["ntk_layer_share"].sum(), torch.ones(()).double())
    assert (
        (found.layers["ntk_layer_share"] - traces / traces.sum()).abs()
        <= 4 * found.layer_errors["ntk_layer_share"] + 1e-9
    ).all()


def rows_of(model: nn.Module, parameter: Tensor) -> list[Tensor]:
    entries = model(random(MANY, 5, seed=7)).flatten()
    return [torch.autograd.grad(entry, parameter, retain_graph=True)[0] for entry in entries]


def gauss_newton_of(model: nn.Module, num: int) -> Tensor:
    """Eigenvalues, largest first, of the mean over rows of J^T (diag p - p p^T) J."""
    parameters = list(model.parameters())
    outputs = model(random(num, 5, seed=7))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, parameters, retain_graph=True)])
        for z in outputs.flatten()
    ]
    jacobian, shares = torch.stack(rows).view(num, COLUMNS, -1), outputs.detach().softmax(-1)
    middle = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
    return torch.linalg.eigvalsh(torch.einsum("rcp,rcd,rdq->pq", jacobian, middle, jacobian) / num).flip(0)


@pytest.mark.parametrize("width", [2, 12], ids=["in the space of parameters", "of outputs"])
def test_the_matrix_of_the_loss_is_read_beside_the_kernel(width: int) -> None:
    found = measured(fresh(), mlp(width), 40)
    truth = gauss_newton_of(mlp(width), 40)

    assert_close(found.values["ntk_gauss_newton_lambda_max"], truth[0], rtol=1e-2, atol=0)
    off = (found.values["ntk_gauss_newton_trace"] - truth.sum()).abs()
    assert off <= 4 * found.errors["ntk_gauss_newton_trace"] + 1e-9


def test_modes_are_learnt_when_their_time_constant_is_over() -> None:
    found = measured(fresh(), mlp(), FEW, steps=500)
    constants = 1 / (0.1 * gauss_newton_of(mlp(), FEW).clamp(min=1e-12))

    assert_close(found.values["ntk_time_constant"], constants[0], rtol=1e-8, atol=0)
    assert_close(found.values["ntk_time_constant_3"], constants[2], rtol=1e-8, atol=0)
    assert found.values["ntk_modes_learnt"] == (constants <= 500).sum()


def test_rows_that_do_not_count_are_left_out() -> None:
    found = measured(fresh(), mlp(), FEW, ignored=4)
    inputs = random(FEW, 5, seed=7)[: FEW - 4]

    assert_close(found.values["ntk_trace"], oracle(mlp(), inputs).trace())
    assert_close(found.values["ntk_gauss_newton_trace"], found.values["ntk_gauss_newton_trace"].abs())


def test_drawn_outputs_are_the_same_at_every_measurement() -> None:
    state = fresh("class_summed")
    measured(state, mlp(), FEW, num_columns=2)
    found = measured(state, mlp(), FEW, num_columns=2, steps=11)

    assert_close(found.values["ntk_velocity"], torch.zeros(()).double(), rtol=0, atol=1e-12)
    assert 0 < found.values["ntk_label_alignment"] <= 1


def test_the_full_kernel_of_drawn_outputs_is_not_held_against_labels() -> None:
    found = measured(fresh(), mlp(), FEW, num_columns=2)

    assert "ntk_label_alignment" not in found.values


@pytest.mark.parametrize("kernel", ["class_summed", "sum_of_logits"])
def test_labels_of_a_vocabulary_are_those_that_occur(kernel: KernelName) -> None:
    model, targets, tap = filled(nn.Linear(5, 1500)), torch.arange(FEW) % 5 * 300, LossTap()
    with tap:
        loss = F.cross_entropy(model(random(FEW, 5, seed=7)), targets)
    outputs = kernel_outputs(
        OwnOutputs.of(tap.reproduce(loss), kernel, num_columns=4, seed=0), dict(model.named_parameters()), Team()
    )
    assert outputs is not None
    found = fresh(kernel).measure(outputs, 0.1, 10, generator())
    inputs, same = random(FEW, 5, seed=7), (targets[:, None] == targets).double()

    # Every output of a linear model has the same kernel.
    assert_close(found.values["ntk_label_alignment"], cosine(inputs @ inputs.T + 1, same), rtol=1e-8, atol=0)


def test_other_rows_begin_a_new_reference() -> None:
    state = fresh("class_summed")
    measured(state, mlp(), MANY)
    found = measured(state, mlp(), MANY, ignored=4, steps=11)

    assert "ntk_velocity" not in found.values


@pytest.mark.parametrize("num", [FEW, MANY])
def test_everything_found_is_announced(num: int) -> None:
    state = fresh()
    measured(state, mlp(), num)
    found = measured(state, mlp(), num, steps=11)

    known = {quantity.name: quantity for quantity in quantities(3)}
    assert {**found.values, **found.layers}.keys() == known.keys()
    assert {**found.errors, **found.layer_errors}.keys() == {
        name for name, quantity in known.items() if quantity.estimated
    }


def test_many_examples_that_do_not_meet_have_an_exact_class_summed_kernel() -> None:
    state = fresh("class_summed")
    found = measured(state, mlp(), MANY)
    truth = true_values(oracle(mlp(), random(MANY, 5, seed=7), "class_summed"), MANY, one_hot(MANY))

    assert state.exact
    assert_close({name: found.values[name] for name in truth}, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("estimated")
def test_the_limit_of_what_is_exact_counts_pairs_of_products() -> None:
    states = {kernel: fresh(kernel) for kernel in NAMES}
    for state in states.values():
        measured(state, mlp(), EXACT // COLUMNS + 1)

    assert [kernel for kernel, state in states.items() if state.exact] == ["sum_of_logits"]
