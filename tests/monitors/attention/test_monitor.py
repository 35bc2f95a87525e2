"""Heads in real trainings. Oracle: the recorded weights before and after each step, head by head, dense, in numpy."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lowrank import AttentionMonitor, watching
from tests.processes import together
from tests.trainings import Attending, Classifier, Fused, InOrder, MemoryLogger, digits, gpt2, half, logged, trained

TOLD = {"layouts": {"*qkv.weight": "qkv heads d"}}
EVERY_ROW = 10**6
Heads = list[tuple[NDArray[np.float64], NDArray[np.float64]]]


class Grouped(nn.Module):
    """Two heads of keys for four of queries, in layers that are told by their names; scores in eager code."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o_proj, self.head = nn.Linear(12, 8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (8, 8))
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head((x + self.o_proj(y.transpose(1, 2).flatten(2))).flatten(1))


class Steps(L.Callback):
    """Weights before and after each step."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.before.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def blocks(rows: Tensor, heads: int, repeats: int = 1) -> list[NDArray[np.float64]]:
    return [part.double().numpy() for part in rows.chunk(heads) for _ in range(repeats)]


def of_attending(w: dict[str, Tensor]) -> Heads:
    rows = w["net.qkv.weight"]
    return list(zip(blocks(rows[:8], 2), blocks(rows[8:16], 2), strict=True))


def of_torch(w: dict[str, Tensor]) -> Heads:
    layers = [w[f"net.layer.layers.{i}.self_attn.in_proj_weight"] for i in range(2)]
    return [pair for rows in layers for pair in zip(blocks(rows[:8], 2), blocks(rows[8:16], 2), strict=True)]


def of_gpt2(w: dict[str, Tensor]) -> Heads:
    rows = w["net.network.h.0.attn.c_attn.weight"].T
    return list(zip(blocks(rows[:12], 3), blocks(rows[12:24], 3), strict=True))


def of_grouped(w: dict[str, Tensor]) -> Heads:
    return list(zip(blocks(w["net.q_proj.weight"], 4), blocks(w["net.k_proj.weight"], 2, repeats=2), strict=True))


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[dict[str, Tensor]], Heads], list[str]]] = {
    "told by the user": (Attending, TOLD, of_attending, ["net.h0", "net.h1"]),
    "torch": (Fused, {}, of_torch, [f"net.layer.layers.{i}.self_attn.h{h}" for i in range(2) for h in range(2)]),
    "GPT-2": (gpt2, {}, of_gpt2, [f"net.network.h.0.attn.h{h}" for h in range(3)]),
    "grouped": (Grouped, {}, of_grouped, [f"net.h{h}" for h in range(4)]),
}


def ranks(matrix: NDArray[np.float64]) -> tuple[float, float]:
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    shares = energies / energies.sum()
    shares = shares[shares > 0]
    return energies.sum() / energies[0], float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_are_those_of_the_dense_update_of_each_head(net: str, accumulate: int) -> None:
    make, options, split, labels = NETS[net]
    monitor, steps = AttentionMonitor(every_n_steps=1, **options), Steps()
    logged([monitor, steps], lambda: Classifier(make()), max_steps=2, accumulate_grad_batches=accumulate)

    assert monitor.latest is not None and monitor.failures == 0
    found = monitor.latest.values
    assert list(found["qk_update_stable_rank"]) == labels
    pairs = zip(labels, split(steps.before[-1]), split(steps.after[-1]), strict=True)
    for label, (q, k), (new_q, new_k) in pairs:
        dq, dk = new_q - q, new_k - k
        for name, matrix in (("qk_update", dq.T @ k + q.T @ dk), ("qk_update_second_order", dq.T @ dk)):
            expected = ranks(matrix)
            assert found[f"{name}_stable_rank"][label] == pytest.approx(expected[0], rel=1e-5)
            assert found[f"{name}_effective_rank_energy"][label] == pytest.approx(expected[1], rel=1e-5)


def test_random_updates_have_the_ranks_of_chance() -> None:
    monitor = AttentionMonitor(every_n_steps=1, scores=False)
    attention = nn.MultiheadAttention(64, 8, bias=False)

    with watching(attention, (optimizer := torch.optim.SGD(attention.parameters(), lr=1.0)), monitor) as watch:
        generator = torch.Generator().manual_seed(0)
        with watch.batch(None), torch.no_grad():
            for weight in attention.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    assert monitor.latest is not None
    for name in ("qk_update", "qk_update_second_order"):
        for rank in ("stable_rank", "effective_rank_energy"):
            own, chance = (list(monitor.latest.values[f"{name}_{rank}{end}"].values()) for end in ("", "_chance"))
            assert np.mean(own) == pytest.approx(chance[0], rel=0.05)


def test_scores_are_those_of_the_step_written_out() -> None:
    monitor, steps = AttentionMonitor(every_n_steps=1, num_rows=EVERY_ROW, **TOLD), Steps()
    net = Attending()
    logged([monitor, steps], lambda: InOrder(0, 1, net), max_steps=1)
    assert monitor.latest is not None
    found, w = monitor.latest.values, steps.before[0]
    x = digits()[:16][0].unflatten(-1, (8, 8))
    q, k, _ = (x @ w["net.qkv.weight"].T + w["net.qkv.bias"]).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).numpy()
    scores = np.einsum("bhld,bhsd->bhls", q, k)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    entropy = -(shares * np.log(shares)).sum(-1)

    for head, label in enumerate(["net.h0", "net.h1"]):
        assert found["attention_rows"][label] == 128
        assert found["attention_max_logit"][label] == pytest.approx(scores[:, head].max(), rel=1e-4)
        assert found["attention_entropy"][label] == pytest.approx(entropy[:, head].mean(), rel=1e-4)
        assert found["attention_sink_share"][label] == pytest.approx(shares[:, head, :, 0].mean(), rel=1e-4)
        assert found["attention_entropy_chance"][label] == pytest.approx(np.log(8))
        assert found["attention_sink_share_chance"][label] == pytest.approx(1 / 8)
    assert found["attention_largest_logit"][""] == pytest.approx(scores.max(), rel=1e-4)


def test_loggers_get_few_curves_unless_asked() -> None:
    logger, _ = logged([AttentionMonitor(every_n_steps=1)], lambda: Classifier(Fused()), max_steps=1)
    single, _ = logged([AttentionMonitor(every_n_steps=1, detail="standard")], lambda: Classifier(Fused()), max_steps=1)

    assert {tag for tag in logger.numbers() if tag.startswith("attention/")} == {
        "attention/qk_update_stable_rank_median",
        "attention/qk_update_effective_rank_energy_median",
        "attention/entropy_median",
        "attention/sink_share_median",
        "attention/largest_logit",
    }
    layer = "net.layer.layers.1.self_attn.h0"
    assert {f"qk_update_stable_rank/{layer}", f"attention_max_logit/{layer}"} <= single.tags()


def cases() -> dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]]:
    return {
        "accumulation": (lambda: Classifier(Attending()), lambda: {"accumulate_grad_batches": 3}),
        "16-mixed": (lambda: Classifier(Attending()), lambda: {"plugins": half()}),
        "bf16-mixed": (lambda: Classifier(Grouped()), lambda: {"precision": "bf16-mixed"}),
        "bf16-true": (lambda: Classifier(Grouped()), lambda: {"precision": "bf16-true"}),
        "LBFGS": (lambda: Classifier(Grouped(), optimizer="lbfgs", max_iter=4), dict),
        "dropout": (lambda: Classifier(gpt2()), dict),
        "weight norm": (lambda: Classifier(normed()), dict),
    }


def normed() -> nn.Module:
    net = Grouped()
    nn.utils.parametrizations.weight_norm(net.q_proj)
    return net


@pytest.mark.parametrize("case", cases())
def test_training_is_the_same_to_the_last_bit(case: str, tmp_path: Path) -> None:
    make, options = cases()[case]
    told = TOLD if case in ("accumulation", "16-mixed") else {}
    monitor = AttentionMonitor(every_n_steps=2, detail="all", per_site=True, **told)
    alone = trained(make, options(), [], tmp_path / "alone")
    watched = trained(make, options(), [monitor], tmp_path / "watched")

    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    assert monitor.failures == 0
    assert monitor.latest is not None
    assert all(np.isfinite(list(row.values())).all() for row in monitor.latest.values.values())


class Frozen(nn.Module):
    """An encoder that is never trained, in eval mode, whose attention takes torch's fast path; and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(64, 10)
        self.train()

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.frozen.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.frozen(x.view(-1, 8, 8))).flatten(1))


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_a_fast_path_is_taken_as_without_and_what_it_hides_is_blank_with_one_warning(tmp_path: Path) -> None:
    monitor = AttentionMonitor(every_n_steps=1)
    alone = trained(lambda: Classifier(Frozen()), {}, [], tmp_path / "alone")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched = trained(lambda: Classifier(Frozen()), {}, [monitor], tmp_path / "watched")
    ours = [str(one.message) for one in told if "lightning_lowrank" in str(one.message)]
    assert monitor.latest is not None
    values = monitor.latest.values

    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    assert len(ours) == 1 and "scores of 'net.frozen.self_attn' are unknown: no call" in ours[0]
    for name, is_there in {"attention_entropy": [False, True], "qk_update_stable_rank": [False, True]}.items():
        found = [values[name][f"net.{layer}.self_attn.h0"] for layer in ("frozen", "layer")]
        assert np.isfinite(found).tolist() == is_there


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(Fused(), backend="eager"))  # type: ignore[arg-type]


