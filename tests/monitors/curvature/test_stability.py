"""Oracle: torch's own optimizers on parabolas, whose curvature is bisected for where they begin to diverge."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.testing import assert_close

from lightning_lowrank.maths.operators.operators import Operator, preconditioned
from lightning_lowrank.monitors.curvature.stability import threshold, why_unknown
from tests.oracles.spectra import gaussian

# Long after the start, and so slow to change, that the preconditioner is what the state says.
LATE, FROZEN = 1e15, (0.9, 1 - 1e-12)


def grows(optimizer, parameter, slope, steps):
    """Whether a deviation becomes large, or is larger after all steps than after half of them, when what dies out has
    died out.
    """
    start = half = parameter.detach().abs().max().item()
    for step in range(steps):
        parameter.grad = slope(parameter.detach())
        optimizer.step()
        now = parameter.detach().abs().max().item()
        if not now < 100 * start:
            return True
        half = now if step == steps // 2 else half
    return now > half


def bisected(make, low=1.0, high=1e5, *, sign=1.0, steps=600):
    """The curvature from which on the optimizer made by `make` diverges."""
    for _ in range(20):
        curvature = (low * high) ** 0.5
        parameter = torch.full((1,), 1e-8, dtype=torch.float64, requires_grad=True)
        unstable = grows(make(parameter), parameter, lambda x, c=curvature: sign * c * x, steps)
        low, high = (low, curvature) if unstable else (curvature, high)
    return low


def late(optimizer, parameter, *, moment=4.0, largest=None):
    """Give Adam the state of a long run."""
    state = {
        "step": torch.tensor(LATE),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.full_like(parameter, moment),
    }
    if largest is not None:
        state["max_exp_avg_sq"] = torch.full_like(parameter, largest)
    optimizer.state[parameter] = {name: value.detach() for name, value in state.items()}
    return optimizer


GRADIENT_DESCENT = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.8, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decayed": {"weight_decay": 3.0},
    "all": {"momentum": 0.7, "nesterov": True, "weight_decay": 2.0},
    "dampening without momentum": {"dampening": 0.5},
}
ADAPTIVE = {
    "adam": lambda p: late(Adam([p], 0.01, betas=FROZEN), p),
    "other momentum": lambda p: late(Adam([p], 0.01, betas=(0.5, FROZEN[1])), p),
    "large epsilon": lambda p: late(Adam([p], 0.01, betas=FROZEN, eps=1.0), p),
    "amsgrad": lambda p: late(Adam([p], 0.01, betas=FROZEN, amsgrad=True), p, largest=9.0),
    "added decay": lambda p: late(Adam([p], 0.01, betas=FROZEN, weight_decay=300.0), p),
    "decoupled decay": lambda p: late(AdamW([p], 0.01, betas=FROZEN, weight_decay=20.0), p),
}


def of_one(make):
    parameter = torch.full((1,), 1e-8, dtype=torch.float64, requires_grad=True)
    return threshold(make(parameter), [parameter])


@pytest.mark.parametrize("name", GRADIENT_DESCENT)
def test_gradient_descent_diverges_from_where_it_says(name):
    def make(parameter):
        return SGD([parameter], 0.05, **GRADIENT_DESCENT[name])

    edge = bisected(make)

    assert_close(1 / of_one(make).diagonal.item(), edge, rtol=1e-4, atol=0)
    assert_close(of_one(make).per_group[0].item(), edge, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adam_diverges_from_where_it_says(name):
    assert_close(1 / of_one(ADAPTIVE[name]).diagonal.item(), bisected(ADAPTIVE[name]), rtol=1e-4, atol=0)


def test_adam_has_the_published_constant():
    """38 over the learning rate, of the preconditioned Hessian."""
    assert_close(of_one(ADAPTIVE["adam"]).per_group[0].item(), 38 / 0.01)


def test_maximizing_turns_the_sign():
    def make(parameter):
        return SGD([parameter], 0.05, maximize=True)

    assert of_one(make).sign == -1
    assert_close(1 / of_one(make).diagonal.item(), bisected(make, sign=-1.0), rtol=1e-4, atol=0)


def test_the_present_preconditioner_counts_early_in_training():
    """Bias corrections of the third step, by hand."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([parameter], 0.01, eps=0.1)
    for gradient in (2.0, 1.0, 3.0):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    moment = 0.001 * (0.999**2 * 4 + 0.999 * 1 + 9) / (1 - 0.999**3)
    expected = 0.01 * 0.1 / (2 * 1.9) / ((1 - 0.9**3) * (moment**0.5 + 0.1))

    assert_close(threshold(optimizer, [parameter]).diagonal.item(), expected, rtol=1e-6, atol=0)


