"""Oracles: closed forms of linear models, and `torch.autograd.functional`, which builds whole matrices."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian as whole_hessian
from torch.autograd.functional import jacobian as whole_jacobian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from lightning_lowrank.maths.operators.operators import (
    Jacobian,
    Layout,
    Operator,
    dense,
    fisher,
    gauss_newton,
    hessian,
    hessian_and_jacobian,
    output_gauss_newton,
    preconditioned,
)
from tests.operators import cross_entropy_factors
from tests.oracles.spectra import gaussian, generator


class Transformer(nn.Module):
    """One block, with all that is easily differentiated wrongly: attention, LayerNorm, GELU, an embedding that is the
    readout too.
    """

    def __init__(self, width=6, vocabulary=5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.attention(self.norms[0](x)).chunk(3, -1)
        with sdpa_kernel(SDPBackend.MATH):
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return x @ self.embedding.weight.T


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def randomised(model):
    """In float64, every parameter drawn anew: fresh norm layers would be special."""
    model = model.double()
    draws = generator(3)
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=draws, dtype=p.dtype) + (p.ndim == 1)
    return model


def as_function(model, loss_of):
    """The loss of one vector of all parameters."""
    layout = Layout.of(dict(model.named_parameters()))
    return lambda flat: loss_of(
        lambda *inputs: functional_call(model, dict(zip(layout.names, layout.split(flat), strict=True)), inputs)
    )


def cross_entropy_product(outputs):
    """With the Hessian of the mean cross-entropy in the logits, in closed form."""
    p = outputs.detach().softmax(-1)
    return lambda u: (p * u - p * (p * u).sum(-1, keepdim=True)) / len(p)


def classifier(num=7, wide=4, classes=3):
    """Inputs, labels and a tiny network."""
    model = randomised(nn.Sequential(nn.Linear(wide, 5), nn.Tanh(), nn.Linear(5, classes)))
    return model, gaussian(num, wide), torch.arange(num) % classes


@pytest.fixture
def text():
    tokens = torch.randint(0, 5, (2, 5), generator=generator(1))
    return tokens[:, :-1], tokens[:, 1:].flatten()


def transformer_loss(text):
    return lambda call: F.cross_entropy(call(text[0]).flatten(0, 1), text[1])


def conv_loss(call):
    return F.cross_entropy(call(gaussian(4, 1, 8, 8)), torch.arange(4) % 3)


@pytest.fixture(params=["transformer", "conv net"])
def network(request, text):
    """A model and its loss, given something that calls it."""
    if request.param == "transformer":
        return randomised(Transformer()), transformer_loss(text)
    return randomised(conv_net()), conv_loss


def test_products_are_those_of_the_whole_hessian(network):
    model, loss_of = network
    params = list(model.parameters())
    flat = Layout.of(dict(model.named_parameters())).flatten(params).detach()
    _, operator = hessian(loss_of(model), params)
    expected = whole_hessian(as_function(model, loss_of), flat)

    assert_close(
        torch.stack([operator.multiply(row) for row in torch.eye(len(flat), dtype=flat.dtype)]),
        expected,
        rtol=0,
        atol=1e-10,
    )


def test_the_gradient_is_the_gradient(network):
    model, loss_of = network
    params = list(model.parameters())
    gradient, _ = hessian(loss_of(model), params)
    loss_of(model).backward()

    assert_close(gradient, torch.cat([p.grad.flatten() for p in params]), rtol=1e-12, atol=1e-14)


def test_products_leave_the_graph_for_the_backward_pass(network):
    model, loss_of = network
    params = list(model.parameters())
    model.zero_grad()
    loss = loss_of(model)
    gradient, operator = hessian(loss, params)
    operator.multiply(gradient)
    loss.backward()
    watched = [p.grad for p in params]
    model.zero_grad()
    loss_of(model).backward()

    assert all(torch.equal(one, p.grad) for one, p in zip(watched, params, strict=True))


def test_linear_regression():
    inputs, targets = gaussian(9, 4), gaussian(9, 2, seed=1)
    model = nn.Linear(4, 2, bias=False).double()
    outputs = model(inputs)
    _, operator = hessian(F.mse_loss(outputs, targets), [model.weight])
    expected = 2 / targets.numel() * torch.kron(torch.eye(2, dtype=torch.float64), inputs.T @ inputs)

    assert_close(dense(operator), expected)
    assert_close(dense(gauss_newton(Jacobian(outputs, [model.weight]), lambda u: 2 / targets.numel() * u)), expected)


def test_softmax_regression():
    inputs, labels = gaussian(9, 4), torch.arange(9) % 3
    model = nn.Linear(4, 3, bias=False).double()
    outputs = model(inputs)
    _, operator = hessian(F.cross_entropy(outputs, labels), [model.weight])
    p = outputs.detach().softmax(-1)
    expected = (
        sum(torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(x, x)) for q, x in zip(p, inputs, strict=True))
        / 9
    )

    assert_close(dense(operator), expected)
    assert_close(dense(gauss_newton(Jacobian(outputs, [model.weight]), cross_entropy_product(outputs))), expected)


def test_the_residual_of_a_two_layer_linear_net_has_the_singular_values_of_the_error():
    """With both signs, once for each hidden neuron; zeros for the rest."""
    inputs, targets, hidden = gaussian(9, 4), gaussian(9, 3, seed=1), 2
    model = nn.Sequential(nn.Linear(4, hidden, bias=False), nn.Linear(hidden, 3, bias=False)).double()
    outputs, params = model(inputs), list(model.parameters())
    _, whole = hessian((outputs - targets).square().sum() / 18, params)
    residual = dense(whole) - dense(gauss_newton(Jacobian(outputs, params), lambda u: u / 9))
    sigma = np.linalg.svd(inputs.numpy().T @ (outputs.detach() - targets).numpy() / 9, compute_uv=False)
    expected = np.sort(
        np.concatenate(
            [np.repeat(sigma, hidden), -np.repeat(sigma, hidden), np.zeros(whole.size - 2 * hidden * len(sigma))]
        )
    )

    assert_close(torch.from_numpy(np.linalg.eigvalsh(residual.numpy())), torch.from_numpy(expected))


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.LayerNorm(6, elementwise_affine=False, eps=0), lambda: nn.BatchNorm1d(6, affine=False, eps=1e-30)],
)
def test_a_layer_before_a_norm_has_minus_its_gradient_as_product_with_its_weights(norm):
    """Its scale does not matter: compositions with `jacrev` get this wrong by tens of percents."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), norm(), nn.Tanh(), nn.Linear(6, 3)).double()
    weight = model[0].weight
    gradient, operator = hessian(F.cross_entropy(model(gaussian(8, 4)), torch.arange(8) % 3), [weight])

    assert_close(operator.multiply(weight.detach().flatten()), -gradient)


