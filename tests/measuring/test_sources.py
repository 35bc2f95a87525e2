"""What sources read, beside training loops written by hand in plain torch, with ranks by numpy's SVD.

Each run and its oracle start from the same weights and see the same batches in the same order; the oracle shares no
code with the package.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from itertools import pairwise
from typing import Any

import lightning as L
import numpy as np
import peft
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_lowrank import (
    Displacement,
    Every,
    Gradients,
    Monitor,
    OptimizerState,
    Probe,
    Source,
    Updates,
    View,
    Weights,
)
from tests.oracles.spectra import RANKS
from tests.trainings import Adversaries, Classifier, MemoryLogger, Tied, digits

STATISTICS = ("effective_rank", "stable_rank", "frobenius_norm")
Matrix = NDArray[np.float64]
Record = dict[str, list[Matrix]]


class InOrder(Classifier):
    """Sees the same batches in every run."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=8)


def batches() -> Iterator[tuple[int, Tensor, Tensor]]:
    """The batches of `InOrder`, numbered."""
    for index, (x, y) in enumerate(DataLoader(digits(), batch_size=8)):
        yield index, x, y


def run(
    module: L.LightningModule,
    sources: Iterable[Source],
    *others: L.Callback,
    every: int = 1,
    statistics: Iterable[str] = STATISTICS,
    **options: Any,
) -> MemoryLogger:
    """What a monitor of these sources logs while the module trains for an epoch."""
    logger = MemoryLogger()
    monitor = Monitor(
        [Probe(source.name, source, tuple(statistics), Every(every)) for source in sources], per_site=True, detail="all"
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    trainer = L.Trainer(**(quiet | options), logger=logger, callbacks=[monitor, *others])
    trainer.fit(module)
    assert monitor.failures == 0
    return logger


def matrix(tensor: Tensor) -> Matrix:
    """A copy, for numpy."""
    return tensor.detach().double().numpy().copy()


def agrees(logger: MemoryLogger, quantity: str, site: str, expected: Iterable[Matrix], *, rtol: float = 1e-4) -> None:
    """Whether the curves of a site are the ranks of these matrices by numpy, one per sample."""
    values = [np.linalg.svd(one, compute_uv=False) for one in expected]
    assert values
    for statistic in STATISTICS:
        curve = list(logger.curve(f"{quantity}_{statistic}/{site}").values())
        ranks = [RANKS[statistic](v) if v.any() else 0.0 for v in values]
        assert_close(np.array(curve), np.array(ranks), rtol=rtol, atol=1e-12)


def by_hand(
    net: nn.Module, optimizer: torch.optim.Optimizer, *, window: int = 1, clip: float | None = None
) -> dict[str, Record]:
    """Train on all batches; keep for each step and each matrix what a source should read."""
    weights = {f"net.{name}": p for name, p in net.named_parameters() if p.ndim > 1}
    initial = {name: matrix(p) for name, p in weights.items()}
    record: dict[str, Record] = {kind: {name: [] for name in weights} for kind in KINDS}
    for index, x, y in batches():
        (cross_entropy(net(x), y) / window).backward()
        if index % window != window - 1 and index != 7:
            continue
        before = {name: matrix(p) for name, p in weights.items()}
        gradients = {name: matrix(p.grad) for name, p in weights.items() if p.grad is not None}
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in weights.items():
            state = optimizer.state.get(p, {})
            record["weight"][name].append(before[name])
            record["displacement"][name].append(before[name] - initial[name])
            if name in gradients:
                record["gradient"][name].append(gradients[name])
                record["update"][name].append(matrix(p) - before[name])
            for kind, keys in MOMENTS.items():
                record[kind][name] += [matrix(state[key]) for key in keys if state.get(key) is not None]
    return record


MOMENTS = {"first_moment": ("exp_avg", "momentum_buffer"), "second_moment": ("exp_avg_sq",)}
KINDS = ("gradient", "weight", "update", "displacement", *MOMENTS)


def all_sources() -> list[Source]:
    return [
        Gradients(),
        Weights(),
        Updates(),
        Displacement(),
        OptimizerState("first_moment"),
        OptimizerState("second_moment"),
    ]


LOOPS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "AdamW": ("adamw", {}, {}, {}),
    "AdamW, fused": ("adamw", {"fused": True}, {}, {}),
    "SGD with momentum": ("sgd", {"momentum": 0.9, "lr": 0.1}, {}, {}),
    "accumulation over three batches": ("adamw", {}, {"accumulate_grad_batches": 3}, {"window": 3}),
    "clipping": ("sgd", {"lr": 0.1}, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "accumulation and clipping": (
        "sgd",
        {"lr": 0.1},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
        {"window": 3, "clip": 0.1},
    ),
}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("case", LOOPS)
def test_sources_read_what_a_loop_by_hand_has(case: str) -> None:
    optimizer, settings, options, loop = LOOPS[case]
    module = InOrder(optimizer=optimizer, **settings)
    net = deepcopy(module.net)

    logger = run(module, all_sources(), **options)
    expected = by_hand(net, OPTIMIZERS[optimizer](net.parameters(), **({"lr": 1e-2} | settings)), **loop)

    for kind in KINDS:
        for site, matrices in expected[kind].items():
            if matrices:
                agrees(logger, kind, site, matrices)
        assert sites(logger, kind) == [site for site, matrices in expected[kind].items() if matrices]


def test_displacement_starts_at_zero() -> None:
    logger = run(InOrder(), [Displacement()])

    assert next(iter(logger.curve("displacement_frobenius_norm/net.0.weight").values())) == 0


def test_displacement_logs_the_bytes_that_it_keeps() -> None:
    logger = run(InOrder(), [Displacement()], every=8)

    assert list(logger.curve("lowrank/displacement_bytes").values()) == [4 * (64 * 32 + 32 * 10)]


# Mixed precision


def half(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale, growth_interval=10**6))


