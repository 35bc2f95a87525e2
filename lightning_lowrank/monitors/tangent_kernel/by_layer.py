"""The class-summed kernel of examples that do not meet, exactly: from what goes into each layer, and the derivative of
the outputs by what comes out of it.

Where a row of the outputs depends on one example alone, the derivatives of a column of all rows by the outputs of all
layers take one backward pass. A kernel so takes as many passes as there are columns, and no search.

Shape letters:  R rows of the model's outputs, one for each example   C columns of them   P entries of a parameter
a, b entries on its two sides
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_lowrank.maths.operators.operators import Jacobian
from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype

# Most rows: a matrix of so many is decomposed.
ROWS = 512
# Most numbers in the derivatives of a column by one parameter, for all examples.
ENTRIES = 2**24
# Largest relative deviation of a product from that by autograd, in roots of the dtype's rounding.
AGREES = 2.0


@dataclass(frozen=True)
class Use:
    """The one place where a parameter goes into the outputs.

    The derivative by it of an example is `left`, or the outer product of `left` and `right`.

    Attributes:
        node: The layer, in the graph.
        left: Of all examples, from the derivative by what comes out of the layer; linear in it.
        right: Of all examples.
        transposed: Rows of the parameter belong to `right`.
    """

    node: Node
    left: Callable[[Tensor], Float[Tensor, "R a"]]
    right: Float[Tensor, "R b"] | None = None
    transposed: bool = False

    def gradient(self, along: Tensor) -> Float[Tensor, " P"]:
        """Sum of all examples' derivatives."""
        left = self.left(along)
        if self.right is None:
            return left.sum(0)
        product = left.mT @ self.right
        return (product.mT if self.transposed else product).flatten()


def class_summed(jacobian: Jacobian, *, seed: int) -> Float[Tensor, "R R"] | None:
    """The kernel of examples, summed over the columns of the outputs.

    Cost: one backward pass for each column, and one product by autograd. Memory: the derivatives of one column by the
    outputs of all layers.

    A product with random signs is compared with one by autograd. This finds layers that are used in another way, and
    examples that depend on each other, as under batch normalisation.

    Args:
        jacobian: Of the outputs of all examples, on one process.
        seed: Of the signs.

    Returns:
        None if this way does not apply. A parameter is used twice, or in a layer other than linear ones, convolutions
        and normalisations. Or rows are not examples, or there are more than 512 of them.
    """
    rows = len(jacobian.outputs)
    if rows > ROWS or jacobian.all_reduce is not None or jacobian.outputs.grad_fn is None:
        return None
    try:
        with full_precision(jacobian.outputs.device):
            uses = _uses(jacobian.outputs.grad_fn, jacobian.params, rows)
            return _kernel(jacobian, uses, seed) if uses and any(uses) else None
    except RuntimeError:  # shapes that no rule is made for, or memory
        return None


def _kernel(jacobian: Jacobian, uses: Sequence[Use | None], seed: int) -> Float[Tensor, "R R"] | None:
    """The sum over parameters, None where a product with it is another than autograd's."""
    outputs, wide = jacobian.outputs, working_dtype(jacobian.outputs.device)
    used = [use for use in uses if use is not None]
    nodes = list(dict.fromkeys(use.node for use in used))
    signs = _signs(outputs, seed)
    lefts = [torch.zeros(len(outputs), len(outputs), dtype=wide, device=outputs.device) for _ in used]
    mixed: dict[Node, Tensor] = {}
    for c, column in enumerate(torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)):
        edges = [GradientEdge(node, 0) for node in nodes]
        parts = torch.autograd.grad(outputs, edges, column.expand_as(outputs), retain_graph=True)
        found = dict(zip(nodes, parts, strict=True))
        for node, along in found.items():
            signed = _times(along, signs[:, c])
            mixed[node] = mixed[node] + signed if c else signed
        for use, total in zip(used, lefts, strict=True):
            left = use.left(found[use.node])
            total += left @ left.mT
    ours = [
        torch.zeros_like(p).flatten() if use is None else use.gradient(mixed[use.node])
        for p, use in zip(jacobian.params, uses, strict=True)
    ]
    if not _agree(torch.cat([part.to(jacobian.dtype) for part in ours]), jacobian.backward(signs)):
        return None
    kernel = torch.zeros_like(lefts[0])
    for use, total in zip(used, lefts, strict=True):
        kernel += total if use.right is None else total * (use.right @ use.right.mT)
    return ((kernel + kernel.mT) / 2).to(jacobian.dtype)


def _signs(like: Float[Tensor, "R C"], seed: int) -> Float[Tensor, "R C"]:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _agree(ours: Float[Tensor, " P"], autograd: Float[Tensor, " P"]) -> bool:
    """Whether two gradients are one up to rounding; waits for the device."""
    allowed = AGREES * torch.finfo(ours.dtype).eps ** 0.5 * autograd.norm()
    return bool((ours - autograd).norm() <= allowed)


