"""What is read from kernels: sizes, ranks, what they share with labels and with each other, and how fast their modes
are learnt.

Sums over pairs of different projections are without bias, where the same sums over a kernel made of the projections are
not: its squared norm is too large by tr(K)^2 / k, which for a kernel of rank 40 and 16 projections is several times the
truth.

Shape letters:  R rows of the model's outputs   C columns of them   L parameters   k projections   n size of a kernel
s modes
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.operators.eigenspaces import Eigenpairs
from lightning_lowrank.maths.operators.estimates import Estimate, student
from lightning_lowrank.maths.spectra.spectrum import Spectrum, descending, eigenvalues, pooled, ratio, working_dtype
from lightning_lowrank.monitors.tangent_kernel.kernels import Kernel, LayerKernels
from lightning_lowrank.statistics.registry import Statistic

# Columns of all projections together, beyond which ranks are of sums of them: matrices of so many are decomposed.
WIDEST = 256


def trace(kernel: Kernel) -> Estimate:
    """Sum of the eigenvalues."""
    return jackknife(_means(_traces(kernel)))


def squared_norm(kernel: Kernel) -> Estimate:
    """Sum of the squared eigenvalues."""
    return jackknife(_inner(kernel, kernel))


def participation_ratio(kernel: Kernel) -> Estimate:
    """Square of the sum of the eigenvalues over the sum of their squares: as many equal ones would be as spread out.

    References:
        The estimate of the square: Hoeffding (1948), Annals of Mathematical Statistics 19(3).
    """
    traces = _traces(kernel)
    squares = _pair_means(traces[:, None] * traces, _others(kernel)) if len(kernel.rest) else traces.square()
    return jackknife(ratio(squares, _inner(kernel, kernel)))


def rank(statistic: Statistic, kernel: Kernel, modes: Eigenpairs) -> Estimate:
    """A rank of the roots of all eigenvalues: those of the known modes, and of what projections tell of the rest.

    What the modes, not quite exact, have in common with the rest is left out. Chance spreads eigenvalues apart, in the
    first order by what the jackknife takes back. In the error are also what halves of the projections would have said
    otherwise, what the modes' residuals would change, and one step of a statistic that counts.

    Args:
        modes: All that are known.
    """
    count, size = kernel.rest.shape[:2]
    rest = _narrow(kernel.rest).to(modes.values)
    if size > count * rest.shape[2]:
        flat = rest.transpose(0, 1).flatten(1)
        taken = _taken(count, flat).repeat_interleave(rest.shape[2], 1)
        matrices = taken[:, :, None] * taken[:, None] * (flat.mT @ flat)
    else:
        matrices = torch.einsum("jk,kab->jab", _taken(count, rest).square(), rest @ rest.mT)
    squares = eigenvalues(matrices)
    squares = torch.cat([squares, squares[:1]])
    known = modes.values.clamp(min=0).repeat(len(squares), 1)
    known[-1] += modes.residuals
    roots = torch.cat([known, squares.clamp(min=0)], -1).sqrt()
    values, weights = descending(roots, torch.ones_like(roots))
    spectrum = Spectrum(values, weights, (size, size))
    found = statistic(spectrum)
    corrected = jackknife(found[: count + 1])
    beyond = (found[count + 1 : -1].mean() - found[0]).abs() + (found[-1] - found[0]).abs()
    beyond = beyond + statistic.step((size, size))
    return replace(corrected, error=corrected.error + beyond)


def alignment(kernel: Kernel, targets: Float[Tensor, "R C"], *, centred: bool = False) -> Estimate:
    """Cosine between a kernel and that of the labels, Y Y^T: 1 where the kernel knows the labels and nothing else.

    NaN where one of them is 0, as it is of a single row without its mean.

    Args:
        targets: One-hot labels, values to fit, or what is left to fit.
        centred: Subtract the mean over rows from both first, as centred kernel alignment does.

    References:
        Cristianini et al. (2001), NeurIPS; centred: Cortes, Mohri & Rostamizadeh (2012), JMLR 13, Definition 4.
    """
    labels = _of_labels(kernel, targets)
    if centred:
        kernel, labels = _centred(kernel), _centred(labels)
    return jackknife(_cosine(kernel, labels))


def velocity(now: Kernel, before: Kernel) -> Estimate:
    """One minus the cosine between a kernel and an earlier one of the same examples: 0 while training is lazy, whatever
    the scale does.

    It has the least noise with the same seed, and with the same known directions or none. If the directions differ, the
    noise of the two kernels does not cancel. This is worse than no known directions if the kernel has turned little.
    Chance may put it below 0. NaN if a kernel is 0.

    References:
        Fort et al. (2020), NeurIPS, equation 6.
    """
    return jackknife(1 - _cosine(now, before))


def relative_change(now: Kernel, before: Kernel) -> Estimate:
    """Squared Frobenius norm of the difference over that of the earlier kernel: 0 while training is lazy, scale
    included.
    """
    squares, earlier = _inner(now, now), _inner(before, before)
    return jackknife(ratio(squares - 2 * _inner(now, before) + earlier, earlier))


def layer_traces(layers: LayerKernels) -> Estimate:
    """Trace of the kernel of each parameter: how much of the kernel it carries."""
    return jackknife(_means(_diagonal(layers)))


def layer_shares(layers: LayerKernels) -> Estimate:
    """Part of the kernel's trace that each parameter carries; they sum to 1."""
    traces = _means(_diagonal(layers))
    return jackknife(ratio(traces, traces.sum(-1, keepdim=True)))


