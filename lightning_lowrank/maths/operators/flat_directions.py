"""Directions in which a small network can move without changing its outputs, counted and explained.

Shape letters:  P entries of all parameters   T tangent vectors   V singular values   F directions of no change   H
neurons of a hidden layer   I weights into one, bias included   O neurons of the next layer   D duplicates
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_lowrank.maths.operators.operators import Jacobian, Layout

# sigma(c x) = c sigma(x) for every c > 0.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)
# sigma(-x) = -sigma(x).
ODD = (nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Identity)
OTHER = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.Softplus,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Hardswish,
)
ACTIVATIONS = tuple(dict.fromkeys(HOMOGENEOUS + ODD + OTHER))
# Neurons are looked at as duplicates where their weights differ by no more than this part of their length.
ALIKE = 1e-6


@dataclass(frozen=True)
class FlatDirections:
    """Zero eigenvalues of a Gauss-Newton matrix, by what makes them.

    Attributes:
        total: How many there are: parameters without the rank of the outputs' Jacobian.
        duplicates: Of these, how many a narrower network would not have: neurons with the same incoming weights, or no
            outgoing ones.
        scale: How many of the others are neurons whose incoming weights can grow as their outgoing ones shrink.
        rest: What neither explains: fewer data than parameters, dead neurons, layers without an activation between.
        gap: Smallest singular value of the Jacobian that counts as not 0, over the largest that does. The count is
            exact where this is large, and a matter of the tolerance where it is not.
    """

    total: Int[Tensor, ""]
    duplicates: Int[Tensor, ""]
    scale: Int[Tensor, ""]
    rest: Int[Tensor, ""]
    gap: Float[Tensor, ""]


@dataclass(frozen=True)
class Hidden:
    """A layer of neurons, with the linear layers before and after it."""

    before: nn.Linear
    activation: nn.Module
    after: nn.Linear

    @property
    def incoming(self) -> Float[Tensor, "H I"]:
        """Weights into each neuron, and its bias."""
        bias = self.before.bias
        return (
            self.before.weight.detach() if bias is None else torch.cat([self.before.weight, bias[:, None]], -1).detach()
        )

    @property
    def outgoing(self) -> Float[Tensor, "H O"]:
        """Weights out of each neuron."""
        return self.after.weight.detach().mT


def flat_directions(
    model: nn.Sequential,
    inputs: Float[Tensor, "_ ..."],
    *,
    factor: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
    tolerance: float = 1e-10,
) -> FlatDirections:
    """The number of zero eigenvalues of the Gauss-Newton matrix of a small network, and their causes, in float64.

    A network with a neuron split in two, or with a neuron without outgoing weights, computes the same as a narrower
    network. Its Jacobian has the same rank there, so every additional parameter is a flat direction.

    Args:
        model: Linear layers with at most one activation between two of them, optionally after `nn.Flatten`. A copy is
            used.
        inputs: Examples; memory must hold outputs times parameters.
        factor: Maps outputs to a product with L, where L L^T is the Hessian of the loss with respect to the outputs.
            Default: the identity, for the squared error.
        tolerance: Singular values of the Jacobian count as 0 below this fraction of the largest. Weights that were
            split in float32 are parallel to only seven digits and need 1e-6.

    References:
        Zhang et al. (2021), NeurIPS, arXiv:2105.14573, and (2022), arXiv:2111.15527, for the embedding principle.
    """
    model = deepcopy(model).double().requires_grad_()
    layers = _hidden_layers(model)
    params = dict(model.named_parameters())
    layout = Layout.of(params)
    jacobian = _jacobian(model, inputs.double(), list(params.values()), factor)
    # Triangular first: no square matrix of all outputs is made.
    _, values, rows = torch.linalg.svd(torch.linalg.qr(jacobian, mode="r").R)
    floor = tolerance * values[0]
    flat = rows[(values > floor).sum() :]
    found = [
        _flat_ones(jacobian, floor, _tangents(layers, layout, params, of)) @ flat.mT for of in (_duplicated, _scaled)
    ]
    duplicates, both = _rank(found[0], tolerance), _rank(torch.cat(found), tolerance)
    total = jacobian.shape[-1] - (values > floor).sum()
    return FlatDirections(total, duplicates, both - duplicates, total - both, _gap(values, floor))


Change = tuple[Tensor, Tensor]


def _hidden_layers(model: nn.Sequential) -> list[Hidden]:
    """The layers of a chain of linear layers and activations.

    Raises:
        ValueError: It is something else.
    """
    modules = [module for i, module in enumerate(model) if not (i == 0 and isinstance(module, nn.Flatten))]
    linear = {i: module for i, module in enumerate(modules) if isinstance(module, nn.Linear)}
    known = all(type(module) in (nn.Linear, *ACTIVATIONS) for module in modules)
    if not known or not {0, len(modules) - 1} <= set(linear) or any(j - i > 2 for i, j in pairwise(linear)):
        raise ValueError(
            "flat directions need an nn.Sequential that begins and ends with nn.Linear layers and has at most "
            f"one of {', '.join(kind.__name__ for kind in ACTIVATIONS)} between two of them; this is "
            f"{[type(m).__name__ for m in model]}"
        )
    return [Hidden(linear[i], modules[i + 1] if j == i + 2 else nn.Identity(), linear[j]) for i, j in pairwise(linear)]


def _jacobian(
    model: nn.Module,
    inputs: Tensor,
    params: list[Tensor],
    factor: Callable[[Tensor], Callable[[Tensor], Tensor]] | None,
) -> Float[Tensor, "_ P"]:
    """L^T J, row by row."""
    with torch.enable_grad():
        outputs = model(inputs).flatten(0, -2)
    jacobian = Jacobian(outputs, params)
    multiply = factor(outputs.detach()) if factor else torch.clone
    units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device).view(-1, *outputs.shape)
    return torch.stack([jacobian.backward(multiply(unit)) for unit in units])


def _tangents(
    layers: list[Hidden], layout: Layout, params: Mapping[str, Tensor], changes: Callable[[Hidden], Iterator[Change]]
) -> Float[Tensor, "T P"]:
    """Unit vectors in parameter space, of changes of the weights into and out of neurons."""
    rows = [_tangent(layer, change, layout, params) for layer in layers for change in changes(layer)]
    none = torch.zeros(0, sum(layout.sizes), dtype=torch.float64, device=next(iter(params.values())).device)
    return nn.functional.normalize(torch.stack(rows), dim=-1) if rows else none


def _tangent(layer: Hidden, change: Change, layout: Layout, params: Mapping[str, Tensor]) -> Float[Tensor, " P"]:
    before, after = layer.before, layer.after
    incoming, outgoing = change
    weights, biases = incoming.tensor_split([before.in_features], -1)
    parts = {id(before.weight): weights, id(before.bias): biases, id(after.weight): outgoing.mT}
    return layout.flatten([parts.get(id(p), torch.zeros_like(p)).detach() for p in params.values()])


def _scaled(layer: Hidden) -> Iterator[Change]:
    """Each neuron's incoming weights grow, its outgoing ones shrink."""
    if isinstance(layer.activation, HOMOGENEOUS):
        for one in torch.eye(layer.before.out_features, dtype=torch.float64, device=layer.before.weight.device)[
            ..., None
        ]:
            yield one * layer.incoming, -one * layer.outgoing