@pytest.mark.parametrize("at", [0.2, 0.9, 1.5])
def test_saddle(at):
    """(u v - 1)^2 / 2 on the diagonal u = v."""
    u, v = (torch.tensor([at], dtype=torch.float64, requires_grad=True) for _ in range(2))
    _, operator = hessian((u * v - 1).square().sum() / 2, [u, v])

    assert_close(
        torch.linalg.eigvalsh(dense(operator)), torch.tensor(sorted([3 * at**2 - 1, 1 - at**2]), dtype=torch.float64)
    )


def test_jacobian_products_are_those_of_the_whole_jacobian(network, text):
    model, _ = network
    params = list(model.parameters())
    inputs = (text[0],) if isinstance(model, Transformer) else (gaussian(4, 1, 8, 8),)
    jacobian = Jacobian(model(*inputs).flatten(0, -2), params)
    flat = Layout.of(dict(model.named_parameters())).flatten(params).detach()
    whole = whole_jacobian(as_function(model, lambda call: call(*inputs)), flat).reshape(-1, len(flat))
    direction, rows = gaussian(len(flat)), gaussian(*jacobian.outputs.shape)

    assert_close(jacobian.forward(direction).flatten(), whole @ direction, rtol=0, atol=1e-10)
    assert_close(jacobian.backward(rows), rows.flatten() @ whole, rtol=0, atol=1e-10)


