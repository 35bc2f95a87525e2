"""The paper's experiments, small, with margins measured over 40 seeds; and what regularisers add to a loss."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from examples.gradient_anatomy import (
    TERMS,
    at_half_loss,
    descended,
    directions,
    error_slope,
    jacobian_gradient,
    norms,
    problem,
    terms,
    with_noise,
)
from lightning_lowrank import GradientAnatomyMonitor, JacobianPenalty, input_noise, jacobian_penalty, weight_decay
from lightning_lowrank.monitors.anatomy.split import SHARES, Sides, anatomy, signal_basis, split
from lightning_lowrank.monitors.anatomy.split import Basis as DirectionsOf
from tests.trainings import Adversaries, Classifier, ImageNet, MemoryLogger, digits

SEEDS = range(4)
SMOOTH = ("softplus", "GELU", "tanh", "sigmoid")


@pytest.mark.parametrize("act", [*SMOOTH, "ReLU"])
@pytest.mark.parametrize("nu", [0.0, 0.25])
def test_the_terms_sum_to_the_gradient(act: str, nu: float) -> None:
    of = problem(60, act, nu=nu, alpha=0.5)
    found = terms(of)

    assert_close(sum(found[name] for name in TERMS), of.gradient(), rtol=1e-10, atol=1e-13)


def test_the_closed_form_is_what_autograd_gives() -> None:
    of = problem(60, "tanh", nu=0.2)
    W = of.W.clone().requires_grad_()
    outputs = of.gamma * torch.tanh(of.data.inputs @ W.mT) @ of.a
    (expected,) = torch.autograd.grad(0.5 * (outputs - of.targets).square().mean(), W)

    assert_close(of.gradient(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("act", SMOOTH)
def test_of_a_weak_spike_the_gradient_is_one_residue(act: str) -> None:
    found = [directions(problem(150, act, nu=0.125, seed=seed)) for seed in SEEDS]

    assert min(one["u1.u"] for one in found) > 0.94
    assert min(one["v1 in (b, q)"] for one in found) > 0.98
    assert min(one["v1.b"] for one in found) > 0.85
    assert max(one["stable rank"] for one in found) < 2.3


@pytest.mark.parametrize("act", ["softplus", "GELU"])
def test_of_a_moderate_spike_the_gradient_has_rank_two(act: str) -> None:
    for seed in SEEDS:
        of = problem(150, act, nu=0.375, seed=seed)
        right = torch.linalg.svd(of.gradient())[2][:2]
        assert directions(of)["v1 in (b, q)"] > 0.96
        assert (right @ of.data.direction).norm() > 0.75


@pytest.mark.parametrize(("act", "least"), [("softplus", 2.5), ("tanh", 2.5), ("GELU", 1.1)])
def test_relu_suppresses_the_residue_of_steep_bulks(act: str, least: float) -> None:
    for seed in SEEDS:
        smooth, kink = (norms(problem(150, name, nu=0.125, alpha=8 / 9, seed=seed)) for name in (act, "ReLU"))
        assert smooth["S1"] / smooth["E"] > least * kink["S1"] / kink["E"]


def test_relu_is_like_gelu_where_the_bulk_is_flat() -> None:
    for seed in SEEDS:
        one, other = (norms(problem(150, name, nu=0.125, seed=seed)) for name in ("GELU", "ReLU"))
        assert abs(math.log(one["S1"] / one["E"] * other["E"] / other["S1"])) < 0.3


def test_mean_field_scaling_keeps_the_direction_at_the_same_step_but_not_at_the_same_loss() -> None:
    m = 5 * 150 // 3
    lazy, mean_field = (
        descended(problem(150, "tanh", nu=0.125, mean_field=on), 0.5, [16])[-1]["v1.v1(0)"] for on in (False, True)
    )

    assert lazy < 0.6
    assert mean_field > 0.98
    halves = [
        at_half_loss(problem(150, "tanh", nu=0.125, mean_field=on), rate)
        for on, rate in ((False, 0.1), (True, 0.1 * m))
    ]
    assert halves[0]["v1.v1(0)"] > halves[1]["v1.v1(0)"] - 0.05


def test_noise_on_the_inputs_brings_the_residue_back() -> None:
    for seed in SEEDS:
        clean = problem(150, "ReLU", nu=0.125, alpha=8 / 9, seed=seed)
        noisy = with_noise(clean, 1.0, seed=100 + seed)
        before, after = norms(clean), norms(noisy)
        assert after["S1"] / after["S2"] > 2.5 * before["S1"] / before["S2"]
        assert after["S1"] > 1.7 * before["S1"]
        assert after["S2"] < 0.9 * before["S2"]
        assert directions(noisy)["v1.b"] > 0.6


def test_weight_decay_drowns_all_and_raises_the_rank() -> None:
    for seed in SEEDS:
        of = problem(150, "tanh", nu=0.125, seed=seed)
        before, after = directions(of), directions(of, of.gradient() + 3.0 * of.W)
        assert after["v1.b"] < 0.4
        assert after["v1.q"] < 0.25
        assert after["participation ratio"] > 40 * before["participation ratio"]


def test_a_jacobian_penalty_brings_a_component_of_its_own() -> None:
    for seed in SEEDS:
        of = problem(150, "tanh", nu=0.375, seed=seed)
        before, after = directions(of), directions(of, of.gradient() + jacobian_gradient(of))
        assert before["u1.u"] > 0.95
        assert after["v1.b"] < 0.4
        assert after["v1.q"] > 0.95
        assert after["u1.u"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("nu", [0.0, 0.25])
@pytest.mark.parametrize("act", ["softplus", "GELU", "tanh", "ReLU"])
def test_the_error_falls_with_the_rows_as_the_bound_does(act: str, nu: float) -> None:
    slope, constant = error_slope(act, nu, (100, 200, 400))

    assert slope < nu - 0.5 + 0.1
    assert constant < 0.75


@pytest.mark.parametrize(("act", "nu"), [("softplus", 0.25), ("softplus", 0.375), ("GELU", 0.25), ("tanh", 0.25)])
def test_shares_that_know_nothing_of_the_spike_are_those_that_do(act: str, nu: float) -> None:
    """Within 0.06 in the mean and 0.15 at worst."""
    apart = []
    for seed in SEEDS:
        of = problem(150, act, nu=nu, seed=seed)
        signals = of.residual[:, None] * of.slopes() * of.a
        blind = anatomy(Sides(of.data.inputs, signals, of.gradient(), 150), 1).values
        one = torch.ones(1, dtype=torch.float64)
        knowing = split(
            of.gradient(), DirectionsOf(terms(of)["u"][None], one), DirectionsOf(of.data.direction[None], one)
        )
        apart.append([abs(float(blind[share] - knowing[share])) for share in SHARES])

    assert torch.tensor(apart).mean() < 0.06
    assert torch.tensor(apart).max() < 0.15


def test_the_signals_of_one_output_have_the_residues_direction() -> None:
    of = problem(150, "tanh", nu=0.25)
    found = signal_basis(of.residual[:, None] * of.slopes() * of.a, 1)

    assert abs(float(found.directions[0] @ terms(of)["u"])) > 0.95


class TwoLayers(L.LightningModule):
    """The same net in a Trainer."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of
        self.layer = nn.Linear(of.W.shape[1], of.W.shape[0], bias=False)
        self.layer.weight.data = of.W.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.of.gamma * torch.tanh(self.layer(self.of.data.inputs.float())) @ self.of.a.float()
        return 0.5 * (outputs - self.of.targets.float()).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
}


