"""Count the directions in which a small network can move and still compute the same, as it gets wider.

    python examples/flat_directions.py --output flat_directions.png

The embedding principle (Zhang et al. 2021, arXiv 2105.14573; 2022, arXiv 2111.15527): a wide network contains every
narrow one, with the same outputs, by splitting neurons; and there all that it has more in parameters is flat. A teacher
of two neurons is widened by splitting, and learnt by networks of 2 to 32 from random starts; of each the Gauss-Newton
matrix has its zero eigenvalues counted in float64, and told apart by what makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich
import torch
from jaxtyping import Float
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_lowrank.maths.operators.flat_directions import FlatDirections, flat_directions

TEACHER = 2
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.ReLU)
# Of the usual random weights: from a small start neurons of tanh gather in few directions.
START = {nn.Tanh: 0.1, nn.ReLU: 1.0}
# Random starts, of which the one that ends lowest is taken.
STARTS = 3
# Singular values of the Jacobian below this part of the largest count as 0, and where the next is not this times
# larger, it is said.
TOLERANCE, CLEAR = 1e-6, 100.0
CAUSES = ("duplicates", "scale", "rest")


@dataclass(frozen=True)
class Counted:
    """A network and its flat directions.

    Attributes:
        origin: "split", from the teacher, or "trained".
        net: Of one hidden layer.
        loss: Mean squared error.
        flat: How many, and why.
        predicted: What the principle says of a network of this width whose neurons are all copies of the teacher's.
    """

    origin: str
    net: nn.Sequential
    loss: float
    flat: FlatDirections
    predicted: int

    @property
    def width(self) -> int:
        """Of its hidden layer."""
        return len(self.net.get_parameter("0.weight"))

    @property
    def clear(self) -> bool:
        """Whether there is a gap between what counts as 0 and what does not."""
        return self.flat.gap.item() > CLEAR


def network(width: int, activation: type[nn.Module]) -> nn.Sequential:
    """From two numbers to one."""
    return nn.Sequential(nn.Linear(2, width), activation(), nn.Linear(width, 1)).double()


def size(net: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in net.parameters())


def teacher(activation: type[nn.Module]) -> nn.Sequential:
    """What is learnt."""
    net = network(TEACHER, activation)
    weights = [[[1.5, 0.5], [-0.5, 1.2]], [0.3, -0.4], [[1.0, -1.5]], [0.2]]
    for p, weight in zip(net.parameters(), weights, strict=True):
        p.data = torch.tensor(weight, dtype=torch.float64)
    return net


def learnt(
    activation: type[nn.Module], width: int, seed: int, inputs: Tensor, targets: Tensor, steps: int
) -> tuple[float, nn.Sequential]:
    """Loss and network, by the method of Levenberg and Marquardt, which goes on to rounding errors where there is an
    exact fit.
    """
    torch.manual_seed(seed)
    net = network(width, activation)
    vector, damping = START[activation] * nn.utils.parameters_to_vector(net.parameters()).detach(), 1e-2
    errors = residuals(net, inputs, targets)
    error = errors(vector)
    for _ in range(steps):
        left, values, right = torch.linalg.svd(jacrev(errors)(vector), full_matrices=False)
        for _ in range(12):
            there = vector - right.mT @ (values / (values.square() + damping * values[0].square()) * (left.mT @ error))
            if errors(there).square().sum() < error.square().sum():
                vector, error, damping = there, errors(there), max(damping / 3, 1e-14)
                break
            damping *= 4
        else:
            break
    nn.utils.vector_to_parameters(vector, net.parameters())
    return error.square().mean().item(), net


def residuals(net: nn.Sequential, inputs: Tensor, targets: Tensor) -> Callable[[Float[Tensor, " P"]], Tensor]:
    """Vector of all parameters -> errors."""
    named = dict(net.named_parameters())

    def errors(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        weights = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        return (functional_call(net, weights, (inputs,)) - targets).flatten()

    return errors


def widened(net: nn.Sequential, width: int) -> nn.Sequential:
    """The same function by more neurons: each is split into as many, which share what it gave."""
    weights, wider = net.state_dict(), network(width, type(net[1]))
    copies = torch.arange(width) % len(weights["0.weight"])
    split = {name: weights[name][copies] for name in ("0.weight", "0.bias")}
    wider.load_state_dict(weights | split | {"2.weight": weights["2.weight"][:, copies] / copies.bincount()[copies]})
    return wider


def counted(activation: type[nn.Module], widths: list[int], steps: int) -> list[Counted]:
    """The teacher, widened, and what learnt from it."""
    inputs, narrow = (
        torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        teacher(activation),
    )
    targets, found = narrow(inputs).detach(), []
    least = int(flat_directions(narrow, inputs, tolerance=TOLERANCE).total)
    for width in widths:
        loss, net = min(
            (learnt(activation, width, seed, inputs, targets, steps) for seed in range(STARTS)),
            key=lambda pair: pair[0],
        )
        predicted = least + size(net) - size(narrow)
        for origin, one, of in (("split", widened(narrow, width), 0.0), ("trained", net, loss)):
            found.append(Counted(origin, one, of, flat_directions(one, inputs, tolerance=TOLERANCE), predicted))
    return found


def table(found: list[Counted]) -> Table:
    """What was counted."""
    made = Table(title="Zero eigenvalues of the Gauss-Newton matrix")
    for heading in ("activation", "width", "network", "parameters", "loss", "predicted", "flat", *CAUSES, "gap"):
        made.add_column(heading, justify="left" if heading in ("activation", "network") else "right", overflow="fold")
    for one in found:
        causes = [str(int(getattr(one.flat, cause))) for cause in CAUSES]
        sizes = [str(size(one.net)), f"{one.loss:.0e}", str(one.predicted), str(int(one.flat.total))]
        made.add_row(
            type(one.net[1]).__name__, str(one.width), one.origin, *sizes, *causes, f"{one.flat.gap.item():.0e}"
        )
    return made


def draw(found: list[Counted], output: Path) -> None:
    """Flat directions by width, a panel per activation."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(ACTIVATIONS), figsize=(4.8 * len(ACTIVATIONS), 3.4))
    for panel, activation in zip(panels, ACTIVATIONS, strict=True):
        own = [one for one in found if isinstance(one.net[1], activation)]
        split, trained = ([one for one in own if one.origin == origin] for origin in ("split", "trained"))
        places, floor = range(len(trained)), [0] * len(trained)
        for cause, color in zip(CAUSES, ("C0", "C1", "C7"), strict=True):
            heights = [int(getattr(one.flat, cause)) for one in trained]
            panel.bar(places, heights, 0.6, bottom=floor, color=color, label=f"trained: {cause}")
            floor = [below + height for below, height in zip(floor, heights, strict=True)]
        panel.plot(places, [one.predicted for one in split], "k--", linewidth=1, label="predicted")
        panel.plot(places, [int(one.flat.total) for one in split], "kx", label="split")
        labels = [str(one.width) + ("" if one.clear else "\nno gap") for one in trained]
        panel.set_xticks(places, labels)
        panel.set(title=activation.__name__, xlabel="neurons")
        panel.grid(alpha=0.3, axis="y")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("flat directions")
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def main(output: Path = Path("flat_directions.png"), widest: int = 32, steps: int = 300) -> None:
    """Train and widen networks, count their flat directions, and draw them.

    Args:
        output: Image to write.
        widest: Widths are doubled from two up to this.
        steps: Of the fit, at most.
    """
    torch.set_num_threads(1)
    widths = [width for width in (2, 4, 8, 16, 32) if width <= widest]
    found = [one for activation in ACTIVATIONS for one in counted(activation, widths, steps)]
    rich.print(table(found))
    draw(found, output)
    print(f"The counts are in {output}")


if __name__ == "__main__":
    auto_cli(main)