def mixed_by_hand(net: nn.Module, fused: bool, scale: float) -> tuple[Record, list[bool]]:
    """Gradients at each batch without the scale, and whether the step happened."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=fused)
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    record: Record = {f"net.{name}": [] for name, p in net.named_parameters() if p.ndim > 1}
    stepped = []
    for _, x, y in batches():
        with torch.autocast("cpu", torch.half):
            loss = cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        for name, p in net.named_parameters():
            if p.ndim > 1:
                record[f"net.{name}"].append(matrix(p.grad) / before)
        stepped.append(all(bool(p.grad.isfinite().all()) for p in net.parameters()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return record, stepped


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_gradients_under_a_scaler_are_unscaled(fused: bool) -> None:
    module = InOrder(fused=fused)
    net = deepcopy(module.net)

    logger = run(module, [Gradients()], plugins=half(1024.0))
    record, stepped = mixed_by_hand(net, fused, 1024.0)

    assert all(stepped)
    for site, gradients in record.items():
        agrees(logger, "gradient", site, gradients)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_overflows_is_counted_and_the_next_good_one_is_read(fused: bool) -> None:
    """Two overflows halve the scale twice; the sample due at step 0 is taken at the third batch, and nothing before."""
    module = InOrder(fused=fused)
    net = deepcopy(module.net)
    scale = 2.0**22

    logger = run(module, [Gradients(), Weights(), Updates()], every=1000, plugins=half(scale))
    record, stepped = mixed_by_hand(net, fused, scale)

    first = stepped.index(True)
    assert first > 0
    for site, gradients in record.items():
        agrees(logger, "gradient", site, gradients[first : first + 1])
    assert list(logger.curve("lowrank/monitor_skipped_steps").values()) == [first]
    assert min(logger.curve("update_frobenius_norm/net.0.weight").values()) > 0


# Several optimizers, and those that evaluate more than once


def adversaries_by_hand(module: Adversaries) -> Record:
    """The gradients at each optimizer's own steps."""
    first = torch.optim.AdamW(module.generator.parameters())
    second = torch.optim.SGD(module.critic.parameters(), lr=0.01)
    record: Record = {"generator.weight": [], "critic.weight": []}
    for index, x, _ in batches():
        fake = module.generator(x.roll(1, 0))
        loss = module.critic(fake.detach()).mean() - module.critic(x).mean() + module.critic.weight.square().sum()
        second.zero_grad()
        loss.backward()
        record["critic.weight"].append(matrix(module.critic.weight.grad))
        second.step()
        if index % module.every == module.every - 1:
            first.zero_grad()
            (-module.critic(fake).mean()).backward()
            record["generator.weight"].append(matrix(module.generator.weight.grad))
            first.step()
    return record