def _duplicated(layer: Hidden) -> Iterator[Change]:
    """What duplicates can do so that their changes cancel."""
    for members, factors in _groups(layer):
        still = torch.zeros_like(layer.incoming), torch.zeros_like(layer.outgoing)
        for member, multiple in zip(members[1:], factors[1:], strict=True):
            for out in range(layer.after.out_features):
                outgoing = still[1].clone()
                outgoing[member, out], outgoing[members[0], out] = 1.0, -multiple
                yield still[0], outgoing
        for combination in _null_space(layer.outgoing[members].mT, layer.outgoing):
            for weight in range(still[0].shape[-1]):
                incoming = still[0].clone()
                incoming[members, weight] = combination
                yield incoming, still[1]


def _groups(layer: Hidden) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Neurons that are multiples of each other, and by how much the output of each is that of the first of them."""
    groups: list[tuple[list[int], list[Tensor]]] = []
    for i, weights in enumerate(layer.incoming):
        for members, factors in groups:
            multiple = _multiple(layer, weights, layer.incoming[members[0]])
            if multiple is not None:
                members.append(i)
                factors.append(multiple)
                break
        else:
            groups.append(([i], [weights.new_ones(())]))
    yield from groups


def _multiple(layer: Hidden, weights: Float[Tensor, " I"], first: Float[Tensor, " I"]) -> Tensor | None:
    """By what the output of one neuron is that of another, whatever the input; None where it is no multiple."""
    length, other = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(first)
    size = (
        length / other
        if isinstance(layer.activation, HOMOGENEOUS) and other > 0 and length > 0
        else torch.ones_like(length)
    )
    for sign in (1.0, -1.0) if isinstance(layer.activation, ODD) else (1.0,):
        if torch.linalg.vector_norm(weights - sign * size * first) <= ALIKE * length:
            return sign * size
    return None


def _null_space(matrix: Float[Tensor, "O D"], scale: Tensor) -> Float[Tensor, "_ D"]:
    """Orthonormal combinations of columns that are 0."""
    _, values, rows = torch.linalg.svd(matrix)
    rank = (values > ALIKE * torch.linalg.vector_norm(scale)).sum()
    combinations: Tensor = rows[rank:]
    return combinations


def _flat_ones(jacobian: Float[Tensor, "_ P"], floor: Tensor, tangents: Float[Tensor, "T P"]) -> Float[Tensor, "_ P"]:
    """Those along which nothing changes: neurons may be alike in a few digits only."""
    return tangents[torch.linalg.vector_norm(tangents @ jacobian.mT, dim=-1) <= floor]


def _rank(rows: Float[Tensor, "T F"], tolerance: float) -> Int[Tensor, ""]:
    """Tangents without duplicates: two that differ by no more than the tolerance count as one."""
    none = torch.zeros((), dtype=torch.int64, device=rows.device)
    return torch.linalg.matrix_rank(rows, atol=tolerance) if rows.numel() else none


def _gap(values: Float[Tensor, " V"], floor: Tensor) -> Float[Tensor, ""]:
    counted = values > floor
    rounding = torch.finfo(values.dtype).eps * values[0]
    return torch.where(counted, values, torch.inf).min() / torch.where(counted, rounding, values).max().maximum(
        rounding
    )
