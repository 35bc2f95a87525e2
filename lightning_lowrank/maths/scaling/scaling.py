"""The value object that multifractal statistics are functions of: how the masses around nodes grow with the radius.

Shape letters:  B any batch axes   S nodes   R radii   Q orders
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ORDERS = tuple(i / 10 for i in range(-30, 31))

# A line through fewer points is no scaling law.
FEWEST_RADII = 5


@dataclass(frozen=True)
class Scaling:
    """Masses around the nodes of a batch of networks, and the exponents with which their moments grow.

    With shares `p_i(r) = N_i(r) / N_i(r_max)` the partition function is `Z_q(r) = sum_i p_i(r) ** q`, and `tau(q)` is
    the slope of `ln Z_q` over `ln r` by least squares. This is a sum over nodes, each of which has its own measure. So
    this `tau(q)` is `tau(q + 1)` of the literature on the sandbox method. `tau(0)` is 0, and the generalised dimension
    of order q + 1 is `tau(q) / q`.

    Attributes:
        masses: N_i(r): number of nodes, or weight, within the radius r of node i, including itself; radii ascending. 0
            if a node (or a box of a cover) is not included. NaN for a network that was not finite.
        fit: 1 at the radii that fits use, 0 at the others.
        log_radii: ln r. None for rank mode, which uses the logarithm of the mean mass at that radius instead.
        noise: Variance of ln N_i(r) among identical nodes; by default `1 / mean N`, the variance of counts.
        per_node: Whether shares are relative to each node's own mass at the largest radius, as published; otherwise to
            the mean.
        orders: Values of q at which vectors are evaluated, ascending.

    References:
        Xiao, Chen & Bogdan (2021), Scientific Reports 11:22964, for the sum over nodes; Chhabra & Jensen (1989),
        Physical Review Letters 62(12), equations 6 to 8, for derivatives as averages.
    """

    masses: Float[Tensor, "*B S R"]
    fit: Float[Tensor, "*B R"]
    log_radii: Float[Tensor, "*B R"] | None = None
    noise: Float[Tensor, "*B R"] | None = None
    per_node: bool = False
    orders: tuple[float, ...] = ORDERS

    def __getitem__(self, index: Any) -> "Scaling":
        """Some of the batch."""
        log_radii, noise = (None if row is None else row[index] for row in (self.log_radii, self.noise))
        return replace(self, masses=self.masses[index], fit=self.fit[index], log_radii=log_radii, noise=noise)

    @cached_property
    def lost(self) -> Bool[Tensor, "*B"]:
        """Which networks were not finite."""
        return self.masses[..., -1].isnan().any(-1)

    @cached_property
    def live(self) -> Bool[Tensor, "*B S R"]:
        """Which masses count."""
        return self.masses > 0

    @cached_property
    def counted(self) -> Bool[Tensor, "*B S"]:
        """Which nodes count, at any radius."""
        return self.live.any(-1)

    @cached_property
    def log_masses(self) -> Float[Tensor, "*B S R"]:
        """ln N_i(r); 0 where there is none."""
        return torch.where(self.live, self.masses, 1.0).log()

    @cached_property
    def log_shares(self) -> Float[Tensor, "*B S R"]:
        """ln p_i(r); 0 where there is none."""
        largest = self.log_masses[..., -1:] if self.per_node else self.mean_masses[..., None, -1:].log()
        return torch.where(self.live, self.log_masses - largest, 0.0)

    @cached_property
    def mean_masses(self) -> Float[Tensor, "*B R"]:
        """Mean of N_i(r) over the nodes."""
        return self.mean(torch.where(self.live, self.masses, 0.0))

    @cached_property
    def abscissa(self) -> Float[Tensor, "*B R"]:
        """The abscissa of fits: ln r, or the logarithm of the mean mass; 0 at radii that no fit uses."""
        x = self.mean_masses.log() if self.log_radii is None else self.log_radii
        return torch.where(self.fit > 0, x, 0.0)

    @cached_property
    def slope_weights(self) -> Float[Tensor, "*B R"]:
        """What a curve over the radii is multiplied by and summed to give its slope; NaN with fewer than five radii or
        two nodes.
        """
        count = self.fit.sum(-1, keepdim=True)
        centred = self.fit * (self.abscissa - (self.fit * self.abscissa).sum(-1, keepdim=True) / count)
        none = (count < FEWEST_RADII) | (self.counted.sum(-1, keepdim=True) < 2) | self.lost[..., None]
        return torch.where(none, torch.nan, centred / (centred * self.abscissa).sum(-1, keepdim=True))

    @cached_property
    def log_partition(self) -> Float[Tensor, "*B Q R"]:
        """ln Z_q(r)."""
        return self._moments[0]

    @cached_property
    def tau(self) -> Float[Tensor, "*B Q"]:
        """Mass exponents: slopes of ln Z_q."""
        return self.slope(self.log_partition)

    @cached_property
    def alpha(self) -> Float[Tensor, "*B Q"]:
        """The derivative of tau, exactly: slopes of the mean of ln p under weights p ** q / Z_q."""
        return self.slope(self._moments[1])

    @cached_property
    def f(self) -> Float[Tensor, "*B Q"]:
        """The spectrum f(alpha) = q alpha - tau, at most 0: by how much fewer nodes there are of that exponent, as a
        dimension.
        """
        return self.masses.new_tensor(self.orders) * self.alpha - self.tau

    @cached_property
    def dimensions(self) -> Float[Tensor, "*B Q"]:
        """Generalised dimensions D of the orders q + 1: tau(q) / q, and alpha at q = 0."""
        q = self.masses.new_tensor(self.orders)
        return torch.where(q == 0, self.alpha, self.tau / torch.where(q == 0, 1.0, q))

    @cached_property
    def node_dimensions(self) -> Float[Tensor, "*B S"]:
        """Local dimension of each node, the slope of ln N_i; NaN for a node without mass at a radius of the fit."""
        whole = (self.live | (self.fit == 0)[..., None, :]).all(-1)
        return torch.where(whole & self.counted, self.slope(self.log_masses), torch.nan)

    @cached_property
    def valid(self) -> Bool[Tensor, "*B"]:
        """There are enough radii, and tau is concave: otherwise there is no spectrum."""
        steps = self.alpha[..., 1:] - self.alpha[..., :-1]
        return (steps <= 1e-9 * (1 + self.alpha[..., 1:].abs())).all(-1)

    def only_valid(self, numbers: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """NaN if there is no spectrum."""
        return torch.where(self.valid, numbers, torch.nan)

    def slope(self, curves: Float[Tensor, "*C R"]) -> Float[Tensor, "*C"]:
        """Slopes over the radii, by least squares; between batch axes and radii there may be one axis more."""
        return self._over_radii(self.slope_weights, curves)

    def mean_over_radii(self, curves: Float[Tensor, "*C R"]) -> Float[Tensor, "*C"]:
        """Means over the radii that fits use; NaN if there are no fits."""
        return self._over_radii(
            torch.where(self.slope_weights.isnan(), torch.nan, self.fit / self.fit.sum(-1, keepdim=True)), curves
        )

    def determination(self, curves: Float[Tensor, "*B Q R"]) -> Float[Tensor, "*B Q"]:
        """R squared of the lines that `slope` fits."""
        x = (self.abscissa - self.mean_over_radii(self.abscissa)[..., None]).square()
        y = (curves - self.mean_over_radii(curves)[..., None]).square()
        return self.slope(curves).square() * self.mean_over_radii(x)[..., None] / self.mean_over_radii(y)

    def _over_radii(self, weights: Float[Tensor, "*B R"], curves: Float[Tensor, "*C R"]) -> Float[Tensor, "*C"]:
        weights = weights if curves.ndim == weights.ndim else weights[..., None, :]
        # What no fit reads may be infinite.
        return (weights * torch.where(weights == 0, 0.0, curves)).sum(-1)

    def mean(self, numbers: Float[Tensor, "*B S R"]) -> Float[Tensor, "*B R"]:
        """Mean over the included nodes."""
        return numbers.sum(-2) / self.live.sum(-2)

    def variance(self, logs: Float[Tensor, "*B S R"]) -> Float[Tensor, "*B R"]:
        """Unbiased variance over the included nodes."""
        deviations = torch.where(self.live, logs - self.mean(logs)[..., None, :], 0.0)
        return deviations.square().sum(-2) / (self.live.sum(-2) - 1)

    def tau_at(self, q: float) -> Float[Tensor, "*B"]:
        """tau at one order, in the grid or not."""
        return self.slope(self._moments_at((q,))[0])[..., 0]

    def alpha_at(self, q: float) -> Float[Tensor, "*B"]:
        """alpha at one order."""
        return self.slope(self._moments_at((q,))[1])[..., 0]

    @cached_property
    def c2(self) -> Float[Tensor, "*B"]:
        """Second cumulant, the slope of the variance of ln p over nodes: tau is about `alpha0 q + c2 q ** 2 / 2`."""
        return self.slope(self.variance(self.log_shares))

    @cached_property
    def noise_variances(self) -> Float[Tensor, "*B R"]:
        """Variance of ln N among nodes that are all alike."""
        return 1 / self.mean_masses if self.noise is None else self.noise

    @cached_property
    def c2_floor(self) -> Float[Tensor, "*B"]:
        """What `c2` would be, were all nodes alike."""
        return self.slope(self.noise_variances)

    @cached_property
    def _moments(self) -> tuple[Float[Tensor, "*B Q R"], Float[Tensor, "*B Q R"]]:
        return self._moments_at(self.orders)

    def _moments_at(self, orders: tuple[float, ...]) -> tuple[Float[Tensor, "*B Q R"], Float[Tensor, "*B Q R"]]:
        """ln Z_q, and the mean of ln p under the weights p ** q, at each order."""
        centre = self.mean(self.log_shares)[..., None, :]
        logs = torch.where(self.live, self.log_shares - centre, 0.0)
        powers, step, last = self.live.to(logs), math.nan, 0.0
        sums, products = [], []
        for q in orders:
            # On an even grid a product does for an exponential; after sixty of them 14 digits are left.
            if not math.isclose(q - last, step, rel_tol=1e-9):
                step = q - last
                factors = (step * logs).exp()
            powers, last = powers * factors, q
            sums.append(powers.sum(-2))
            products.append((powers * logs).sum(-2))
        total = torch.stack(sums, -2)
        return total.log() + logs.new_tensor(orders)[:, None] * centre, torch.stack(products, -2) / total + centre
