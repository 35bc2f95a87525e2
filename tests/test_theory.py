"""What theory says of low rank, held against training through a real Trainer, enumeration, or closed forms."""

import itertools
from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import Every, Gradients, Monitor, Probe
from tests.trainings import Classifier, MemoryLogger, digits

SILENT: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}

TARGET = (3.0, 2.0, 1.2, 0.6, 0.3)


class Factored(L.LightningModule):
    """A product of matrices fitted to one, with weight decay: `|| W_k ... W_1 - A ||^2 / 2 + decay / 2 sum || W_i
    ||^2`.
    """

    def __init__(self, depth: int, decay: float) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(5, 5, generator=draws, dtype=torch.float64)).Q for _ in range(2))
        self.register_buffer("target", left @ torch.diag(torch.tensor(TARGET, dtype=torch.float64)) @ right)
        noise = 0.1 * torch.randn(depth - 1, 5, 5, generator=draws, dtype=torch.float64)
        # Not near zero, where a product of three matrices stays: that is a minimum too.
        self.factors = nn.ParameterList([*(noise + torch.eye(5, dtype=torch.float64)), self.target.clone()])
        self.decay = decay

    @property
    def product(self) -> Tensor:
        return reduce(torch.matmul, reversed(self.factors))

    def training_step(self, batch: Any) -> Tensor:
        return (self.product - self.target).square().sum() / 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(100, 1)), batch_size=1)

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.factors, lr=0.1, momentum=0.9, weight_decay=self.decay)


def singular_values(depth: int, decay: float, steps: int = 500) -> Tensor:
    """Of the product that a Trainer ends with."""
    module = Factored(depth, decay)
    L.Trainer(max_steps=steps, max_epochs=-1, logger=False, **SILENT).fit(module)
    return torch.linalg.svdvals(module.product.detach())


def test_weight_decay_of_two_linear_layers_takes_a_constant_off_every_singular_value() -> None:
    expected = torch.tensor([max(s - 0.5, 0) for s in TARGET], dtype=torch.float64)

    found = singular_values(2, 0.5)

    assert_close(found, expected, rtol=0, atol=1e-3)
    assert int((found > 0.01).sum()) == sum(s > 0.5 for s in TARGET) == 4


def largest_root(value: float, decay: float) -> float:
    """Of `s - value + decay s^(-1/3)`, by bisection between its minimum and the value; 0 without one."""
    low, high = (decay / 3) ** 0.75, value
    if low - value + decay * low ** (-1 / 3) > 0:
        return 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if middle - value + decay * middle ** (-1 / 3) > 0 else (middle, high)
    return high


def test_a_third_layer_leaves_fewer_singular_values() -> None:
    expected = torch.tensor([largest_root(s, 0.5) for s in TARGET], dtype=torch.float64)

    found = singular_values(3, 0.5)

    assert_close(found, expected, rtol=0, atol=1e-3)
    assert int((found > 0.01).sum()) == 3


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_cheapest_factors_cost_a_schatten_quasi_norm(depth: int) -> None:
    """`min sum || W_i ||^2 / k = sum s^(2/k)` over all products of k factors: balanced ones attain it."""
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=draws, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix)
    one, power = torch.eye(6, dtype=torch.float64), torch.diag(values ** (1 / depth))
    balanced = [left @ power, *[power] * (depth - 2), power @ right]

    least = values.pow(2 / depth).sum()

    assert_close(torch.linalg.multi_dot(balanced), matrix, rtol=1e-10, atol=1e-10)
    assert_close(torch.stack([f.square().sum() for f in balanced]).sum() / depth, least, rtol=1e-10, atol=0)
    for _ in range(100):
        changes = [one + noise for noise in 0.2 * torch.randn(depth - 1, 6, 6, generator=draws, dtype=torch.float64)]
        undone = [one, *map(torch.linalg.inv, changes)]
        others = [u @ factor @ c for u, factor, c in zip(undone, balanced, [*changes, one], strict=True)]
        assert_close(torch.linalg.multi_dot(others), matrix, rtol=1e-6, atol=1e-6)
        assert torch.stack([f.square().sum() for f in others]).sum() / depth > least - 1e-9


