"""Oracles: the same quantities of kernels that `torch.func` forms, over many seeds, with and without what is known."""

import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.operators.eigenspaces import top_eigenpairs
from lightning_lowrank.maths.operators.operators import Jacobian, Layout, Operator
from lightning_lowrank.maths.operators.traces import (
    debiased,
    participation_ratio,
    random_signs,
    spectral_estimate,
    trace,
    trace_of_square,
)
from lightning_lowrank.monitors.tangent_kernel import estimates
from lightning_lowrank.monitors.tangent_kernel.kernels import (
    exact_kernel,
    exact_modes,
    kernel_operator,
    known_part,
    layer_kernels,
    projections,
    sketched_kernel,
)
from lightning_lowrank.monitors.tangent_kernel.measurement import KernelEffort
from lightning_lowrank.monitors.tangent_kernel.source import STEPS
from lightning_lowrank.statistics.registry import find
from tests.dispatch import Waits
from tests.oracles.kernels import (
    COLUMNS,
    NAMES,
    ROWS,
    cosine,
    generator,
    inputs_of_nets,
    jacobian_of,
    moved_nets,
    one_hot,
    oracle,
    per_parameter,
)

# The third kernel differs from the first by nothing but its columns.
SKETCHED = ["full", "class_summed"]
TRIALS, NUM = 200, 16


def further(name):
    """Labels, with and without their mean."""
    targets = one_hot(ROWS)
    return torch.stack([targets.flatten(), (targets - targets.mean(0)).flatten()]) if name == "full" else None


def centring(num, columns):
    identity = torch.eye(num, dtype=torch.float64)
    return torch.kron(identity - 1 / num, torch.eye(columns, dtype=torch.float64))


@pytest.fixture(scope="module")
def inputs():
    return inputs_of_nets()


@pytest.fixture(scope="module")
def moved():
    return moved_nets()


@pytest.fixture(scope="module")
def drawn(moved, inputs):
    """Many pairs of projections with the same vectors, of both nets."""
    both = [torch.cat(list(per_parameter(model, inputs).values()), 1) for model in moved]
    return [
        [(vectors_of(matrix.shape[1], seed) @ matrix.T).view(NUM, ROWS, COLUMNS) for matrix in both]
        for seed in range(TRIALS)
    ]


def vectors_of(size, seed):
    """What the Jacobian is multiplied with: the projections of a model whose outputs are its parameters."""
    parameters = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    return projections(Jacobian(parameters.view(1, -1), [parameters]), num=NUM, seed=seed)[:, 0]


@pytest.fixture(scope="module")
def truths(moved, inputs):
    return {name: true_values(*(oracle(model, inputs, name) for model in moved), labels(name)) for name in NAMES}


@pytest.fixture(scope="module")
def known(moved, inputs):
    return {name: known_of(moved, inputs, name) for name in SKETCHED}


def known_of(moved, inputs, name):
    """What is known of both nets in the same directions: modes of the second, and labels."""
    now, before = (kernel_operator(jacobian_of(model, inputs), name) for model in moved)
    modes = top_eigenpairs(before, 4, num_products=6, generator=generator())
    earlier = known_part(before, modes, further=further(name))
    return known_part(now, further=earlier.directions), earlier


def labels(name):
    targets = one_hot(ROWS)
    columns = targets.reshape(-1, 1) if name == "full" else targets
    return columns @ columns.T