def test_the_monitor_finds_spike_and_bulk_of_a_model_that_says_nothing_of_them() -> None:
    logger, monitor = (
        MemoryLogger(),
        GradientAnatomyMonitor(every_n_steps=1, num_outputs=1, per_site=True, detail="all"),
    )
    of = problem(300, "tanh", nu=0.3, alpha=0.5)
    L.Trainer(**SILENT, logger=logger, callbacks=[monitor]).fit(TwoLayers(of))

    found = {
        tag.removeprefix("anatomy_").removesuffix("/layer.weight"): curve[0]
        for tag, curve in logger.curves().items()
        if 0 in curve
    }
    assert abs(found["spike_strength"] - 0.3) < 3 * found["spike_strength_error"]
    assert abs(found["bulk_decay"] - 0.5) < 3 * found["bulk_decay_error"]
    assert found["deviation"] < 1e-5
    right = torch.linalg.svd(of.gradient(), full_matrices=False)[2][:2]
    assert_close(found["alignment"], float((right @ of.data.direction).square().sum()), rtol=0, atol=0.05)


def nested_penalty(module: nn.Module, inputs: Tensor) -> Tensor:
    """By `torch.func`, of all weights of linear layers."""
    named = {name: p for name, p in module.named_parameters() if name.endswith("weight") and p.ndim == 2}
    one = lambda named, x: functional_call(module, named, (x[None],))[0]  # noqa: E731
    found = vmap(jacrev(one), (None, 0))(named, inputs)
    return 0.5 * sum(part.square().sum() for part in found.values()) / len(inputs)


def test_the_penalty_and_its_gradient_are_those_of_nested_differentiation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3)).double()
    inputs = torch.randn(7, 6, dtype=torch.float64)

    expected, found = nested_penalty(net, inputs), jacobian_penalty(net, inputs)
    assert_close(found, expected)
    params = list(net.parameters())
    of_found, of_expected = (
        torch.autograd.grad(x, params, allow_unused=True, materialize_grads=True) for x in (found, expected)
    )
    assert_close(of_found, of_expected)