class Recording(L.Callback):
    """The weight after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append(pl_module.net[0].weight.detach().double().clone())  # type: ignore[index]


class OneByOne(Classifier):
    """One example a step, so that each gradient has rank one; weights are in double precision."""

    def __init__(self, rate: float, decay: float) -> None:
        net = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10)).double()
        super().__init__(net, optimizer="sgd", lr=rate, weight_decay=decay)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = digits(200).tensors
        return DataLoader(TensorDataset(images.double(), labels), batch_size=1, shuffle=True)


@pytest.mark.parametrize(("rate", "decay"), [(0.05, 1.0), (0.1, 0.1)])
def test_old_directions_decay_as_weyls_inequality_says(rate: float, decay: float) -> None:
    """`s_(t + k)(W_T) <= (1 - lr decay)^t s_k(W_(T - t))`: t steps add t directions, and all others have shrunk by
    then.
    """
    L.seed_everything(0, verbose=False)
    recording = Recording()
    L.Trainer(max_epochs=1, logger=False, callbacks=[recording], **SILENT).fit(OneByOne(rate, decay))

    spectra = torch.linalg.svdvals(torch.stack(recording.weights))
    tightest = 0.0
    for steps in (1, 5, 10, 20):
        now, bound = spectra[steps:, steps:], (1 - rate * decay) ** steps * spectra[:-steps, :-steps]
        assert (now <= bound + 1e-12).all()
        tightest = max(tightest, float((now / bound).max()))
    assert tightest > 0.9


@pytest.mark.parametrize("keep", [0.5, 0.6, 0.9])
def test_dropout_on_average_is_a_weighted_l2_penalty(keep: float) -> None:
    """All 2^10 masks of a linear regression: `E L = L + (1 - p) / (2 p) sum w^2 x^2`, p the probability to keep."""
    draws = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 10, generator=draws, dtype=torch.float64)
    target = 0.7

    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)), dtype=torch.float64)
    chances = torch.tensor(
        [prod(keep if m else 1 - keep for m in mask) for mask in masks.tolist()], dtype=torch.float64
    )
    losses = ((masks * x / keep) @ w - target).square() / 2

    penalty = (1 - keep) / (2 * keep) * (w.square() * x.square()).sum()
    assert_close((chances * losses).sum(), ((w @ x) - target).square() / 2 + penalty, rtol=1e-12, atol=0)


def test_torchs_dropout_does_so_within_its_sampling_error() -> None:
    """Its argument is the probability to drop."""
    draws = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 10, generator=draws)
    torch.manual_seed(0)

    losses = (nn.Dropout(0.4)(x.expand(50_000, 10)) @ w - 0.7).square() / 2

    expected = (w @ x - 0.7).square() / 2 + 0.4 / (2 * 0.6) * (w.square() * x.square()).sum()
    assert abs(losses.mean() - expected) < 5 * losses.std() / len(losses) ** 0.5


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_a_gradient_has_no_more_directions_than_the_batch_has_tokens(tokens: int) -> None:
    class Tokens(Classifier):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(digits(tokens), batch_size=tokens)

    logger, net = MemoryLogger(), nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))
    monitor = Monitor([Probe("gradient", Gradients(), ["numerical_rank"], Every(1))], per_site=True)
    L.Trainer(max_steps=1, logger=logger, callbacks=[monitor], **SILENT).fit(Tokens(net))

    assert logger.curve("gradient_numerical_rank/net.0.weight")[0] == tokens
    assert logger.curve("gradient_numerical_rank/net.2.weight")[0] <= min(tokens, 9)


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_neighbouring_layers_are_in_balance(activation: Callable[[], nn.Module]) -> None:
    """`W_2^T dL/dW_2 = dL/dW_1 W_1^T` in a linear net without biases, and their diagonals with ReLU: what flows in
    flows out.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 20, bias=False), activation(), nn.Linear(20, 10, bias=False)).double()
    images, labels = digits(16).tensors
    F.cross_entropy(net(images.double()), labels).backward()

    first, second = net[0].weight, net[2].weight
    assert first.grad is not None and second.grad is not None
    out, into = second.mT @ second.grad, first.grad @ first.mT
    assert_close(out.diagonal(), into.diagonal(), rtol=1e-10, atol=1e-14)
    assert torch.allclose(out, into, rtol=1e-10, atol=1e-14) == (activation is nn.Identity)


@pytest.mark.slow
def test_gradients_of_the_transformer_have_nuclear_norms_of_a_few_spectral_norms() -> None:
    """Derivations of muP take the ratio for constant in the width; a matrix of noise has a ratio that grows with it."""
    ratios = {}
    windows = TensorDataset(standard_library()[:512])
    for width in (32, 128):
        L.seed_everything(0, verbose=False)
        logger = MemoryLogger()
        names = ["nuclear_to_spectral", "relative_nuclear_to_spectral"]
        monitor = Monitor([Probe("gradient", Gradients(match="blocks.*"), names, Every(10))])
        trainer = L.Trainer(max_steps=31, logger=logger, callbacks=[monitor], **SILENT)
        trainer.fit(CharTransformer(100, depth=2, width=width, heads=4), DataLoader(windows, 16, shuffle=True))
        ratios[width] = [list(logger.curve(f"monitor/gradient_{name}_median").values()) for name in names]

    for width, (ratio, relative) in ratios.items():
        assert min(ratio) >= 1 and max(ratio) < width / 3
        assert max(relative) < 0.5
    # That of noise would be four times as large.
    assert ratios[128][0][-1] < 2.5 * ratios[32][0][-1]