def true_values(kernel, other, labels):
    middle = centring(ROWS, len(kernel) // ROWS)
    return {
        "trace": kernel.trace(),
        "squared_norm": kernel.square().sum(),
        "participation_ratio": kernel.trace() ** 2 / kernel.square().sum(),
        "alignment": cosine(kernel, labels),
        "centred_alignment": cosine(middle @ kernel @ middle, middle @ labels @ middle),
        "velocity": 1 - cosine(kernel, other),
    }


def estimated(kernel, other):
    targets = one_hot(ROWS)
    return {
        "trace": estimates.trace(kernel),
        "squared_norm": estimates.squared_norm(kernel),
        "participation_ratio": estimates.participation_ratio(kernel),
        "alignment": estimates.alignment(kernel, targets),
        "centred_alignment": estimates.alignment(kernel, targets, centred=True),
        "velocity": estimates.velocity(kernel, other),
    }


def trials(drawn, name, known=(None, None)):
    """Values and errors of every quantity in every trial."""
    found = [
        estimated(*(sketched_kernel(one, name, known=part) for one, part in zip(pair, known, strict=True)))
        for pair in drawn
    ]
    return {
        key: (torch.stack([f[key].value for f in found]), torch.stack([f[key].error for f in found]))
        for key in found[0]
    }


def naive(drawn, name):
    """The same quantities of the kernel that the projections make when they are taken for the Jacobian."""
    kernels = []
    for pair in drawn:
        rests = [sketched_kernel(one, name).rest for one in pair]
        kernels.append([torch.einsum("knm,kpm->np", rest, rest) / NUM for rest in rests])
    found = [true_values(*pair, labels(name)) for pair in kernels]
    return {key: torch.stack([f[key] for f in found]) for key in found[0]}


def off_by(values, truth):
    """Standard errors of the mean between the mean over trials and the truth."""
    return ((values.mean() - truth) / (values.std() / len(values) ** 0.5)).abs()


@pytest.fixture(scope="module")
def all_trials(drawn, known):
    return {name: (trials(drawn, name), trials(drawn, name, known[name])) for name in SKETCHED}


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("quantity", ["trace", "squared_norm"])
@pytest.mark.parametrize("name", SKETCHED)
def test_sums_over_the_kernel_are_without_bias(name, quantity, deflated, all_trials, truths):
    values, _ = all_trials[name][deflated][quantity]

    assert off_by(values, truths[name][quantity]) < 3.5


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("quantity", ["participation_ratio", "alignment", "centred_alignment", "velocity"])
@pytest.mark.parametrize("name", SKETCHED)
def test_ratios_are_biased_by_less_than_half_their_error(name, quantity, deflated, all_trials, truths):
    values, errors = all_trials[name][deflated][quantity]

    assert (values.mean() - truths[name][quantity]).abs() < errors.mean() / 2


@pytest.mark.parametrize("quantity", ["squared_norm", "participation_ratio", "alignment", "velocity"])
def test_a_kernel_made_of_the_projections_is_biased(quantity, drawn, all_trials, truths):
    name = "full"
    values, (_, errors) = naive(drawn, name)[quantity], all_trials[name][0][quantity]

    assert off_by(values, truths[name][quantity]) > 3.5
    assert (values.mean() - truths[name][quantity]).abs() > errors.mean() / 2


@pytest.mark.parametrize("quantity", ["participation_ratio", "alignment", "centred_alignment", "velocity"])
@pytest.mark.parametrize("name", SKETCHED)
def test_truth_is_within_two_errors_in_nine_of_ten_trials(name, quantity, all_trials, truths):
    values, errors = all_trials[name][True][quantity]

    assert ((values - truths[name][quantity]).abs() <= 2 * errors).double().mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", SKETCHED)
def test_truth_is_within_two_errors_of_a_monitors_quadrature_in_nine_of_ten_trials(name, moved, inputs, truths):
    matrix, effort = oracle(moved[0], inputs, name), KernelEffort(3, NUM, steps=STEPS[name])
    operator = Operator(len(matrix), lambda vector: matrix @ vector, matrix.device, matrix.dtype)
    found = [quadrature_of(operator, effort, seed) for seed in range(TRIALS)]

    for quantity in found[0]:
        within = torch.stack(
            [(f[quantity].value - truths[name][quantity]).abs() <= 2 * f[quantity].error for f in found]
        )
        # Less what chance does to a share of 200.
        assert within.double().mean() >= 0.9 - 0.03, quantity


@pytest.mark.parametrize(("num", "widest"), [(16, 256), (16, 8), (8, 8)])
@pytest.mark.parametrize("name", ["effective_rank_energy", "energy_rank_0.1"])
def test_ranks_of_a_class_summed_kernel_are_within_their_errors(name, num, widest, drawn, moved, inputs, monkeypatch):
    """With matrices of the rows, of sums of the columns, and of sums between the columns of all projections."""
    monkeypatch.setattr(estimates, "WIDEST", widest)
    matrix = oracle(moved[0], inputs, "class_summed")
    shares = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0) / matrix.trace()
    entropy, count = torch.special.entr(shares).sum(), (shares.cumsum(0) < 0.9).sum() + 1.0
    truth = entropy.exp() if name.startswith("effective") else count
    operator = Operator(ROWS, lambda vector: matrix @ vector, matrix.device, matrix.dtype)
    modes = top_eigenpairs(operator, 3, num_products=7, generator=generator()).space
    found = [
        estimates.rank(find(name), sketched_kernel(one[:num], "class_summed", known=known_part(operator, modes)), modes)
        for one, _ in drawn[:40]
    ]
    off = torch.stack([(each.value - truth).abs() / each.error for each in found])

    assert (off <= 1).double().mean() >= 0.6 and (off <= 2).double().mean() >= 0.9
    assert torch.stack([each.error for each in found]).mean() < truth


def test_a_rank_of_what_is_not_finite_is_nan(drawn):
    kernel = sketched_kernel(drawn[0][0] * torch.nan, "class_summed")
    nothing = exact_modes(Operator(1, lambda vector: vector, torch.device("cpu"), torch.float64))

    assert estimates.rank(find("effective_rank_energy"), kernel, nothing).value.isnan()


