"""How far classes are apart, from sums over their examples.

Shape letters:  C classes   N features
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_lowrank.maths.spectra.spectrum import eigenvectors, full_precision, perplexity, ratio, svd

# Eigenvalues of the covariance of class means below this share of the largest are rounding.
ROUNDING = 1e-12
# What is added to the within-class covariance, in parts of its mean variance.
RIDGE = 1e-4


@dataclass(frozen=True)
class ClassSums:
    """Sums over examples; they add up over batches and processes.

    Attributes:
        gram: Sum of outer products of all examples.
        sums: Sum of the examples of each class.
        counts: How many examples each class has.
    """

    gram: Float[Tensor, "N N"]
    sums: Float[Tensor, "C N"]
    counts: Float[Tensor, " C"]

    @property
    def seen(self) -> Bool[Tensor, " C"]:
        """Classes with an example."""
        return self.counts > 0

    @property
    def num_classes(self) -> Float[Tensor, ""]:
        """How many classes there are examples of."""
        return self.seen.to(self.sums).sum()

    @property
    def enough(self) -> Bool[Tensor, ""]:
        """Whether there are two classes, and one of them has two examples."""
        return (self.num_classes > 1) & (self.counts.amax() > 1)

    @property
    def centred_means(self) -> Float[Tensor, "C N"]:
        """Class means less their own mean, 0 for classes without an example."""
        means = ratio(self.sums, self.counts[:, None])
        return torch.where(self.seen[:, None], means - means.sum(0) / self.num_classes, 0.0)

    @property
    def within(self) -> Float[Tensor, "N N"]:
        """Covariance of examples about the mean of their class."""
        scaled = ratio(self.sums, self.counts[:, None].sqrt())
        return ratio(self.gram - scaled.mT @ scaled, self.counts.sum())


def variability_collapse(classes: ClassSums) -> Float[Tensor, ""]:
    """NC1: `tr(W pinv(B)) / C` of the covariances within classes (W) and of class means (B).

    Returns:
        At least 0, which is complete collapse; NaN with fewer than two classes, or without a class of two examples.

    References:
        Papyan, Han & Donoho (2020), PNAS 117(40), NC1, as in their Figure 6.
    """
    with full_precision(classes.gram.device):
        means = classes.centred_means
        values, vectors = eigenvectors(means.mT @ means / classes.num_classes)
        spread = (vectors * (classes.within @ vectors)).sum(-2).clamp(min=0)
        kept = values > ROUNDING * values.amax()
        found = torch.where(kept, spread / torch.where(kept, values, 1.0), 0.0).sum() / classes.num_classes
        return torch.where(classes.enough & means.isfinite().all(), found, torch.nan)


def norm_variation(classes: ClassSums) -> Float[Tensor, ""]:
    """NC2, equal norms: standard deviation over mean of the norms of the centred class means.

    Returns:
        At least 0, where all are as long; 0 also where all means are equal, NaN with fewer than two classes.
    """
    norms = torch.linalg.vector_norm(classes.centred_means, dim=-1)
    mean = norms.sum() / classes.num_classes
    spread = (torch.where(classes.seen, norms - mean, 0.0).square().sum() / classes.num_classes).sqrt()
    return torch.where(classes.num_classes > 1, ratio(spread, mean), torch.nan)


def angle_deviation(classes: ClassSums) -> Float[Tensor, ""]:
    """NC2, largest angles: mean over pairs of centred class means of `|cosine + 1 / (C - 1)|`.

    Returns:
        From 0, a simplex, to 1 + 1 / (C - 1); always 0 for two classes, NaN with fewer.
    """
    units = torch.nn.functional.normalize(classes.centred_means, dim=-1)
    pairs = classes.seen[:, None] & classes.seen & ~torch.eye(len(units), dtype=torch.bool, device=units.device)
    off = (units @ units.mT + 1 / (classes.num_classes - 1)).abs()
    mean = torch.where(pairs, off, 0.0).sum() / pairs.sum()
    return torch.where(classes.num_classes > 1, mean, torch.nan)


def self_duality(classes: ClassSums, weight: Float[Tensor, "C N"]) -> Float[Tensor, ""]:
    """NC3: squared distance between the classifier's weight and the centred class means, both at unit norm.

    Returns:
        Between 0 and 4; 2 where they have nothing to do with each other. NaN with fewer than two classes.
    """
    means, own = classes.centred_means, torch.where(classes.seen[:, None], weight, 0.0)
    both = (ratio(part, torch.linalg.matrix_norm(part)) for part in (means, own))
    one, other = both
    return torch.where(classes.num_classes > 1, (one - other).square().sum(), torch.nan)


def lidar(classes: ClassSums) -> Float[Tensor, ""]:
    """LiDAR: effective rank of the covariance of class means where that within classes is the identity.

    The published ridge of 1e-4 is taken in parts of the mean variance within classes, so that scale does not matter.

    Returns:
        From 1 to `min(C - 1, N)`: how many directions tell the classes apart; NaN as `variability_collapse`.

    References:
        Thilak et al. (2024), LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures, ICLR,
        Section 4; classes are in the place of their surrogate classes.
    """
    with full_precision(classes.gram.device):
        within, means = classes.within, classes.centred_means
        ridge = RIDGE * within.diagonal().mean().clamp(min=torch.finfo(within.dtype).tiny)
        values, vectors = eigenvectors(within)
        white = (means @ vectors) * (values.clamp(min=0) + ridge).rsqrt()
        spectrum = svd(white)
        found = perplexity(spectrum.unit_energies, spectrum.weights)
        return torch.where(classes.enough, found, torch.nan)
