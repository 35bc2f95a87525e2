"""Small nets, their Jacobians as `torch.func` forms them, and the kernels of those."""

import torch
from torch import nn
from torch.func import functional_call, jacrev

from lightning_lowrank.maths.operators.operators import Jacobian

NAMES = ["full", "class_summed", "sum_of_logits"]
ROWS, COLUMNS = 16, 3


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def filled(model, dtype=torch.float64):
    """With parameters drawn as wide nets have them."""
    for i, parameter in enumerate(model.parameters()):
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = scale * random(*parameter.shape, seed=100 + i, dtype=torch.float64).to(dtype)
    return model.to(dtype).eval()


def mlp(width=12, dtype=torch.float64):
    return filled(nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, COLUMNS)), dtype)


def with_norms(dtype):
    return filled(
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, COLUMNS)),
        dtype,
    )


def convolutional(dtype):
    return filled(
        nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 4, 3),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, COLUMNS),
        ),
        dtype,
    )


def jacobian_of(model, inputs):
    return Jacobian(model(inputs), list(model.parameters()))


def per_parameter(model, inputs):
    """The Jacobian of each parameter, by forward and reverse mode of functions."""
    found = jacrev(lambda params: functional_call(model, params, (inputs,)))(dict(model.named_parameters()))
    return {name: part.detach().flatten(2).flatten(0, 1) for name, part in found.items()}


def oracle(model, inputs, name="full"):
    """A kernel, from the Jacobian."""
    matrix = torch.cat(list(per_parameter(model, inputs).values()), 1)
    blocks = (matrix @ matrix.T).view(len(inputs), COLUMNS, len(inputs), COLUMNS)
    if name == "full":
        return blocks.flatten(2).flatten(0, 1)
    return torch.einsum("icjc->ij", blocks) if name == "class_summed" else blocks.sum((1, 3)) / COLUMNS


def matrix_of(modes):
    return modes.vectors.mT @ (modes.values[:, None] * modes.vectors)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_hot(num):
    return torch.eye(COLUMNS, dtype=torch.float64)[torch.arange(num) % COLUMNS]


def cosine(one, other):
    return (one * other).sum() / (one.norm() * other.norm())


def inputs_of_nets():
    return random(ROWS, 5, seed=7)


def moved_nets():
    """A net, and the same some way on."""
    one, other = mlp(), mlp()
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            parameter += 0.3 * random(*parameter.shape, seed=i) * parameter.std()
    return one, other
