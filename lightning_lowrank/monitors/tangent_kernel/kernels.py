"""The empirical neural tangent kernel, from products with the Jacobian of the outputs. If there are many outputs,
neither of them is ever formed.

The known top of a kernel is kept exactly, so that chance affects only the rest.

Shape letters:  R rows of the model's outputs   C columns of them   P entries of all parameters   L parameters   k
projections or probes n size of a kernel   m columns whose kernels are summed   q known directions   s known modes
"""

from collections import deque
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs
from lightning_lowrank.maths.operators.operators import Jacobian, Layout, Operator, dense
from lightning_lowrank.maths.spectra.spectrum import Spectrum, descending, eigenvectors, full_precision, working_dtype

# A kernel of all outputs; of examples, summed over the outputs; of examples, for the sum of the outputs over sqrt(C).
KernelName = Literal["full", "class_summed", "sum_of_logits"]

# With fewer there is no pair left in a jackknife over neighbours.
FEWEST = 4


@dataclass(frozen=True)
class Kernel:
    """A kernel as a sum of what is known and of what random projections tell of the rest.

    K = basis^T core basis + E[rest_i rest_i^T], where the expectation is over projections.

    Attributes:
        basis: Directions of the known part, of any length.
        core: Symmetric; the known part between them.
        rest: Of independent projections, each with as many columns as there are kernels in the sum. No projections
            where all is known.
        num_rows: Rows of the model's outputs; each has the same number of the kernel's.
    """

    basis: Float[Tensor, "q n"]
    core: Float[Tensor, "q q"]
    rest: Float[Tensor, "k n m"]
    num_rows: int


@dataclass(frozen=True)
class Known:
    """Directions in which a kernel has been multiplied, and what came out.

    Attributes:
        directions: Orthonormal rows.
        images: Products of the kernel with each.
    """

    directions: Float[Tensor, "q n"]
    images: Float[Tensor, "q n"]


@dataclass(frozen=True)
class LayerKernels:
    """Estimates of the kernel of each parameter, from random vectors in output space.

    Attributes:
        products: u_i^T K_l u_j for vectors of signs; 0 where the pair was not looked at.
        pairs: Which ones were, besides the diagonal.
    """

    products: Float[Tensor, "k k L"]
    pairs: Bool[Tensor, "k k"]


def kernel_operator(jacobian: Jacobian, kernel: KernelName) -> Operator:
    """A kernel as an operator in output space: R C rows of the full one, R of the others.

    A product takes one pair of products with the Jacobian; C of them for the class-summed kernel.
    """
    rows, columns = jacobian.outputs.shape
    directions = _directions(kernel, columns, jacobian.dtype, jacobian.outputs.device)

    def multiply(vector: Tensor) -> Tensor:
        if directions is None:
            return jacobian.forward(jacobian.backward(vector.view(rows, columns))).reshape(-1)
        image = torch.zeros_like(vector)
        for direction in directions:
            image = image + jacobian.forward(jacobian.backward(torch.outer(vector, direction))) @ direction
        return image

    return Operator(rows * columns if directions is None else rows, multiply, jacobian.outputs.device, jacobian.dtype)


def projections(jacobian: Jacobian, *, num: int, seed: int) -> Float[Tensor, "k R C"]:
    """Products of the Jacobian with vectors of random signs: all three kernels are estimated from them.

    One product each; memory of `num` times the outputs. The vectors come from the seed, so that those of another step
    are the same, and no vector is kept.

    Args:
        num: At least 4, for there to be an error.
    """
    if num < FEWEST:
        raise ValueError(f"an estimate with an error needs at least {FEWEST} projections, not {num}")
    device = jacobian.outputs.device
    with full_precision(device):
        return torch.stack([jacobian.forward(_signs(jacobian.size, seed, i, jacobian)) for i in range(num)])


def known_part(
    operator: Operator, modes: Eigenpairs | None = None, *, further: Float[Tensor, "_ n"] | None = None
) -> Known:
    """The known part of a kernel: from modes, converged or not, without a product, and from further directions by one
    product each.

    The alignment of a full kernel with labels has the least noise with the labels as further directions, and again
    without their mean over the rows. A velocity has the least noise if both kernels are known in the same directions.
    """
    none = torch.zeros(0, operator.size, device=operator.device, dtype=operator.dtype)
    vectors, images = (none, none) if modes is None else (modes.vectors, modes.images())
    if further is None:
        return Known(vectors, images)
    with full_precision(operator.device):
        # Reflections complete a basis, orthonormal whatever comes: where a direction adds nothing what is left is
        # rounding.
        block = torch.linalg.qr(torch.cat([vectors, further.to(images)]).mT).Q[:, len(vectors) :].mT.contiguous()
        return Known(torch.cat([vectors, block]), torch.stack([*images, *map(operator.multiply, block)]))


def sketched_kernel(found: Float[Tensor, "k R C"], kernel: KernelName, *, known: Known | None = None) -> Kernel:
    """A kernel from projections.

    Args:
        known: Of this very kernel, found without a look at the projections.
    """
    rows, columns = found.shape[1:]
    directions = _directions(kernel, columns, found.dtype, found.device)
    rest = found.reshape(len(found), -1, 1) if directions is None else found @ directions.mT
    wide = working_dtype(found.device)
    if known is None:
        none = torch.zeros(0, rest.shape[1], device=found.device, dtype=wide)
        return Kernel(none, none[:, :0], rest, rows)
    along = known.directions.to(rest)
    basis, core = _of_known(known.directions.to(wide), known.images.to(wide))
    return Kernel(basis, core, rest - along.mT @ (along @ rest), rows)