def layer_velocities(now: LayerKernels, before: LayerKernels) -> Estimate:
    """`velocity` of the kernel of each parameter, from the same vectors; 1 for one that has no kernel."""
    across, ours, theirs = (
        _pair_means(a.products * b.products, now.pairs) for a, b in ((now, before), (now, now), (before, before))
    )
    return jackknife(1 - ratio(across, (ours * theirs).sqrt()))


def condition(modes: Eigenpairs) -> Float[Tensor, ""]:
    """Largest over smallest of the modes' eigenvalues; infinite where the smallest is 0."""
    return modes.values.amax() / modes.values.amin().clamp(min=0)


def label_energies(modes: Eigenpairs, targets: Float[Tensor, "R C"], top_k: int) -> tuple[Estimate, Estimate]:
    """Share of the squared norm of the labels within each of the top modes, and in all of them together.

    The errors are usually bounds. They have two parts: the change by the last third of the products, and the possible
    exchange of a mode with its neighbours. The exchange is the largest of their energies times the error of its
    eigenvalue over the gap.

    Args:
        modes: One more than the top modes, if there are as many.
    """
    energies = _energies(modes.vectors, targets)
    change = torch.zeros_like(energies) if modes.earlier is None else energies - _energies(modes.earlier, targets)
    values, beside = (torch.cat([row[:1], row, row.new_zeros(1)]) for row in (modes.values, energies))
    gaps = values[:-1] - values[1:]
    gaps[:1] = torch.inf
    nearest = torch.minimum(gaps[:-1], gaps[1:]).clamp(min=torch.finfo(values.dtype).tiny)
    mixed = (modes.errors / nearest).clamp(max=1).to(energies) * beside.unfold(0, 3, 1).amax(-1)
    top, change, mixed = energies[:top_k], change[:top_k], mixed[:top_k]
    return Estimate(top, change.abs() + mixed), Estimate(top.sum(), change.sum().abs() + mixed.amax())


def time_constants(modes: Eigenpairs, rate: float | Float[Tensor, ""]) -> Float[Tensor, " s"]:
    """Number of steps in which the remaining error of a mode falls by a factor of e, if the kernel stays as it is.
    Infinite for a mode that is never learnt.

    Args:
        rate: Learning rate times the second derivative of the loss with respect to an output. That is 2 / (R C) for
            torch's mean squared error, and 1 for modes of the Gauss-Newton matrix, which includes the loss.
    """
    return 1 / (rate * modes.values.clamp(min=0))