def largest(matrix, found):
    scaled = preconditioned(Operator(len(matrix), lambda v: matrix @ v, matrix.device, matrix.dtype), found.diagonal)
    return (
        torch.linalg.eigvals(torch.stack([scaled.multiply(row) for row in torch.eye(len(matrix), dtype=matrix.dtype)]))
        .real.max()
        .item()
    )


def test_groups_with_rates_and_decays_of_their_own_have_one_edge():
    """On a coupled quadratic the optimizer diverges where the largest eigenvalue of the scaled Hessian passes 1."""
    matrix = gaussian(4, 6)
    matrix = matrix.T @ matrix + 0.1 * torch.eye(6, dtype=torch.float64)

    def make(whole):
        parts = [whole[:4], whole[4:]]
        return SGD(
            [{"params": parts[0], "lr": 0.1, "weight_decay": 1.0}, {"params": parts[1], "lr": 0.02}], momentum=0.9
        ), parts

    def unstable(factor):
        whole = 1e-8 * gaussian(6, seed=1)
        optimizer, parts = make(whole)
        for _ in range(3000):
            for part, slope in zip(parts, (factor * matrix @ whole).split([4, 2]), strict=True):
                part.grad = slope
            optimizer.step()
        return not whole.abs().max() < 1e-8

    optimizer, parts = make(torch.zeros(6, dtype=torch.float64))
    edge = 1 / largest(matrix, threshold(optimizer, parts))

    assert (unstable(0.99 * edge), unstable(1.01 * edge)) == (False, True)


def test_parameters_that_are_not_optimized_do_not_count():
    one, other = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)

    assert_close(threshold(SGD([one], 0.5), [other, one]).diagonal, torch.tensor([0.0, 0, 0, 0.25, 0.25]))


def test_a_rate_of_zero_is_stable_at_any_curvature():
    parameter = torch.zeros(2, requires_grad=True)
    found = threshold(SGD([parameter], 0.0), [parameter])

    assert_close((found.diagonal, found.per_group[0].item()), (torch.zeros(2), float("inf")))


def test_a_decay_that_alone_diverges_leaves_no_room():
    parameter = torch.zeros(2, requires_grad=True)

    assert threshold(SGD([parameter], 1.0, weight_decay=3.0), [parameter]).diagonal.isinf().all()


def test_rates_may_be_tensors():
    parameter = torch.zeros(2, requires_grad=True)

    assert_close(threshold(SGD([parameter], torch.tensor(0.5)), [parameter]).diagonal, torch.full((2,), 0.25))


class Own(SGD):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: RMSprop([p]), "no edge of stability is known for RMSprop, only for SGD, Adam, AdamW"),
        (lambda p: Own([p]), "no edge of stability is known for Own"),
        (lambda p: Adam([p]), "Adam has no preconditioner before its first step"),
        (
            lambda p: SGD([{"params": [p]}, {"params": [torch.zeros(1)], "momentum": 0.5}], 0.1),
            "if 'momentum' differs between",
        ),
    ],
)
def test_where_no_edge_is_known_it_says_why(make, why):
    parameter = torch.zeros(1, requires_grad=True)

    assert threshold(make(parameter), [parameter]) is None
    assert why in why_unknown(make(parameter))


def test_a_parameter_that_is_one_number_does_not_widen_the_others() -> None:
    params = [torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)]
    optimizer = torch.optim.AdamW(params)
    sum(p.square().sum() for p in params).backward()
    optimizer.step()

    assert threshold(optimizer, params).diagonal.dtype == torch.float32