@pytest.mark.parametrize("every", [1, 3])
def test_each_of_two_optimizers_is_read_at_its_own_step(every: int) -> None:
    """The generator steps at every third batch, the critic at the first after that; waiting is no failure."""
    module = Adversaries(every)
    copy = deepcopy(module)
    copy.every = every

    torch.manual_seed(7)
    logger = run(module, [Gradients(min_size=1)], every=every)
    torch.manual_seed(7)
    record = adversaries_by_hand(copy)

    agrees(logger, "gradient", "generator.weight", record["generator.weight"])
    agrees(logger, "gradient", "critic.weight", record["critic.weight"][::every])
    assert len(record["generator.weight"]) == 8 // every


def test_lbfgs_is_read_at_its_first_evaluation() -> None:
    module = InOrder(optimizer="lbfgs", max_iter=4, lr=0.1)
    net = deepcopy(module.net)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4, lr=0.1)
    gradients: list[Matrix] = []

    logger = run(module, [Gradients()], max_steps=2)
    for index, x, y in batches():
        seen: list[Matrix] = []

        def closure(x: Tensor = x, y: Tensor = y, seen: list[Matrix] = seen) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            seen.append(matrix(net[0].weight.grad))
            return loss

        if index < 2:
            optimizer.step(closure)
            assert len(seen) > 1
            gradients.append(seen[0])

    agrees(logger, "gradient", "net.0.weight", gradients)


# Which parameters


def sites(logger: MemoryLogger, quantity: str) -> list[str]:
    """Names of the sites of a quantity."""
    return [tag.partition("/")[2] for tag in logger.curves() if tag.startswith(f"{quantity}_stable_rank/")]


def test_frozen_layers_have_weights_only() -> None:
    module = InOrder()
    module.net[0].requires_grad_(False)
    logger = run(module, all_sources())

    assert sites(logger, "weight") == sites(logger, "displacement") == ["net.0.weight", "net.2.weight"]
    for kind in ("gradient", "update", "first_moment", "second_moment"):
        assert sites(logger, kind) == ["net.2.weight"]


def test_parameters_of_no_optimizer_have_their_weights_read() -> None:
    class Half(InOrder):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    module = Half()
    net = deepcopy(module.net)
    logger = run(module, [Weights(), Updates()], every=8)

    agrees(logger, "weight", "net.0.weight", [matrix(net[0].weight)])
    agrees(logger, "weight", "net.2.weight", [matrix(net[2].weight)])


def test_tied_weights_are_read_once() -> None:
    module = InOrder(Tied())
    net = deepcopy(module.net)

    logger = run(module, [Gradients(), Updates()])
    expected = by_hand(net, torch.optim.AdamW(net.parameters(), lr=1e-2))

    assert sites(logger, "gradient") == ["net.first.weight", "net.head.weight"]
    agrees(logger, "gradient", "net.first.weight", expected["gradient"]["net.first.weight"])
    agrees(logger, "update", "net.first.weight", expected["update"]["net.first.weight"])


class Bag(nn.Module):
    """Embeddings of pixels as tokens, sparse gradients on request."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 12, sparse=sparse)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding((16 * x).long()).mean(1))


def test_sparse_gradients_are_those_of_the_dense_layer() -> None:
    module = InOrder(Bag(sparse=True), optimizer="sgd", lr=0.1)
    net = Bag(sparse=False)
    net.load_state_dict(module.net.state_dict())

    logger = run(module, [Gradients(), Updates()])
    expected = by_hand(net, torch.optim.SGD(net.parameters(), lr=0.1))

    agrees(logger, "gradient", "net.embedding.weight", expected["gradient"]["net.embedding.weight"])
    # The order of additions differs, and with it the rounding of the weights.
    agrees(logger, "update", "net.embedding.weight", expected["update"]["net.embedding.weight"], rtol=1e-2)


class Attention(nn.Module):
    """Self-attention over rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8, 8)
        return self.head(self.attention(x, x, x)[0].mean(1))


