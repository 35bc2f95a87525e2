"""What a step does to a product, and what keeps factors orthonormal. Oracles: the formulas, autograd, numpy."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank import LowRankFactorize, watching
from lightning_lowrank.methods.factorize.orthogonality import retraction, tangent
from tests.trainings import QUIET, Classifier, MemoryLogger, half


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> Any:
    """A factorized layer in double precision, its scale far from 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 9, bias=False)).double()
    LowRankFactorize(rank=3, match="*", **options).prepare(net)
    net[0].weight_s.data = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    return net


def stepped(net: Any, gradient: Tensor, rate: float, *, scale_moves: bool = True) -> Tensor:
    """What a step of gradient descent changes of the product, where the loss has this gradient by it."""
    before, parameters = net[0].weight.detach().clone(), list(net.parameters())
    (net[0].weight * gradient).sum().backward()
    torch.optim.SGD([p for p in parameters if scale_moves or p.ndim > 1], lr=rate).step()
    return net[0].weight.detach() - before


def test_a_step_changes_the_product_of_two_factors_as_the_identity_says() -> None:
    net, g, eta = layer(), drawn(9, 8), 0.1
    net[0].weight_s.data.fill_(1.0)
    a, b = net[0].weight_A.detach().clone(), net[0].weight_B.detach().clone()

    change = stepped(net, g, eta, scale_moves=False)

    assert_close(change, -eta * (g @ b.T @ b + a @ a.T @ g) + eta**2 * g @ b.T @ a.T @ g)


def test_with_a_scale_the_step_is_the_identity_to_first_order() -> None:
    errors = []
    for eta in (1e-2, 5e-3):
        net, g = layer(), drawn(9, 8)
        a, b, s = (p.detach().clone() for p in (net[0].weight_A, net[0].weight_B, net[0].weight_s))
        along = (a.T @ g @ b.T).diagonal()
        first = -eta * (g @ b.T * s**2 @ b + a * along @ b + a * s**2 @ a.T @ g)
        errors.append((stepped(net, g, eta) - first).norm().item())

    assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("mode", ["module", "parametrize"])
def test_the_soft_penalty_acts_as_if_it_were_in_the_loss(mode: str) -> None:
    method = LowRankFactorize(rank=3, match="*", orthogonality="soft", weight=0.3, mode=mode)
    torch.manual_seed(0)
    net = nn.Linear(8, 9, bias=False).double()
    method.prepare(net)
    parameters = list(net.parameters())
    for p in parameters:
        p.data.mul_(1.5)
    a, s, b = (p.detach().clone().requires_grad_() for p in parameters)
    x = drawn(5, 8)
    eye = torch.eye(3, dtype=torch.float64)
    penalty = (a.T @ a - eye).square().sum() + (b @ b.T - eye).square().sum()
    loss = (x @ (a * s @ b).T).square().mean() + 0.3 * penalty
    loss.backward()
    torch.optim.SGD([a, s, b], lr=0.01).step()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with watching(net, optimizer, method) as watch, watch.batch():
        watch.loss(net(x).square().mean()).backward()
        optimizer.step()

    assert_close([p.detach() for p in parameters], [p.detach() for p in (a, s, b)])


def test_the_tangent_part_is_the_nearest_vector_of_the_tangent_space() -> None:
    point, x = np.linalg.qr(drawn(5, 2).numpy())[0], drawn(5, 2, seed=1)
    # Constraints A'T + T'A = 0 on the entries of T, as rows.
    basis = np.eye(10).reshape(10, 5, 2)
    constraints = np.stack([(point.T @ t + t.T @ point).flatten() for t in basis], 1)
    normal = np.linalg.pinv(constraints) @ constraints @ x.numpy().flatten()

    found = tangent(torch.from_numpy(point), x).numpy()

    np.testing.assert_allclose(found.flatten(), x.numpy().flatten() - normal, atol=1e-12)


def test_the_retraction_is_orthonormal_and_follows_the_tangent_to_first_order() -> None:
    point = retraction(drawn(6, 3))
    direction = tangent(point, drawn(6, 3, seed=1))

    errors = [(retraction(point + t * direction) - point - t * direction).norm().item() for t in (1e-3, 5e-4)]

    assert_close(point.mT @ point, torch.eye(3, dtype=torch.float64))
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)