def exact_modes(operator: Operator) -> Eigenpairs:
    """All eigenvalues and eigenvectors of a small kernel, largest first, by as many products as it has rows."""
    with full_precision(operator.device):
        return modes_of(dense(operator))


def modes_of(matrix: Float[Tensor, "n n"]) -> Eigenpairs:
    """All eigenvalues and eigenvectors of a kernel that is known, largest first.

    What is rounding beside the largest is 0.
    """
    with full_precision(matrix.device):
        values, vectors = eigenvectors(matrix.to(working_dtype(matrix.device)))
        floor = len(matrix) * torch.finfo(matrix.dtype).eps * values[-1]
        values = torch.where(values <= floor, 0.0, values).flip(0)
        vectors = vectors.mT.flip(0)
        return Eigenpairs(values, vectors, vectors[:, :0], vectors[:0], torch.zeros_like(values), values)


def exact_kernel(modes: Eigenpairs, num_rows: int) -> Kernel:
    """A kernel of which all modes are known."""
    nothing = modes.vectors.new_zeros(0, modes.vectors.shape[-1], 1)
    return Kernel(modes.vectors, modes.values.diag(), nothing, num_rows)


def spectrum_of_modes(modes: Eigenpairs) -> Spectrum:
    """Roots of all eigenvalues, as the statistics take it; `traces.spectral_estimate` gives that of a kernel with many
    rows.
    """
    values, weights = descending(modes.values.sqrt(), torch.ones_like(modes.values))
    return Spectrum(values, weights, (modes.vectors.shape[-1], modes.vectors.shape[-1]))


def sampled_outputs(outputs: Float[Tensor, "R C"], num: int, *, generator: torch.Generator) -> Float[Tensor, "R c"]:
    """Some of the columns, drawn without replacement, each times sqrt(C / num): the class-summed kernel and all traces
    keep their mean.

    For vocabularies. The full kernel of the columns drawn is another one, with fewer rows.

    Args:
        generator: On the device of the outputs.
    """
    columns = outputs.shape[-1]
    drawn = torch.randperm(columns, generator=generator, device=outputs.device)[:num]
    return outputs[:, drawn] * sqrt(columns / len(drawn))


def layer_kernels(
    jacobian: Jacobian, layout: Layout, kernel: KernelName, *, num_probes: int, seed: int, held: int = 2
) -> LayerKernels:
    """What the kernel of each parameter has in common with vectors of random signs, by one product with the transpose
    each.

    A kernel is the sum of those of the parameters. The layers of the class-summed kernel are those of the full one: the
    same traces.

    Args:
        num_probes: At least 4, for there to be an error.
        seed: Of the vectors, so that those of another step are the same.
        held: Gradients in memory at once. Every probe is paired with the `held - 1` before it, so that more tell more.
    """
    if num_probes < FEWEST or held < 2:
        raise ValueError(
            f"the layers' kernels need at least {FEWEST} probes and 2 stored gradients, not {num_probes} and {held}"
        )
    with full_precision(jacobian.outputs.device):
        device = jacobian.outputs.device
        products = torch.zeros(num_probes, num_probes, len(layout.names), dtype=working_dtype(device), device=device)
        window: deque[Tensor] = deque(maxlen=held)
        for i in range(num_probes):
            window.append(jacobian.backward(_output_signs(jacobian, kernel, seed, i)))
            for back, other in enumerate(reversed(window)):
                products[i, i - back] = products[i - back, i] = layout.sums(window[-1] * other).to(products)
    places = torch.arange(num_probes, device=products.device)
    apart = (places[:, None] - places).abs()
    return LayerKernels(products, (apart > 0) & (apart < held))


def _of_known(
    directions: Float[Tensor, "q n"], images: Float[Tensor, "q n"]
) -> tuple[Float[Tensor, "q2 n"], Float[Tensor, "q2 q2"]]:
    """What a kernel has within the directions, and between them and the rest of space, as a basis and a core."""
    within = directions @ images.mT
    outside = images - within @ directions
    unit = torch.eye(len(directions), dtype=within.dtype, device=within.device)
    core = torch.cat([torch.cat([(within + within.mT) / 2, unit], 1), torch.cat([unit, torch.zeros_like(unit)], 1)])
    return torch.cat([directions, outside]), core


def _directions(
    kernel: KernelName, columns: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "m C"] | None:
    """Whose kernels are all_reduce: combinations of the outputs; None where every output has rows of its own."""
    if kernel == "full":
        return None
    if kernel == "class_summed":
        return torch.eye(columns, dtype=dtype, device=device)
    return torch.full((1, columns), 1 / sqrt(columns), dtype=dtype, device=device)


def _output_signs(jacobian: Jacobian, kernel: KernelName, seed: int, place: int) -> Float[Tensor, "R C"]:
    rows, columns = jacobian.outputs.shape
    if kernel == "sum_of_logits":
        return _signs(rows, seed, place, jacobian)[:, None].expand(rows, columns) / sqrt(columns)
    return _signs(rows * columns, seed, place, jacobian).view(rows, columns)


def _signs(size: int, seed: int, place: int, jacobian: Jacobian) -> Float[Tensor, " size"]:
    """The vector of that place, the same whenever it is asked for."""
    device = jacobian.outputs.device
    # Spread over the 32 bits that a CPU generator reads, so that neighbouring seeds share no vector.
    scrambled = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03) % 2**64 >> 32
    generator = torch.Generator(device).manual_seed(scrambled)
    return torch.empty(size, dtype=jacobian.dtype, device=device).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