def trained_by_hand(module: Classifier) -> dict[str, Record]:
    """A copy of an `InOrder`'s net trained with its AdamW."""
    net = deepcopy(module.net)
    return by_hand(net, torch.optim.AdamW(net.parameters(), lr=1e-2))


def test_queries_keys_and_values_are_apart() -> None:
    module = InOrder(Attention())
    expected = trained_by_hand(module)["gradient"]["net.attention.in_proj_weight"]

    logger = run(module, [Gradients()])

    for i, part in enumerate("qkv"):
        agrees(logger, "gradient", f"net.attention.in_proj_weight.{part}", [g[8 * i : 8 * i + 8] for g in expected])


def test_heads_are_apart_on_request() -> None:
    module = InOrder(Attention())
    expected = trained_by_hand(module)["update"]

    logger = run(module, [Updates(heads=True)])

    agrees(
        logger,
        "update",
        "net.attention.in_proj_weight.k.h1",
        [u[12:16] for u in expected["net.attention.in_proj_weight"]],
    )
    agrees(
        logger,
        "update",
        "net.attention.out_proj.weight.h1",
        [u[:, 4:] for u in expected["net.attention.out_proj.weight"]],
    )


def test_a_view_of_the_user_is_taken() -> None:
    module = InOrder()
    expected = trained_by_hand(module)["gradient"]["net.0.weight"]

    logger = run(module, [Gradients(views={"net.0.weight": View("(blocks d) n -> blocks d n", {"blocks": 4})})])

    for i in range(4):
        agrees(logger, "gradient", f"net.0.weight.b{i}", [g[8 * i : 8 * i + 8] for g in expected])


class ComplexNet(nn.Module):
    """A complex matrix between two real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(16, 64, dtype=torch.complex64) / 8)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex64) @ self.mixing.mT).abs())


def test_complex_parameters_have_the_ranks_of_complex_matrices() -> None:
    module = InOrder(ComplexNet(), optimizer="sgd", lr=0.1)
    net = deepcopy(module.net)
    weights, gradients = [], []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _, x, y in batches():
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        weights.append(net.mixing.detach().numpy().astype(np.complex128))
        gradients.append(net.mixing.grad.numpy().astype(np.complex128))
        optimizer.step()

    logger = run(module, [Weights(), Gradients()])

    agrees(logger, "weight", "net.mixing", weights)
    agrees(logger, "gradient", "net.mixing", gradients)


def test_a_parametrised_weight_is_the_one_that_the_layer_uses() -> None:
    """Under spectral normalisation: the original over its largest singular value, for which the layer keeps a pair of
    vectors.
    """
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10), n_power_iterations=1)
    module = InOrder(layer, optimizer="sgd", lr=0.1)
    record = Before(
        weight=lambda: layer.parametrizations.weight.original / spectral(layer.parametrizations.weight),
        gradient=lambda: layer.parametrizations.weight.original.grad,
    )

    logger = run(module, [Weights(), Gradients()], record)

    agrees(logger, "weight", "net.weight", record.kept["weight"])
    agrees(logger, "gradient", "net.weight", record.kept["gradient"])


class Before(L.Callback):
    """Keeps what some functions give before each step."""

    def __init__(self, **functions: Callable[[], Tensor]) -> None:
        self.functions = functions
        self.kept: Record = {name: [] for name in functions}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, function in self.functions.items():
            self.kept[name].append(matrix(function()))


def spectral(parametrization: Any) -> Tensor:
    """The layer's own estimate of the largest singular value."""
    return parametrization[0]._u @ parametrization.original @ parametrization[0]._v