def quadrature_of(operator, effort, seed):
    draw = generator(seed)
    known = top_eigenpairs(operator, effort.top_k, num_products=effort.top_k + effort.further, generator=draw)
    whole = spectral_estimate(operator, random_signs(operator, effort.probes, draw), known=known, steps=effort.steps)
    sums = {"trace": debiased(trace, whole.spectrum), "squared_norm": trace_of_square(whole)}
    sums |= {"participation_ratio": participation_ratio(whole)}
    return sums


@pytest.mark.parametrize(
    "quantity", ["trace", "squared_norm", "participation_ratio", "alignment", "centred_alignment", "velocity"]
)
@pytest.mark.parametrize("name", SKETCHED)
def test_what_is_known_makes_estimates_better(name, quantity, all_trials):
    (plain, _), (deflated, _) = (found[quantity] for found in all_trials[name])

    assert deflated.std() < 0.7 * plain.std()


@pytest.mark.parametrize("name", NAMES)
def test_quantities_of_an_exact_kernel_have_no_error(name, moved, inputs, truths):
    kernels = [exact_kernel(exact_modes(kernel_operator(jacobian_of(model, inputs), name)), ROWS) for model in moved]
    found = estimated(*kernels)

    assert_close({key: e.value for key, e in found.items()}, truths[name], rtol=1e-9, atol=1e-9)
    assert all(e.error == 0 for e in found.values())


def test_change_is_that_of_the_matrix(moved, inputs, drawn, known):
    one, other = (oracle(model, inputs) for model in moved)
    truth = (one - other).square().sum() / other.square().sum()
    exact = [exact_kernel(exact_modes(kernel_operator(jacobian_of(model, inputs), "full")), ROWS) for model in moved]
    pairs = [
        [sketched_kernel(one, "full", known=part) for one, part in zip(pair, known["full"], strict=True)]
        for pair in drawn[:50]
    ]
    found = [estimates.relative_change(*pair) for pair in pairs]

    assert_close(estimates.relative_change(*exact).value, truth, rtol=1e-9, atol=0)
    assert (torch.stack([f.value for f in found]).mean() - truth).abs() < torch.stack(
        [f.error for f in found]
    ).mean() / 2


def test_a_kernel_that_stays_has_neither_velocity_nor_change(drawn):
    kernel = sketched_kernel(drawn[0][0], "class_summed")

    assert_close(
        torch.stack([estimates.velocity(kernel, kernel).value, estimates.relative_change(kernel, kernel).value]),
        torch.zeros(2).double(),
    )


def test_a_kernel_that_only_grows_has_change_without_velocity(drawn):
    before = sketched_kernel(drawn[0][0], "full")
    now = sketched_kernel(2 * drawn[0][0], "full")

    assert_close(estimates.velocity(now, before).value, torch.tensor(0.0).double(), rtol=0, atol=1e-12)
    assert_close(estimates.relative_change(now, before).value, torch.tensor(9.0).double())


def test_projections_are_products_of_the_jacobian_with_signs(moved, inputs, drawn):
    found = [projections(jacobian_of(model, inputs), num=NUM, seed=3) for model in moved]

    assert_close(found, drawn[3], rtol=1e-10, atol=1e-10)
    assert (vectors_of(1000, 3).abs() == 1).all()
    assert vectors_of(1000, 3).mean().abs() < 4 / 16000**0.5


def test_projections_are_those_of_their_seed(moved, inputs):
    jacobian = jacobian_of(moved[0], inputs)
    one, same, other = (projections(jacobian, num=5, seed=seed) for seed in (0, 0, 1))

    assert torch.equal(one, same)
    assert not (one[:, None] == other).all((2, 3)).any()


def test_nothing_waits_for_the_device(moved, inputs):
    jacobian, targets = jacobian_of(moved[0], inputs), one_hot(ROWS)
    with Waits("cpu") as waits:
        operator = kernel_operator(jacobian, "class_summed")
        modes = top_eigenpairs(operator, 2, num_products=4, generator=generator())
        part = known_part(operator, modes, further=targets.T)
        estimated(*2 * [sketched_kernel(projections(jacobian, num=4, seed=0), "class_summed", known=part)])
        estimates.layer_shares(layers_of(moved, inputs, 0)[0])
        estimates.learnt_energy(modes, targets, 1.0)

    assert not waits.seen


def dense_operator(size, dtype):
    matrix = torch.randn(size, size, generator=generator(), dtype=dtype)
    matrix = matrix @ matrix.mT
    return Operator(size, lambda vector: matrix @ vector, matrix.device, dtype), matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num", [2, 40])