def compiled_in_place() -> nn.Module:
    net = Fused()
    net.compile(backend="eager")
    return nn.Sequential(net)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no attention": (
        lambda: Classifier().net,
        {},
        r"finds no attention among \['net.0.weight'.*name its weights: layouts",
    ),
    "an order that nothing tells": (Attending, {}, r"'net.qkv.weight', their order is unknown.*name its weights"),
    "a pattern": (Fused, {"match": "*.encoder"}, r"match: '\*.encoder' matches nothing; nearest: .*net.layer.layers.0"),
    "all excluded": (Fused, {"exclude": "*"}, "leaves out all attention layers"),
    "heads": (Attending, TOLD | {"heads": {"*qkv.weight": 5}}, "24 rows do not divide into 5 heads"),
    "compiled": (compiled, {}, "'net.0.*self_attn'.*inside a compiled module never run.*scores=False"),
    "compiled in place": (
        compiled_in_place,
        {},
        "'net.0.*self_attn'.*inside a compiled module never run.*scores=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_watched_is_refused_before_training(case: str) -> None:
    make, options, message = REFUSED[case]
    module = Classifier(make())

    with pytest.raises(ValueError, match=message):
        logged([AttentionMonitor(**options)], lambda: module)
    assert module.losses == []


@pytest.mark.parametrize(
    "options", [{"num_rows": 0}, {"heads": {"*": 0}}, {"layouts": {"*": 3}}, {"scores": 1}, {"every_n_steps": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AttentionMonitor(**options)


def test_without_scores_compiled_models_are_watched() -> None:
    monitor = AttentionMonitor(every_n_steps=1, scores=False)
    logged([monitor], lambda: Classifier(compiled()), max_steps=1)

    assert monitor.failures == 0 and monitor.latest is not None
    assert "attention_entropy" not in monitor.latest.values
    assert np.isfinite(list(monitor.latest.values["qk_update_stable_rank"].values())).all()


def in_parallel(rank: int, size: int, root: Path) -> Any:
    monitor, logger = AttentionMonitor(every_n_steps=1, num_rows=EVERY_ROW, **TOLD), MemoryLogger()
    options = {"devices": size, "strategy": "ddp"} if size > 1 else {}
    L.seed_everything(0, verbose=False)
    logged([monitor], lambda: InOrder(rank, size, Attending()), max_steps=2, logger=logger, **options)
    return monitor.failures, monitor.latest and monitor.latest.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert first == second and first[0] == alone[0] == 0
    for quantity, row in alone[1].items():
        assert first[1][quantity] == pytest.approx(row, rel=1e-3)