def _times(along: Tensor, signs: Float[Tensor, " R"]) -> Tensor:
    """The derivative of each example times its sign."""
    rows = along.reshape(len(signs), -1)
    return (rows * signs[:, None].to(rows)).view_as(along)


def _uses(root: Node, params: Sequence[Tensor], rows: int) -> list[Use | None] | None:
    """The one use of each parameter, None for one that is not used; None where one has more, or of another kind."""
    places = {id(p): i for i, p in enumerate(params)}
    uses: list[Use | None] = [None] * len(params)
    for node, position, leaf, turned in _leaves(root):
        place = places.get(id(leaf.variable))  # type: ignore[attr-defined]
        if place is None:
            continue
        rule = RULES.get((node.name(), position))
        use = None if rule is None else rule(node, rows, turned)
        if use is None or uses[place] is not None:
            return None
        uses[place] = use
        if use.right is None and rows * params[place].numel() > ENTRIES:
            return None
    return uses


def _leaves(root: Node) -> Iterator[tuple[Node, int, Node, bool]]:
    """Nodes that take a leaf, at which place, the leaf, and whether it is transposed on the way."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        for position, (before, _) in enumerate(node.next_functions):
            if before is None:
                continue
            turned = before.name() == "TBackward0"
            leaf = before.next_functions[0][0] if turned else before
            if leaf is not None and hasattr(leaf, "variable"):
                yield node, position, leaf, turned
            elif before not in seen:
                seen.add(before)
                waiting.append(before)


def _linear(inputs: str) -> Callable[[Any, int, bool], Use]:
    """Inputs times weight; where an example has several rows of them, what they give is added up."""

    def rule(node: Any, rows: int, turned: bool) -> Use:
        into = getattr(node, inputs)
        if len(into) == rows:
            return Use(node, _as_it_is, into, transposed=not turned)
        into = into.reshape(rows, -1, into.shape[-1])
        product = "rto,rti->roi" if turned else "rto,rti->rio"
        return Use(node, lambda along: torch.einsum(product, along.reshape(rows, -1, along.shape[-1]), into).flatten(1))

    return rule


def _added(axis: int) -> Callable[[Any, int, bool], Use]:
    """A bias along an axis."""

    def rule(node: Any, rows: int, turned: bool) -> Use:
        return Use(node, lambda along: _along(along, axis, rows))

    return rule


def _as_it_is(along: Tensor) -> Tensor:
    return along


def _along(along: Tensor, axis: int, rows: int) -> Float[Tensor, "R a"]:
    """Sums over all of an example but one axis."""
    last = along.movedim(axis, -1)
    return last.reshape(rows, -1, last.shape[-1]).sum(1)


def _convolution(node: Any, rows: int, turned: bool) -> Use:
    into, weight = node._saved_input, node._saved_weight
    transposed, groups = (node._saved_transposed, node._saved_output_padding), node._saved_groups
    options: Any = (node._saved_stride, node._saved_padding, node._saved_dilation, *transposed, groups)

    def of_one(along: Tensor, image: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten.convolution_backward(
            along[None], image[None], weight, None, *options, (False, True, False)
        )[1]
        return found

    def left(along: Tensor) -> Tensor:
        return torch.func.vmap(of_one)(along, into).reshape(rows, -1, weight.numel()).sum(1)

    return Use(node, left)


def _layer_norm(node: Any, rows: int, turned: bool) -> Use:
    normal = (node._saved_input - node._saved_result1) * node._saved_result2
    size = prod(node._saved_normalized_shape)
    return Use(node, lambda along: (along * normal).reshape(rows, -1, size).sum(1))


def _layer_norm_bias(node: Any, rows: int, turned: bool) -> Use:
    size = prod(node._saved_normalized_shape)
    return Use(node, lambda along: along.reshape(rows, -1, size).sum(1))


def _batch_norm(node: Any, rows: int, turned: bool) -> Use | None:
    if node._saved_training:  # also in eval mode, where it keeps no running statistics: examples depend on each other
        return None
    into = node._saved_input
    mean, var = (x.reshape(-1, *(1,) * (into.ndim - 2)) for x in (node._saved_running_mean, node._saved_running_var))
    normal = (into - mean) * (var + node._saved_eps).rsqrt()
    return Use(node, lambda along: _along(along * normal, 1, rows))


# By the node of the graph and the place at which it takes the parameter; None where the node has no use of this kind.
RULES: dict[tuple[str, int], Callable[[Any, int, bool], Use | None]] = {
    ("AddmmBackward0", 0): _added(-1),
    ("AddmmBackward0", 2): _linear("_saved_mat1"),
    ("MmBackward0", 1): _linear("_saved_self"),
    ("ConvolutionBackward0", 1): _convolution,
    ("ConvolutionBackward0", 2): _added(1),
    ("NativeLayerNormBackward0", 1): _layer_norm,
    ("NativeLayerNormBackward0", 2): _layer_norm_bias,
    ("NativeBatchNormBackward0", 1): _batch_norm,
    ("NativeBatchNormBackward0", 2): _added(1),
}