def test_what_is_known_is_orthonormal_where_further_directions_add_nothing(dtype, num):
    """The same one often, modes again, and zero; more than there is room for."""
    operator, matrix = dense_operator(40, dtype)
    modes = top_eigenpairs(operator, 3, num_products=8, generator=generator())
    same = torch.ones(num, 40, dtype=dtype)
    part = known_part(operator, modes, further=torch.cat([same, modes.vectors, 0 * same]))
    eps = torch.finfo(dtype).eps

    assert_close(
        part.directions @ part.directions.mT, torch.eye(len(part.directions), dtype=dtype), rtol=0, atol=40 * eps
    )
    assert_close(part.images, part.directions @ matrix, rtol=0, atol=40 * eps * matrix.norm().item())


def test_directions_beside_all_modes_add_nothing():
    operator, _ = dense_operator(6, torch.float64)
    part = known_part(operator, exact_modes(operator), further=torch.ones(2, 6, dtype=torch.float64))

    assert part.directions.shape == part.images.shape == (6, 6)


def test_too_few_projections_for_an_error_are_refused(moved, inputs):
    with pytest.raises(ValueError, match="at least 4 projections, not 3"):
        projections(jacobian_of(moved[0], inputs), num=3, seed=0)


@pytest.fixture(scope="module")
def layers(moved, inputs):
    return [layers_of(moved, inputs, seed) for seed in range(60)]


def layers_of(moved, inputs, seed, name="full", held=3):
    return [
        layer_kernels(
            jacobian_of(model, inputs),
            Layout.of(dict(model.named_parameters())),
            name,
            num_probes=12,
            seed=seed,
            held=held,
        )
        for model in moved
    ]


@pytest.fixture(scope="module")
def layer_truth(moved, inputs):
    one, other = ([part @ part.T for part in per_parameter(model, inputs).values()] for model in moved)
    traces = torch.stack([kernel.trace() for kernel in one])
    return {
        "layer_traces": traces,
        "layer_shares": traces / traces.sum(),
        "layer_velocities": torch.stack([1 - cosine(a, b) for a, b in zip(one, other, strict=True)]),
    }


@pytest.mark.parametrize("quantity", ["layer_traces", "layer_shares", "layer_velocities"])
def test_layers_are_biased_by_less_than_half_their_error(quantity, layers, layer_truth):
    found = [layer_estimate(quantity, *pair) for pair in layers]
    values, errors = (torch.stack([getattr(f, part) for f in found]) for part in ("value", "error"))
    bias = (values.mean(0) - layer_truth[quantity]).abs()

    assert (bias <= errors.mean(0) / 2 + 1e-12).all()
    assert (((values - layer_truth[quantity]).abs() <= 2 * errors + 1e-9).double().mean(0) >= 0.85).all()


def layer_estimate(quantity, now, before):
    return (
        estimates.layer_velocities(now, before) if quantity == "layer_velocities" else getattr(estimates, quantity)(now)
    )


def test_layers_of_the_sum_of_logits_are_its_own(moved, inputs):
    found = [estimates.layer_traces(layers_of(moved, inputs, seed, "sum_of_logits")[0]) for seed in range(20)]
    parts = [part.view(ROWS, COLUMNS, -1).sum(1) for part in per_parameter(moved[0], inputs).values()]
    truth = torch.stack([part.square().sum() / COLUMNS for part in parts])
    mean, error = torch.stack([f.value for f in found]).mean(0), torch.stack([f.error for f in found]).mean(0) / 20**0.5

    assert ((mean - truth).abs() <= 4 * error + 1e-9).all()


def test_more_gradients_held_tell_more(moved, inputs, layer_truth):
    spreads = []
    for held in (2, 12):
        found = [estimates.layer_velocities(*layers_of(moved, inputs, seed, held=held)).value[2] for seed in range(16)]
        spreads.append((torch.stack(found) - layer_truth["layer_velocities"][2]).square().mean())

    assert spreads[1] < spreads[0]


def test_a_single_gradient_held_is_refused(moved, inputs):
    with pytest.raises(ValueError, match="2 stored gradients, not 8 and 1"):
        layer_kernels(
            jacobian_of(moved[0], inputs),
            Layout.of(dict(moved[0].named_parameters())),
            "full",
            num_probes=8,
            seed=0,
            held=1,
        )


def test_what_a_kernel_without_entries_points_to_is_no_number(drawn):
    nothing, kernel = sketched_kernel(torch.zeros_like(drawn[0][0]), "full"), sketched_kernel(drawn[0][0], "full")
    found = [
        estimates.velocity(kernel, nothing),
        estimates.alignment(nothing, one_hot(ROWS)),
        estimates.velocity(nothing, nothing),
    ]

    assert all(estimate.value.isnan() for estimate in found)