def test_a_lora_pair_is_read_as_its_product() -> None:
    """The gradient as `B dA + dB A`, the update as the difference of products."""
    module = InOrder()
    module.net = peft.get_peft_model(module.net, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    pair = module.net.base_model.model[0]
    a, b = pair.lora_A["default"].weight, pair.lora_B["default"].weight
    record = Before(
        weight=lambda: b.double() @ a.double(),
        gradient=lambda: b.double() @ a.grad.double() + b.grad.double() @ a.double(),
    )

    logger = run(module, [Weights(match="*lora*"), Gradients(), Updates(), OptimizerState("first_moment")], record)

    site = "net.base_model.model.0.lora.default"
    assert sites(logger, "gradient") == sites(logger, "update") == [site]
    agrees(logger, "weight", site, record.kept["weight"])
    agrees(logger, "gradient", site, record.kept["gradient"])
    agrees(
        logger, "update", site, np.diff([*record.kept["weight"], matrix(b.double() @ a.double())], axis=0), rtol=1e-3
    )
    assert sites(logger, "first_moment") == []


# Pairs


def test_weight_ratio_is_that_of_spectral_norms() -> None:
    module = InOrder()
    expected = trained_by_hand(module)

    logger = run(module, [Gradients(), Updates()], statistics=["weight_ratio"])

    for kind in ("gradient", "update"):
        changes, weights = expected[kind]["net.0.weight"], expected["weight"]["net.0.weight"]
        ratios = [
            np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)
            for change, weight in zip(changes, weights, strict=True)
        ]
        assert_close(
            np.array(list(logger.curve(f"{kind}_weight_ratio/net.0.weight").values())),
            np.array(ratios),
            rtol=1e-4,
            atol=0,
        )


def test_a_displacement_is_held_against_the_weight_at_the_start_in_every_layer() -> None:
    """In a plain layer and in a parametrised one, which computes its weight."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))
    module = InOrder(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), layer), optimizer="sgd", lr=1.0)
    record = Before(plain=lambda: module.net[0].weight.double(), computed=lambda: layer.weight.double())

    logger = run(module, [Displacement()], record, statistics=["weight_ratio"])

    for kept, tag in (("plain", "net.0.weight"), ("computed", "net.2.weight")):
        norms = [np.linalg.norm(weight - record.kept[kept][0], 2) for weight in record.kept[kept]]
        found = np.array(list(logger.curve(f"displacement_weight_ratio/{tag}").values()))
        assert_close(found, np.array(norms) / np.linalg.norm(record.kept[kept][0], 2), rtol=1e-3, atol=1e-9)


def directions(gradient: Matrix) -> Matrix:
    """The eight strongest on the short side, or as many as are more than rounding."""
    left, values, _ = np.linalg.svd(
        gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T, full_matrices=False
    )
    live = values[:8] > len(left) * np.finfo(np.float32).eps * values[0]
    return left[:, :8][:, live]


@pytest.mark.parametrize("every", [1, 2])
def test_overlap_is_with_the_sample_before(every: int) -> None:
    module = InOrder()
    gradients = trained_by_hand(module)["gradient"]["net.0.weight"][::every]

    logger = run(module, [Gradients()], every=every, statistics=["subspace_overlap", "subspace_overlap_chance"])

    pairs = [(directions(one), directions(other)) for one, other in pairwise(gradients)]
    overlaps = [np.square(one.T @ other).sum() / min(one.shape[1], other.shape[1]) for one, other in pairs]
    chances = [max(one.shape[1], other.shape[1]) / 32 for one, other in pairs]
    for name, expected in (("overlap", overlaps), ("overlap_chance", chances)):
        curve = np.array(list(logger.curve(f"gradient_subspace_{name}/net.0.weight").values()))
        assert_close(curve, np.array([np.nan, *expected]), rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("every", [1, 2])
def test_drift_is_from_the_sample_before(every: int) -> None:
    module = InOrder()
    gradients = trained_by_hand(module)["gradient"]["net.0.weight"][::every]

    logger = run(module, [Gradients()], every=every, statistics=["spectrum_drift"])

    energies = [np.linalg.svd(gradient, compute_uv=False) ** 2 for gradient in gradients]
    drifts = [np.abs(a / a.sum() - b / b.sum()).sum() / 2 for a, b in pairwise(energies)]
    curve = np.array(list(logger.curve("gradient_spectrum_drift/net.0.weight").values()))
    assert_close(curve, np.array([np.nan, *drifts]), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:The total number of parameters")  # of Lightning's summary
def test_lazy_layers_are_read_once_they_have_a_shape() -> None:
    logger = run(
        InOrder(nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))), [Weights()], statistics=["stable_rank"]
    )

    assert set(logger.curve("weight_stable_rank/net.0.weight")) == set(range(1, len(list(batches()))))