def decayed(modes: Eigenpairs, left: Float[Tensor, "R C"], time: float | Float[Tensor, ""]) -> Float[Tensor, "R C"]:
    """Outputs minus targets after a while of gradient flow, were the kernel to stay as it is: exp(-K time) left.

    What is outside of the modes stays.

    Args:
        time: Sum over the steps of the `rate` that `time_constants` takes.

    References:
        Lee et al. (2019), NeurIPS, equation 9.
    """
    columns = left.reshape(modes.vectors.shape[-1], -1).to(modes.vectors)
    shrunk = torch.expm1(-modes.values * time)[:, None].to(columns) * (modes.vectors @ columns)
    return (columns + modes.vectors.mT @ shrunk).view(left.shape).to(left)


def num_learnt(spectrum: Spectrum, time: float | Float[Tensor, ""]) -> Float[Tensor, "*B"]:
    """Number of modes whose time constant is over, of the roots of a kernel's eigenvalues.

    Args:
        time: As in `decayed`.
    """
    spectrum = pooled(spectrum)
    eigenvalues = spectrum.values.square()
    return (spectrum.weights * torch.where(eigenvalues.isnan(), torch.nan, eigenvalues * time >= 1)).sum(-1)


def learnt_energy(
    modes: Eigenpairs, targets: Float[Tensor, "R C"], time: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Part of the squared length of the labels within the modes whose time constant is over.

    Args:
        time: As in `decayed`.
    """
    return (_energies(modes.vectors, targets) * (modes.values * time >= 1)).sum()


def jackknife(replicates: Float[Tensor, "k1 *B"]) -> Estimate:
    """An estimate from its values with all projections, first, and with all but each one: no error where there are
    none.

    The error is that of the jackknife, widened as `student` says: from few projections it is itself uncertain.

    References:
        Efron & Stein (1981), Annals of Statistics 9(3), equations 1.2 and 1.3; of U-statistics: Arvesen (1969), Annals
        of Mathematical Statistics 40(6).
    """
    value, left_out, others = replicates[0], replicates[1:], len(replicates) - 2
    if others < 0:
        return Estimate(value, torch.zeros_like(value))
    spread = (left_out - left_out.mean(0)).square().mean(0)
    return Estimate(value - others * (left_out.mean(0) - value), student(others + 1) * (others * spread).sqrt())


def blurred(found: Estimate, rounding: float) -> Estimate:
    """A velocity whose error includes the possible effect of rounding in the outputs.

    This is a quarter of the rounding unit. In half precision, activations near a kink change sides as soon as the
    weights move. Kernels that differ by less than 1e-4 then seem to differ by up to 0.003.
    """
    return replace(found, error=found.error + rounding / 4)


def _energies(vectors: Float[Tensor, "s n"], targets: Float[Tensor, "R C"]) -> Float[Tensor, " s"]:
    along = vectors @ targets.reshape(vectors.shape[-1], -1).to(vectors)
    return ratio(along.square().sum(-1), targets.to(along).square().sum())


def _means(samples: Float[Tensor, "k *B"]) -> Float[Tensor, "k1 *B"]:
    """Mean of all samples, first, and of all but each one."""
    if len(samples) == 1:
        return samples
    total = samples.sum(0)
    return torch.cat([total[None] / len(samples), (total - samples) / (len(samples) - 1)])


def _pair_means(samples: Float[Tensor, "k k *B"], pairs: Bool[Tensor, "k k"]) -> Float[Tensor, "k1 *B"]:
    """Mean over those pairs, first, and over those of all but each one."""
    taken = pairs.view(*pairs.shape, *[1] * (samples.ndim - 2)).to(samples)
    totals = [torch.cat([x.sum((0, 1))[None], x.sum((0, 1)) - x.sum(0) - x.sum(1)]) for x in (samples * taken, taken)]
    return totals[0] / totals[1]


def _narrow(rest: Float[Tensor, "k n m"]) -> Float[Tensor, "k n m2"]:
    """With fewer columns where they would make large matrices: sums of theirs with random signs, of the same mean."""
    count, size, columns = rest.shape
    fewer = max(1, WIDEST // count)
    if columns <= fewer or size <= WIDEST:
        return rest
    draw = torch.Generator(rest.device).manual_seed(0)
    signs = torch.randint(0, 2, (columns, fewer), generator=draw, device=rest.device).to(rest) * 2 - 1
    sums: Tensor = rest @ signs / fewer**0.5
    return sums


def _taken(count: int, like: Tensor) -> Float[Tensor, "k3 k"]:
    """Which projections are taken, over the root of their number: all, all but each one, and both halves."""
    places = torch.arange(count, device=like.device)
    halves = torch.stack([places < count // 2, places >= count // 2])
    taken = torch.cat([torch.ones_like(halves[:1]), places[:, None] != places, halves]).to(like)
    return taken / taken.sum(1, keepdim=True).sqrt()


def _others(kernel: Kernel) -> Bool[Tensor, "k k"]:
    return ~torch.eye(len(kernel.rest), dtype=torch.bool, device=kernel.rest.device)


def _traces(kernel: Kernel) -> Float[Tensor, " samples"]:
    """One estimate per projection; a single one where all is known."""
    known = (kernel.core @ kernel.basis * kernel.basis).sum()
    return known + kernel.rest.square().sum((1, 2)).to(known) if len(kernel.rest) else known[None]


def _cosine(one: Kernel, other: Kernel) -> Float[Tensor, " k1"]:
    """NaN where one of them is 0, and points nowhere."""
    norms = _inner(one, one).clamp(min=0) * _inner(other, other).clamp(min=0)
    return torch.where(norms == 0, torch.nan, _inner(one, other) / norms.sqrt())


def _inner(one: Kernel, other: Kernel) -> Float[Tensor, " k1"]:
    """Sum of products of all entries of two kernels, estimated from all projections and from all but each one."""
    common = one.basis.to(working_dtype(one.basis.device)) @ other.basis.mT.to(working_dtype(one.basis.device))
    total = (one.core.to(common) @ common @ other.core.to(common) * common).sum()[None]
    for known, sketched in ((one, other), (other, one)):
        if len(sketched.rest):
            along = known.basis.to(sketched.rest) @ sketched.rest
            total = total + _means((known.core.to(along) @ along * along).sum((1, 2)).to(common))
    if len(one.rest) and len(other.rest):
        total = total + _pair_means(_overlaps(one.rest, other.rest).to(common), _others(one))
    return total


def _overlaps(one: Float[Tensor, "k n m"], other: Float[Tensor, "k n m"]) -> Float[Tensor, "k k"]:
    """Inner products of the kernels of single projections, in no more memory than the projections have."""
    if one.shape[2] == 1:
        return (one[..., 0] @ other[..., 0].mT).square()
    if one.shape[2] > one.shape[1]:
        grams = (one @ one.mT).flatten(1), (other @ other.mT).flatten(1)
        return grams[0] @ grams[1].mT
    return torch.stack([(projection.mT @ other).square().sum((1, 2)) for projection in one])


def _centred(kernel: Kernel) -> Kernel:
    """Without the mean over the rows of the model's outputs, for each of their columns that the kernel keeps apart."""
    rows = kernel.num_rows
    basis = kernel.basis.unflatten(1, (rows, kernel.basis.shape[1] // rows))
    rest = kernel.rest.unflatten(1, (rows, kernel.rest.shape[1] // rows))
    basis, rest = (x - x.mean(1, keepdim=True) for x in (basis, rest))
    return replace(kernel, basis=basis.flatten(1, 2), rest=rest.flatten(1, 2))


def _of_labels(kernel: Kernel, targets: Float[Tensor, "R C"]) -> Kernel:
    """Y Y^T, known."""
    basis = targets.reshape(kernel.rest.shape[1], -1).mT.to(kernel.basis)
    return Kernel(
        basis, torch.eye(len(basis), dtype=basis.dtype, device=basis.device), kernel.rest[:0], kernel.num_rows
    )


def _diagonal(layers: LayerKernels) -> Float[Tensor, "k L"]:
    return layers.products.diagonal().mT