def test_a_product_with_the_hessian_tells_the_change_of_the_outputs(network):
    """On the loss's own graph, with weights that are tied, and normalised batches."""
    model, loss_of = network
    params, given = list(model.parameters()), []

    def call(*inputs):
        given.append(model(*inputs))
        return given[0]

    def as_rows(outputs):
        return outputs.flatten(0, -2)

    gradient, operator, jacobian = hessian_and_jacobian(loss_of(call), params, given[0], as_rows)
    plain_gradient, plain = hessian(loss_of(model), params)
    one, other = gaussian(operator.size), gaussian(operator.size, seed=1)
    fresh = Jacobian(as_rows(given[0]), params)
    products = operator.multiply(one), jacobian.forward(one), jacobian.forward(other), jacobian.backward(fresh.outputs)

    assert_close(gradient, plain_gradient, rtol=0, atol=1e-13)
    assert_close(
        products,
        (plain.multiply(one), fresh.forward(one), fresh.forward(other), fresh.backward(fresh.outputs)),
        rtol=0,
        atol=1e-12,
    )
    assert not any(product.requires_grad for product in products)


def test_a_loss_that_is_linear_in_the_outputs_has_their_jacobian_too():
    weight = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    squares = weight.square()
    _, operator, jacobian = hessian_and_jacobian(squares.sum(), [weight], squares, lambda outputs: outputs[:, None])

    assert_close(operator.multiply(torch.ones(3).double()), torch.full((3,), 2.0).double())
    assert_close(jacobian.forward(torch.ones(3).double()), 2 * weight.detach()[:, None])


def test_a_jacobian_does_not_take_one_direction_for_another():
    """The change of the outputs is kept for products with the very same vector, and no longer."""
    model, inputs, _ = classifier()
    outputs, params = model(inputs), list(model.parameters())
    jacobian = Jacobian(outputs, params)
    one, other = gaussian(jacobian.size), gaussian(jacobian.size, seed=1)
    found = [jacobian.forward(vector) for vector in (one, one, other, one)]
    fresh = [Jacobian(outputs, params).forward(vector) for vector in (one, one, other, one)]

    assert_close(found, fresh, rtol=0, atol=0)


def test_a_relu_net_without_biases_is_homogeneous():
    """Euler: the product of the Jacobian with the parameters is the output, once for each layer."""
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)
    ).double()
    outputs, params = model(gaussian(7, 4)), list(model.parameters())

    assert_close(
        Jacobian(outputs, params).forward(torch.cat([p.detach().flatten() for p in params])), 3 * outputs.detach()
    )


def test_gauss_newton_in_output_space_has_the_same_eigenvalues():
    model, inputs, _ = classifier()
    outputs, params = model(inputs), list(model.parameters())
    jacobian = Jacobian(outputs, params)
    small = dense(output_gauss_newton(jacobian, *cross_entropy_factors(outputs)))
    large = dense(gauss_newton(jacobian, cross_entropy_product(outputs)))

    assert_close(torch.linalg.eigvalsh(small), torch.linalg.eigvalsh(large)[-len(small) :])


def per_example_gradients(model, inputs, losses):
    rows = [torch.autograd.grad(losses(model(inputs))[i], list(model.parameters())) for i in range(len(inputs))]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_empirical_fisher_is_the_mean_outer_product_of_the_gradients_of_examples():
    model, inputs, labels = classifier()
    outputs = model(inputs)
    rows = outputs.detach().softmax(-1) - F.one_hot(labels)
    gradients = per_example_gradients(model, inputs, lambda o: F.cross_entropy(o, labels, reduction="none"))

    assert_close(
        dense(fisher(Jacobian(outputs, list(model.parameters())), rows)), gradients.T @ gradients / len(inputs)
    )


