"""The operators of a loss: what is asked for, on the graph of a step, the same on all processes.

Shape letters:  P entries of all parameters   n vectors
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.output_loss import ClosedForm, OutputLoss
from lightning_lowrank.maths.operators.operators import (
    Jacobian,
    Layout,
    Operator,
    fisher,
    gauss_newton,
    hessian,
    hessian_and_jacobian,
)
from lightning_lowrank.maths.spectra.spectrum import full_precision
from lightning_lowrank.monitors.curvature.stability import Threshold, threshold

OPERATORS = ("hessian", "gauss_newton", "empirical_fisher", "monte_carlo_fisher")


@dataclass(frozen=True)
class LossOperators:
    """A loss, as its operators show it.

    Attributes:
        loss: The loss itself.
        gradient: Of the loss.
        operators: By name.
        layout: Of the parameters.
        edge: Where the optimizer becomes unstable, None where that is not known.
        error: Why some operators are missing.
    """

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " P"]
    operators: Mapping[str, Operator]
    layout: Layout
    edge: Threshold | None
    error: Exception | None = None

    def products(self, vectors: Float[Tensor, "n P"]) -> dict[str, Float[Tensor, "n P"]]:
        """Of each operator with the same vectors.

        All operators take one vector after the other. The change of the outputs along it is then computed once, by the
        product with the Hessian.
        """
        names = [name for name in OPERATORS if name in self.operators]
        products = {name: torch.empty_like(vectors) for name in names}
        with full_precision(vectors.device):
            for i, vector in enumerate(vectors):
                for name in names:
                    products[name][i] = self.operators[name].multiply(vector)
        return products


def loss_operators(
    loss: Float[Tensor, ""],
    outputs: Callable[[], OutputLoss],
    named: Mapping[str, Tensor],
    asked: Sequence[str],
    *,
    optimizers: Sequence[Optimizer],
    team: Team,
    seed: int,
) -> LossOperators:
    """Operators on the graph of a loss, averaged over all processes. Has to be called by all of them.

    Args:
        loss: Of this process.
        outputs: Gives it as a function of the model's outputs; may raise a ValueError that says why not.
        named: Parameters by name.
        asked: Names of operators.
        seed: Of targets that are drawn.
    """
    params = list(named.values())
    found: dict[str, Operator] = {}
    error: Exception | None = None
    seen: OutputLoss | None = None
    gradient = torch.zeros(0)
    try:
        seen = outputs() if set(asked) - {"hessian"} else None
    except Exception as failed:  # the Hessian does without
        error = failed
    try:
        if seen is None:
            gradient, found["hessian"] = hessian(loss, params)
        else:
            gradient, found["hessian"], jacobian = hessian_and_jacobian(loss, params, seen.given, seen.as_rows)
            for name, operator in _of_outputs(seen, jacobian, asked, seed):
                found[name] = operator
    except Exception as failed:
        error = failed
    # What one process cannot do, none does: the others would wait for it.
    words = team.all_gather_object(sorted(found))
    together = set(words[0]).intersection(*words) & set(asked)
    if "hessian" not in set(words[0]).intersection(*words):
        raise error or RuntimeError("another process could not differentiate its loss twice")
    whole = {name: _everywhere(found[name], team) for name in asked if name in together}
    edge = threshold(optimizers[0], params) if len(optimizers) == 1 else None
    value, gradient = (team.all_reduce(part) / team.size for part in (loss.detach().to(gradient), gradient))
    return LossOperators(value, gradient, whole, Layout.of(named), edge, error)


def _of_outputs(
    outputs: OutputLoss, jacobian: Jacobian, asked: Sequence[str], seed: int
) -> Iterator[tuple[str, Operator]]:
    """Those that are known from how the loss depends on the outputs."""
    if "gauss_newton" in asked:
        yield "gauss_newton", gauss_newton(jacobian, outputs.hessian_product)
    fishers = [name for name in asked if name.endswith("_fisher")]
    if not fishers:
        return
    if not isinstance(outputs, ClosedForm):
        raise ValueError(
            f"{' and '.join(fishers)}: this needs a loss of torch, which tells the weight of each row and the "
            "probabilities of the targets; remove it from operators="
        )
    if "empirical_fisher" in fishers:
        yield "empirical_fisher", fisher(jacobian, outputs.row_gradients())
    if "monte_carlo_fisher" in fishers:
        generator = torch.Generator(outputs.outputs.device).manual_seed(seed)
        yield "monte_carlo_fisher", fisher(jacobian, outputs.sampled_gradients(generator))


def _everywhere(operator: Operator, team: Team) -> Operator:
    """The mean of an operator over all processes: what one process fails at is NaN in all of them, and none is waited
    for.
    """

    def multiply(vector: Tensor) -> Tensor:
        try:
            product = operator.multiply(vector)
        except Exception:  # the others would wait for this process
            product = torch.full_like(vector, torch.nan)
        return team.all_reduce(product) / team.size

    return operator if team.size == 1 else replace(operator, multiply=multiply)