def test_stiefel_steps_find_what_torchs_parametrization_and_the_polar_factor_say() -> None:
    target = drawn(6, 4)
    u, _, vt = np.linalg.svd(target[:, :2].numpy(), full_matrices=False)
    theirs = nn.Linear(2, 6, bias=False).double()
    nn.utils.parametrizations.orthogonal(theirs)
    method = LowRankFactorize(rank=2, match="*", orthogonality="stiefel")
    net: Any = nn.Linear(8, 6, bias=False).double()
    method.prepare(net)
    optimizers = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1)

    with watching(net, optimizers[0], method) as watch:
        for _ in range(300):
            with watch.batch():
                for optimizer in optimizers:
                    optimizer.zero_grad()
                watch.loss((net.weight_A - target[:, :2]).square().sum()).backward()
                (theirs.weight - target[:, :2]).square().sum().backward()
                for optimizer in optimizers:
                    optimizer.step()

    np.testing.assert_allclose(net.weight_A.detach().numpy(), u @ vt, atol=1e-4)
    assert_close(net.weight_A, theirs.weight, rtol=1e-3, atol=1e-3)


def on_theirs(triv: str) -> tuple[Any, Tensor]:
    """A Stiefel manifold of geotorch that was moved from its first point, and the point."""
    geotorch = pytest.importorskip("geotorch", reason="an oracle that is not installed: pip install geotorch")
    manifold = geotorch.Stiefel((6, 3), triv=triv).double()
    torch.manual_seed(0)
    manifold.right_inverse(retraction(drawn(6, 3)))
    return manifold, manifold(torch.zeros(6, 3, dtype=torch.float64)).detach()


@pytest.mark.parametrize("triv", ["expm", "cayley"])
def test_the_tangent_part_is_the_nearest_velocity_of_geotorchs_manifold(triv: str) -> None:
    manifold, point = on_theirs(triv)
    velocities = torch.autograd.functional.jacobian(manifold, torch.zeros(6, 3, dtype=torch.float64)).reshape(18, 18)
    x = drawn(6, 3, seed=1)

    nearest = velocities @ torch.linalg.pinv(velocities) @ x.flatten()

    assert torch.linalg.matrix_rank(velocities) == 18 - 6
    assert_close(tangent(point, x).flatten(), nearest, rtol=0, atol=1e-10)


@pytest.mark.parametrize("triv", ["expm", "cayley"])
def test_the_retraction_goes_where_geotorchs_paths_go_to_first_order(triv: str) -> None:
    manifold, point = on_theirs(triv)
    x = drawn(6, 3, seed=1)
    velocity = torch.autograd.functional.jvp(manifold, torch.zeros_like(x), x)[1]

    errors = [(retraction(point + t * velocity) - manifold(t * x)).norm().item() for t in (1e-3, 5e-4)]

    assert errors[0] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)


class Checked(L.Callback):
    """How far factors are from orthonormal after each batch."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        named = dict(pl_module.named_parameters())
        sides = [p.detach().double() for name, p in named.items() if name.endswith(("_A", "_B"))]
        columns = [p if len(p) > p.shape[1] else p.mT for p in sides]
        self.errors += [(c.mT @ c - torch.eye(c.shape[1])).abs().max().item() for c in columns]


def fit(method: LowRankFactorize, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
    L.seed_everything(0, verbose=False)
    logger = MemoryLogger()
    trainer = L.Trainer(**QUIET | {"max_epochs": 3, "logger": logger} | options, callbacks=[method, *callbacks])
    trainer.fit(Classifier())
    return logger


@pytest.mark.parametrize("precision", ["32", "16"])
def test_on_the_manifold_factors_are_orthonormal_after_every_step(precision: str) -> None:
    checked = Checked()
    options = {} if precision == "32" else {"plugins": half()}

    logger = fit(LowRankFactorize(rank=8, orthogonality="stiefel", every_n_steps=1, detail="all"), checked, **options)

    assert checked.errors and max(checked.errors) < 1e-5
    assert max(logger.numbers()["factorize/orthogonality_gap_max"].values()) < 1e-5


def test_without_it_they_are_not_and_softly_they_are_nearer() -> None:
    ends = {}
    for kind in (None, "soft"):
        method = LowRankFactorize(rank=8, orthogonality=kind, weight=1.0, every_n_steps=1, detail="all")
        numbers = fit(method).numbers()
        ends[kind] = list(numbers["factorize/orthogonality_gap_max"].values())[-1]

    assert ends[None] > 1e-3
    assert ends["soft"] < ends[None]


@pytest.mark.parametrize("orthogonality", [None, "stiefel"])
def test_no_step_goes_beyond_the_bound(orthogonality: Any) -> None:
    options = {"rank": 8, "orthogonality": orthogonality, "every_n_steps": 1, "detail": "all"}

    free = fit(LowRankFactorize(**options)).numbers()["factorize/update_norm_max"]
    bounded = fit(LowRankFactorize(**options, max_update=0.01)).numbers()["factorize/update_norm_max"]

    assert max(free.values()) > 0.02
    assert max(bounded.values()) <= 0.01 * (1 + 1e-6)
    assert min(bounded.values()) > 0.005
