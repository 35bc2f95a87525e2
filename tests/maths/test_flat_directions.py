"""Oracles: numpy's rank of the Jacobian, and counts by hand for what networks have more than narrower ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as whole_jacobian
from torch.func import functional_call
from torch.testing import assert_close

from lightning_lowrank.maths.operators.flat_directions import flat_directions
from tests.operators import cross_entropy_factors
from tests.oracles.spectra import gaussian, generator

INPUTS = gaussian(60, 4)


def net(*widths, activation=nn.Tanh, bias=True):
    """Weights drawn at random, in float64."""
    layers = [nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)]
    draws = generator(2)
    for layer in layers:
        for p in layer.parameters():
            p.data = torch.randn(p.shape, generator=draws, dtype=torch.float64)
    return nn.Sequential(*[module for layer in layers for module in (layer, activation())][:-1])


def split(model, *, share=0.3, factor=1.0, neuron=0):
    """The first hidden layer with one neuron more, which has the weights of another and takes a share of what that
    gives.
    """
    before, activation, after, *rest = model
    wider = (
        nn.Linear(before.in_features, before.out_features + 1).double(),
        nn.Linear(after.in_features + 1, after.out_features).double(),
    )
    wider[0].weight.data = torch.cat([before.weight, factor * before.weight[neuron : neuron + 1]])
    wider[0].bias.data = torch.cat([before.bias, factor * before.bias[neuron : neuron + 1]])
    out = after.weight.detach().clone()
    out[:, neuron] *= 1 - share
    wider[1].weight.data = torch.cat([out, share / factor * after.weight[:, neuron : neuron + 1]], 1)
    wider[1].bias.data = after.bias.detach().clone()
    return nn.Sequential(wider[0], activation, wider[1], *rest)


def counts(found):
    return [int(getattr(found, name)) for name in ("total", "duplicates", "scale", "rest")]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.Identity])
@pytest.mark.parametrize("widths", [(4, 5, 2), (4, 5, 3, 2), (4, 2)])
def test_the_total_is_what_the_rank_of_the_jacobian_leaves(widths, activation):
    model = net(*widths, activation=activation)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    shapes = dict(model.named_parameters())

    def outputs(vector):
        parts = vector.split([p.numel() for p in shapes.values()])
        named = {name: part.view(p.shape) for (name, p), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(model, named, (INPUTS,)).flatten()

    rank = np.linalg.matrix_rank(whole_jacobian(outputs, flat).numpy(), rtol=1e-10)

    assert int(flat_directions(model, INPUTS).total) == len(flat) - rank


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_a_split_neuron_adds_as_many_flat_directions_as_parameters(share, classes, activation):
    """The embedding principle: the wider network has all that it has more for nothing."""
    model = net(4, 5, classes, activation=activation)
    wider = split(model, share=share)
    narrow, wide = flat_directions(model, INPUTS), flat_directions(wider, INPUTS)

    assert_close(wider(INPUTS), model(INPUTS))
    assert int(wide.total - narrow.total) == 4 + 1 + classes
    assert counts(wide)[2:] == counts(narrow)[2:]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_flat_directions_grow_with_the_width(times):
    model = net(4, 5, 2)
    for _ in range(times):
        model = split(model, share=0.5)

    assert counts(flat_directions(model, INPUTS)) == [7 * times, 7 * times, 0, 0]


def test_a_split_neuron_of_a_deep_net():
    model = net(4, 5, 3, 2)

    assert counts(flat_directions(split(model), INPUTS)) == [4 + 1 + 3, 4 + 1 + 3, 0, 0]


def test_a_neuron_without_outgoing_weights_has_its_incoming_ones_for_nothing():
    model = net(4, 5, 2)
    model[2].weight.data[:, 1] = 0

    assert counts(flat_directions(model, INPUTS)) == [5, 5, 0, 0]


def test_neurons_that_only_share_their_inputs_are_flat_in_the_outputs_alone():
    """Their outgoing weights point in two directions, and so the incoming ones still tell them apart."""
    model = split(net(4, 5, 2))
    model[2].weight.data[:, -1] = torch.tensor([1.0, -2.0])

    assert counts(flat_directions(model, INPUTS)) == [2, 2, 0, 0]


@pytest.mark.parametrize(("activation", "factor"), [(nn.ReLU, 3.0), (nn.LeakyReLU, 0.2), (nn.Tanh, -1.0)])
def test_duplicates_may_differ_by_what_the_activation_lets_through(activation, factor):
    found = flat_directions(split(net(4, 5, 2, activation=activation), factor=factor), INPUTS)

    assert int(found.duplicates) == 7


def test_duplicates_of_a_smooth_net_may_not_differ_in_scale():
    wider = split(net(4, 5, 2, activation=nn.GELU), factor=1.5)

    assert int(flat_directions(wider, INPUTS).duplicates) == 0


@pytest.mark.parametrize(
    ("activation", "expected"), [(nn.ReLU, 5 + 3), (nn.LeakyReLU, 5 + 3), (nn.Tanh, 0), (nn.GELU, 0)]
)
def test_each_homogeneous_neuron_has_a_scale(activation, expected):
    assert int(flat_directions(net(4, 5, 3, 2, activation=activation), INPUTS).scale) == expected


def test_few_examples_leave_directions_that_nothing_else_explains():
    model = net(4, 5, 2)

    assert counts(flat_directions(model, INPUTS[:3])) == [37 - 6, 0, 0, 37 - 6]


def test_a_relu_neuron_that_is_never_on_has_all_its_weights_for_nothing():
    model = net(4, 5, 2, activation=nn.ReLU)
    before = flat_directions(model, INPUTS)
    model[0].bias.data[0] = -1e3
    found = flat_directions(model, INPUTS)

    assert int(found.total) == int(before.total) + 7 - 1


def test_two_linear_layers_have_the_symmetry_of_what_is_between_them():
    """Any invertible matrix may stand there; the scales are some of these."""
    found = flat_directions(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False)), INPUTS)

    assert counts(found) == [9, 0, 3, 6]


def test_cross_entropy_does_not_see_a_shift_of_all_outputs():
    """Of all weights into them: as many directions as the last layer has inputs, and one for the biases."""
    found = flat_directions(net(4, 5, 3), INPUTS, factor=lambda outputs: cross_entropy_factors(outputs)[0])

    assert counts(found) == [5 + 1, 0, 0, 5 + 1]


def test_the_gap_tells_whether_the_count_is_exact():
    narrow = flat_directions(net(4, 5, 2), INPUTS)
    crowded = flat_directions(net(4, 40, 2), INPUTS[:30].repeat(2, 1) + 1e-9 * gaussian(60, 4, seed=1))

    assert narrow.gap > 1e6 > 1e3 > crowded.gap


def test_the_model_is_left_alone():
    model = net(4, 5, 2).float().requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    flat_directions(model, INPUTS.float())

    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_images_are_flattened():
    model = net(4, 5, 2)

    assert counts(flat_directions(nn.Sequential(nn.Flatten(), *model), INPUTS.view(-1, 2, 2))) == counts(
        flat_directions(model, INPUTS)
    )


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 2, 3)),
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.Tanh(), nn.Linear(4, 5)),
        nn.Sequential(),
    ],
)
def test_other_networks_are_refused(model):
    with pytest.raises(ValueError, match=r"flat directions need an nn.Sequential that begins and ends with nn.Linear"):
        flat_directions(model, INPUTS)


def test_neurons_that_are_alike_in_a_few_digits_are_counted_like_copies():
    wider = split(net(4, 5, 2, activation=nn.ReLU))
    expected = counts(flat_directions(wider, INPUTS))
    wider[0].weight.data[-1] *= 1 + 1e-8 * gaussian(4)

    assert counts(flat_directions(wider, INPUTS, tolerance=1e-6)) == expected