def test_the_penalty_of_sequences_is_that_of_all_positions_together() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)).mean(1))

    torch.manual_seed(0)
    net, inputs = Pooled().double(), torch.randn(4, 3, 6, dtype=torch.float64)

    assert_close(jacobian_penalty(net, inputs), nested_penalty(net, inputs))


def test_a_penalty_leaves_modes_and_statistics_as_they_are() -> None:
    net = ImageNet()
    net.dropout.eval()
    modes, state = [m.training for m in net.modules()], {name: t.clone() for name, t in net.state_dict().items()}
    inputs = torch.rand(3, 64)
    draws = torch.get_rng_state()
    jacobian_penalty(net, inputs)

    assert [m.training for m in net.modules()] == modes
    assert_close(dict(net.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_penalty_of_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="matches no trained weight of a linear layer"):
        jacobian_penalty(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.rand(2, 3), "1.*")


class ByHand(Classifier):
    """The penalty in the training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * jacobian_penalty(self.net, batch[0])


def trained(module: Classifier, *callbacks: L.Callback, **options: Any) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(**SILENT, logger=MemoryLogger(), callbacks=list(callbacks), **options)
    trainer.fit(module)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def made(of: type[Classifier]) -> Classifier:
    torch.manual_seed(0)
    return of(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_callback_adds_what_the_step_would(accumulated: int) -> None:
    found = trained(made(Classifier), JacobianPenalty(0.01, add=True), accumulate_grad_batches=accumulated)

    assert_close(found, trained(made(ByHand), accumulate_grad_batches=accumulated), rtol=1e-4, atol=1e-6)


def test_unless_it_is_asked_to_the_callback_only_logs() -> None:
    logger, module = MemoryLogger(), made(Classifier)
    L.seed_everything(1, verbose=False)
    L.Trainer(**SILENT, logger=logger, callbacks=[JacobianPenalty(0.01)], log_every_n_steps=1).fit(module)

    assert_close(dict(module.state_dict()), trained(made(Classifier)), rtol=0, atol=0)
    assert len(logger.curve("jacobian_penalty")) == 8


def test_the_callback_refuses_what_optimises_by_hand() -> None:
    with pytest.raises(ValueError, match="call jacobian_penalty in its training_step"):
        L.Trainer(**SILENT, logger=False, callbacks=[JacobianPenalty(1.0, add=True)]).fit(Adversaries())


def test_a_penalty_that_is_only_logged_is_not_heard() -> None:
    monitor, logger = GradientAnatomyMonitor(every_n_steps=1, detail="all"), MemoryLogger()
    L.Trainer(**SILENT, logger=logger, callbacks=[JacobianPenalty(0.01), monitor]).fit(made(Classifier))

    assert max(logger.curve("anatomy/deviation_max").values()) < 1e-4


class InWords(Classifier):
    """Batches are dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader([{"x": x, "y": y} for x, y in digits(16)], batch_size=8)


def test_a_penalty_that_cannot_be_had_is_nan_where_it_is_only_logged() -> None:
    logger = MemoryLogger()
    with pytest.warns(UserWarning, match="inputs are a dict, not a tensor; select them with inputs_of="):
        L.Trainer(**SILENT, logger=logger, callbacks=[JacobianPenalty(0.01)], log_every_n_steps=1).fit(InWords())

    assert all(math.isnan(value) for value in logger.curve("jacobian_penalty").values())


def test_a_penalty_that_cannot_be_added_is_an_error() -> None:
    with pytest.raises(ValueError, match="inputs are a dict"):
        L.Trainer(**SILENT, logger=False, callbacks=[JacobianPenalty(0.01, add=True)]).fit(InWords())


class NoForward(Classifier):
    forward = L.LightningModule.forward


def test_a_module_without_a_forward_is_refused() -> None:
    with pytest.raises(ValueError, match=r"define forward in NoForward"):
        L.Trainer(**SILENT, logger=False, callbacks=[JacobianPenalty(0.01)]).fit(NoForward())


def test_a_penalty_of_too_many_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="400 outputs of each example"):
        jacobian_penalty(nn.Linear(3, 400), torch.rand(2, 3))


def test_the_gradient_of_weight_decay_is_the_weight() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    weight_decay([weight], 0.3).backward()

    assert weight.grad is not None
    assert_close(weight.grad, 0.3 * weight.detach())


def test_noise_has_the_deviation_that_was_asked_for(generator: torch.Generator) -> None:
    noise = input_noise(torch.ones(200, 200), 0.5, generator=generator) - 1

    assert_close(noise.std().item(), 0.5, rtol=0.02, atol=0)
    assert abs(float(F.cosine_similarity(noise[0], noise[1], dim=0))) < 0.3