def test_monte_carlo_fisher_is_the_gauss_newton_matrix_on_average():
    model, inputs, _ = classifier()
    outputs = model(inputs)
    jacobian, p, draws = Jacobian(outputs, list(model.parameters())), outputs.detach().softmax(-1), generator(5)
    labels = [torch.multinomial(p, 1, generator=draws)[:, 0] for _ in range(200)]
    vector = gaussian(jacobian.size)
    found = torch.stack([fisher(jacobian, p - F.one_hot(label, 3)).multiply(vector) for label in labels])
    expected = gauss_newton(jacobian, cross_entropy_product(outputs)).multiply(vector)

    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / 200**0.5).all()


def test_the_empirical_fisher_is_not_the_gauss_newton_matrix():
    model, inputs, labels = classifier()
    outputs = model(inputs)
    jacobian = Jacobian(outputs, list(model.parameters()))
    empirical = dense(fisher(jacobian, outputs.detach().softmax(-1) - F.one_hot(labels))).trace()
    expected = dense(gauss_newton(jacobian, cross_entropy_product(outputs))).trace()

    assert (empirical - expected).abs() > 0.1 * expected


def test_preconditioning_gives_the_eigenvalues_of_the_product():
    matrix = gaussian(6, 6)
    matrix, diagonal = matrix + matrix.T, gaussian(6, seed=1).square()
    scaled = dense(preconditioned(of_matrix(matrix), diagonal))

    assert_close(
        np.linalg.eigvalsh(scaled.numpy()), np.sort(np.linalg.eigvals((diagonal[:, None] * matrix).numpy()).real)
    )


def of_matrix(matrix):
    return Operator(len(matrix), lambda v: matrix @ v, matrix.device, matrix.dtype)


def test_a_parameter_that_the_loss_does_not_depend_on_has_zeros():
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    gradient, operator = hessian(used.pow(3).sum(), [unused, used])

    assert_close(gradient, torch.tensor([0.0, 0, 3, 3]))
    assert_close(operator.multiply(torch.ones(4)), torch.tensor([0.0, 0, 6, 6]))


def test_a_linear_loss_has_no_curvature():
    parameter = torch.ones(3, requires_grad=True)
    _, operator = hessian(parameter.sum(), [parameter])

    assert_close(operator.multiply(torch.ones(3)), torch.zeros(3))


def test_half_precision_parameters_have_vectors_in_single_precision():
    one, other = torch.ones(3, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, requires_grad=True)
    gradient, operator = hessian(one.pow(2).sum() + other.pow(2).sum(), [one, other])

    assert gradient.dtype == operator.dtype == operator.multiply(torch.ones(5)).dtype == torch.float32
    assert_close(operator.multiply(torch.ones(5)), torch.full((5,), 2.0))


def test_products_do_without_grad_mode():
    model, inputs, labels = classifier()
    outputs, params = model(inputs), list(model.parameters())
    _, whole = hessian(F.cross_entropy(outputs, labels), params)
    part = gauss_newton(Jacobian(outputs, params), cross_entropy_product(outputs))
    vector = gaussian(whole.size)
    expected = (
        whole.multiply(vector),
        gauss_newton(Jacobian(outputs, params), cross_entropy_product(outputs)).multiply(vector),
    )
    with torch.no_grad():
        found = whole.multiply(vector), part.multiply(vector)

    assert_close(found, expected, rtol=0, atol=0)


def test_a_product_does_not_keep_a_graph_of_its_own():
    model, inputs, labels = classifier()
    gradient, operator = hessian(F.cross_entropy(model(inputs), labels), list(model.parameters()))

    assert not gradient.requires_grad
    assert not operator.multiply(gradient).requires_grad


def test_a_layout_takes_apart_what_it_put_together():
    named = {"a": gaussian(2, 3), "b": gaussian(()), "c": gaussian(4)}
    layout = Layout.of(named)

    assert_close(layout.split(layout.flatten(list(named.values()))), list(named.values()), rtol=0, atol=0)


def test_sums_of_a_layout_are_per_parameter():
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(4)})

    assert_close(
        layout.sums(torch.stack([torch.ones(10), torch.arange(10.0)])), torch.tensor([[6.0, 4.0], [15.0, 30.0]])
    )
