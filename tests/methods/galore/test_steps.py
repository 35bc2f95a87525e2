"""Steps in low rank are those of GaLore written out by hand, in plain torch, for every option."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import GaLore, watching
from tests.trainings import digits

MATCHED = ("0.weight", "2.weight", "4.weight")
EVERY, STEPS, SCALE, RATE = 4, 14, 0.5, 0.02
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=0.1),
    "maximised": lambda p: torch.optim.SGD(p, lr=RATE, weight_decay=0.1, maximize=True),
}


def network() -> nn.Sequential:
    """A wide matrix, a tall one, and a wide one, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 10)).double()


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    images, labels = digits(8 * 8).tensors
    return [(images[8 * (i % 8) :][:8].double(), labels[8 * (i % 8) :][:8]) for i in range(count)]


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, galore: GaLore, count: int = STEPS) -> dict[str, Tensor]:
    """Weights after a plain loop."""
    with watching(net, optimizer, galore) as watch:
        for images, labels in batches(count):
            with watch.batch():
                cross_entropy(net(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


class Moments:
    """Adam and SGD with momentum, as in their papers."""

    def __init__(self, kind: str) -> None:
        self.kind, self.count, self.mean, self.square = kind, 0, 0.0, 0.0

    def step(self, g: Tensor) -> Tensor:
        self.count += 1
        if self.kind == "maximised":
            return g
        if self.kind == "SGD":
            self.mean = g if self.count == 1 else 0.9 * self.mean + g
            return -self.mean
        self.mean, self.square = 0.9 * self.mean + 0.1 * g, 0.999 * self.square + 0.001 * g * g
        corrected = self.square / (1 - 0.999**self.count)
        return -self.mean / (1 - 0.9**self.count) / (corrected.sqrt() + 1e-8)

    def turn(self, left: Tensor, right: Tensor) -> None:
        """From old coordinates to new ones: left @ x @ right."""
        if self.kind in ("Adam", "AdamW"):
            share = (1 - 0.999**self.count) / (1 - 0.9**self.count) ** 2
            off = left**2 @ (self.square - share * self.mean**2) @ right**2
            self.mean = left @ self.mean @ right
            self.square = off.abs() + share * self.mean**2
        else:
            self.mean = left @ self.mean @ right


def best(g: Tensor, rank: int, left: bool, right: bool) -> tuple[Tensor, Tensor]:
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    return (u[:, :rank] if left else torch.eye(g.shape[0]).to(g)), (
        v[:rank].T if right else torch.eye(g.shape[1]).to(g)
    )


def iterated(g: Tensor, p: Tensor, q: Tensor, left: bool, right: bool) -> tuple[Tensor, Tensor]:
    """One step of subspace iteration, columns on the side of those that they come from."""

    def orthonormal(x: Tensor) -> Tensor:
        columns: list[Tensor] = []
        for column in x.T:
            for _ in range(2):  # Gram and Schmidt, twice for the digits
                for one in columns:
                    column = column - (one @ column) * one
            columns.append(column / column.norm())
        return torch.stack(columns, 1)

    if not left:
        return p, orthonormal(g.T @ g @ q)
    p = orthonormal(g @ g.T @ p)
    return p, orthonormal(g.T @ p) if right else q


def outside(g: Tensor, low: Tensor, step: Tensor, wide: Tensor, norms: list[Tensor]) -> Tensor:
    """Fira: what the subspace leaves, by the sizes of the columns or rows that it has kept whole."""
    axis = 0 if low.shape[1] == g.shape[1] else 1
    # Some pixels are always 0.
    rest = (g - wide) * step.norm(dim=axis, keepdim=True) / low.norm(dim=axis, keepdim=True).clamp(min=1e-99)
    limit = min(1.0, float(1.01 * norms[-1] / rest.norm())) if norms else 1.0
    norms.append(rest.norm() * limit)
    return rest * limit


def by_hand(
    kind: str, ranks: dict[str, int], side: str, basis: str, on_refresh: str, fira: bool = False
) -> dict[str, Tensor]:
    net, norms = network(), {name: list[Tensor]() for name in ranks}
    moments = {name: Moments(kind) for name, _ in net.named_parameters()}
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for t, (images, labels) in enumerate(batches()):
        net.zero_grad()
        cross_entropy(net(images), labels).backward()
        for name, p in net.named_parameters():
            w, g, sign = p.data, p.grad, -1 if kind == "maximised" else 1
            if kind != "AdamW":
                g = g + sign * 0.1 * w
            if name in ranks:
                rank, tall = ranks[name], w.shape[0] >= w.shape[1]
                left = side in ("left", "both") or (side == "auto" and not tall)
                right = side in ("right", "both") or (side == "auto" and tall)
                if t % EVERY == 0:
                    old = bases.get(name)
                    first = basis == "svd" or old is None
                    bases[name] = best(g, rank, left, right) if first else iterated(g, *old, left, right)
                    if old is not None and on_refresh == "reset":
                        moments[name] = Moments(kind)
                    if old is not None and on_refresh == "rotate":
                        moments[name].turn(bases[name][0].T @ old[0], old[1].T @ bases[name][1])
                a, b = bases[name]
                low = a.T @ g @ b
                if side == "both" and (t == 0 or (on_refresh == "reset" and t % EVERY == 0)):
                    low = torch.where(low.abs() < 1e-14 * low.abs().max(), 0, low)
                made = moments[name].step(low)
                rest = outside(g, low, made, a @ low @ b.T, norms[name]) if fira else torch.zeros(())
                step = SCALE * RATE * (a @ made @ b.T + sign * -rest)
            else:
                step = RATE * moments[name].step(g)
            p.data = (w * (1 - RATE * 0.1) if kind == "AdamW" else w) + step
    return {name: p.data for name, p in net.named_parameters()}


CASES = [
    *[(kind, "auto", "svd", "keep") for kind in OPTIMIZERS],
    *[("AdamW", side, "svd", "keep") for side in ("left", "right", "both")],
    *[("AdamW", side, "subspace", "keep") for side in ("auto", "right", "both")],
    *[("AdamW", side, "subspace", on) for side in ("auto", "both") for on in ("reset", "rotate")],
    ("Adam", "auto", "svd", "rotate"),
    ("SGD", "both", "svd", "rotate"),
]


FIRA = [*[(kind, "auto", "svd", "keep") for kind in OPTIMIZERS], ("AdamW", "right", "subspace", "reset")]


@pytest.mark.parametrize(("kind", "side", "basis", "on"), FIRA)
def test_steps_outside_of_the_subspace_are_those_of_fira_by_hand(kind: str, side: Any, basis: Any, on: Any) -> None:
    net = network()
    options = {"side": side, "basis": basis, "on_refresh": on, "match": list(MATCHED), "stagger": False}

    found = trained(net, OPTIMIZERS[kind](net.parameters()), GaLore(5, EVERY, SCALE, **options, residual="fira"))

    expected = by_hand(kind, dict.fromkeys(MATCHED, 5), side, basis, on, fira=True)
    assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("kind", "side", "basis", "on_refresh"), CASES)
def test_steps_are_those_of_galore_by_hand(kind: str, side: Any, basis: Any, on_refresh: Any) -> None:
    net = network()
    options = {"side": side, "basis": basis, "on_refresh": on_refresh, "match": list(MATCHED), "stagger": False}
    galore = GaLore(5, EVERY, SCALE, **options)

    found = trained(net, OPTIMIZERS[kind](net.parameters()), galore)

    expected = by_hand(kind, dict.fromkeys(MATCHED, 5), side, basis, on_refresh)
    assert_close(found, expected, rtol=0, atol=1e-8)
