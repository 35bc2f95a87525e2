"""Routers in real trainings. Oracle: the same tokens routed by hand in numpy, from what came into each router."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_lowrank import Monitor, RouterMonitor
from lightning_lowrank.models.routers import routers
from tests.processes import together
from tests.trainings import Classifier, InOrder, MemoryLogger, digits

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WIDTH, EXPERTS = 16, 4

Rows = NDArray[np.float64]


class Mixture(nn.Module):
    """Experts of which each token takes the best `top_k`, by a plain linear gate."""

    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = self.gate(x).softmax(-1).topk(self.top_k, -1)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        return (values[..., None] * every.gather(-2, chosen[..., None].expand(*chosen.shape, WIDTH))).sum(-2)


class Net(nn.Module):
    """Eight tokens of eight pixels for each digit."""

    def __init__(self, mixture: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mixture, self.head = nn.Linear(8, WIDTH), mixture or Mixture(), nn.Linear(WIDTH, 10)
        with torch.no_grad():
            self.embed.weight *= 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixture(self.embed(x.unflatten(-1, (8, 8))))
        return self.head((x[0] if isinstance(x, tuple) else x).mean(1))


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> dict[str, float]:
    """The first numbers of the only router."""
    L.Trainer(logger=MemoryLogger(), callbacks=[monitor], **QUIET, **{"max_steps": 1} | options).fit(module)
    assert monitor.first is not None and monitor.failures == 0
    (sites,) = {tuple(row) for row in monitor.first.values.values()}
    assert len(sites) == 1
    return {name.removeprefix("router_"): row[sites[0]] for name, row in monitor.first.values.items()}


def entropy(shares: Rows) -> float:
    return float(-sum(share * np.log(share) for share in shares.flatten() if share > 0))


def expected(scores: Rows, top_k: int) -> dict[str, float]:
    """From scores that add up to 1, one token at a time."""
    loads = np.zeros(scores.shape[1])
    for row in scores:
        loads[np.argsort(-row)[:top_k]] += 1
    return {
        "effective_experts": np.exp(entropy(loads / loads.sum())),
        "load_variation": loads.std() / loads.mean(),
        "entropy": np.mean([entropy(row) for row in scores]),
        "idle_share": np.mean(loads == 0),
        "dropped_share": 0.0,
        "tokens": len(scores),
        "experts": scores.shape[1],
    }


def softmax(logits: Rows) -> Rows:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: Rows) -> Rows:
    scores = 1 / (1 + np.exp(-logits))
    return scores / scores.sum(-1, keepdims=True)


def tokens_of(net: Net, num_images: int) -> Rows:
    """What comes into the mixture."""
    with torch.no_grad():
        return net.embed(digits()[:num_images][0].unflatten(-1, (8, 8))).flatten(0, 1).double().numpy()


def array(tensor: Tensor) -> Rows:
    return tensor.detach().double().numpy()


def assert_near(found: dict[str, float], truth: dict[str, float]) -> None:
    assert {name: found[name] for name in truth} == pytest.approx(truth, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_loads_and_entropies_are_those_of_all_tokens(top_k: int, accumulate: int) -> None:
    net = Net(Mixture(top_k))
    gate = net.mixture.gate
    truth = expected(softmax(tokens_of(net, 16 * accumulate) @ array(gate.weight).T + array(gate.bias)), top_k)
    module = InOrder(0, 1, net)
    found = watched(module, RouterMonitor(), accumulate_grad_batches=accumulate)
    values = np.linalg.svd(array(gate.weight), compute_uv=False)  # after the step

    assert_near(found, truth | {"gate_stable_rank": float((values**2).sum() / values[0] ** 2)})
    assert truth["load_variation"] > 0.1


def test_places_beyond_the_capacity_are_dropped() -> None:
    net = Net()
    gate, capacity = net.mixture.gate, 1.1
    scores = softmax(tokens_of(net, 16) @ array(gate.weight).T + array(gate.bias))
    loads = np.bincount(np.argsort(-scores, -1)[:, :2].flatten(), minlength=EXPERTS)
    truth = np.maximum(loads - capacity * loads.sum() / EXPERTS, 0).sum() / loads.sum()
    found = watched(InOrder(0, 1, net), RouterMonitor(capacity=capacity))

    assert found["dropped_share"] == pytest.approx(truth)
    assert truth > 0


def test_a_router_that_has_collapsed_has_one_expert() -> None:
    net = Net(Mixture(1))
    with torch.no_grad():
        net.mixture.gate.bias[2] = 1000.0
    found = watched(InOrder(0, 1, net), RouterMonitor())

    assert_near(found, {"effective_experts": 1.0, "load_variation": np.sqrt(EXPERTS - 1), "idle_share": 0.75})
    assert found["entropy"] == pytest.approx(0, abs=1e-9)


def test_chance_is_what_a_router_has_that_draws() -> None:
    rng = torch.Generator().manual_seed(0)

    class Noisy(InOrder):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.net.drawing(torch.randn(128, EXPERTS, generator=rng))
            return super().training_step(batch, batch_idx)

    net, logger = Net(), MemoryLogger()
    net.drawing = nn.Linear(EXPERTS, EXPERTS, bias=False)
    nn.init.eye_(net.drawing.weight)
    monitor = RouterMonitor(every_n_steps=1, match="net.drawing", top_k=2)
    L.Trainer(logger=logger, callbacks=[monitor], max_steps=40, max_epochs=40, **QUIET).fit(Noisy(0, 1, net))
    loads, effective = (
        np.array(list(logger.curve(f"router/{name}_median").values()))
        for name in ("load_variation", "effective_experts")
    )
    assert monitor.latest is not None
    chance, few = (
        monitor.latest.values[f"router_{name}_chance"]["net.drawing"]
        for name in ("load_variation", "effective_experts")
    )

    assert len(loads) == 40
    assert np.sqrt((loads**2).mean()) == pytest.approx(chance, rel=0.25)
    assert effective.mean() == pytest.approx(few, abs=0.4 * (EXPERTS - few))


def mixtral() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralSparseMoeBlock(MixtralConfig(**sizes))


def qwen3() -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": 8, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes))


def deepseek() -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    sizes = {
        "hidden_size": WIDTH,
        "moe_intermediate_size": 8,
        "num_local_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
    }
    return DeepseekV3MoE(DeepseekV3Config(**sizes, num_experts_per_tok=2, n_group=1, topk_group=1))


def llama4() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return Shaped(Llama4TextMoe(Llama4TextConfig(**sizes)))


class Shaped(nn.Module):
    """A mixture that gives its tokens back as one row."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.inner = mixture

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0].view(x.shape)


def granite() -> nn.Module:
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeConfig, GraniteMoeMoE

    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return GraniteMoeMoE(GraniteMoeConfig(**sizes))


OF_TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Rows], Rows]]] = {
    "Mixtral": (mixtral, softmax),
    "Qwen3-MoE": (qwen3, softmax),
    "DeepSeek-V3": (deepseek, sigmoid),
    "Llama 4": (llama4, sigmoid),
    "GraniteMoE": (granite, softmax),
}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_routers_of_transformers_are_found_and_read(name: str) -> None:
    make, scores = OF_TRANSFORMERS[name]
    net = Net(make())
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.mixture.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / 4)
    (site,) = routers(net)
    gate = array(dict(net.get_submodule(site).named_parameters())["weight"])
    truth = expected(scores(tokens_of(net, 16) @ gate.T), 2)
    found = watched(InOrder(0, 1, net), RouterMonitor())

    assert_near(found, truth)
    assert found["gate_stable_rank"] > 1


def test_what_a_router_of_switch_transformers_drops_is_counted() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersConfig,
        SwitchTransformersSparseMLP,
    )

    sizes = {"d_model": WIDTH, "d_ff": 8, "num_experts": EXPERTS, "expert_capacity": 2, "router_jitter_noise": 0.0}
    net = Net(SwitchTransformersSparseMLP(SwitchTransformersConfig(**sizes, dropout_rate=0.0)))
    gate = array(net.mixture.router.classifier.weight)
    best = (tokens_of(net, 16) @ gate.T).argmax(-1).reshape(16, 8)
    kept = np.array([[min(2, int((row == e).sum())) for e in range(EXPERTS)] for row in best]).sum(0)
    found = watched(InOrder(0, 1, net), RouterMonitor())

    assert found["dropped_share"] == pytest.approx(1 - kept.sum() / best.size)
    assert found["load_variation"] == pytest.approx(kept.std() / kept.mean())
    assert 0 < found["dropped_share"] < 1


class Silent(nn.Module):
    """A mixture whose module does not say how many experts a token uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) * self.gate(x).softmax(-1).amax(-1, keepdim=True)


def test_what_is_not_said_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'net.mixture.gate', a Linear, does not say how many experts a token uses"):
        watched(Classifier(Net(Silent())), RouterMonitor())

    assert watched(Classifier(Net(Silent())), RouterMonitor(top_k=1))["experts"] == EXPERTS


def test_a_model_without_routers_says_what_to_match() -> None:
    with pytest.raises(ValueError, match=r"finds no router; match the layers .* Layers: \['net', 'net.0'"):
        watched(Classifier(), RouterMonitor())


@pytest.mark.parametrize("options", [{"top_k": 0}, {"capacity": 0.0}, {"capacity": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RouterMonitor(**options)


def in_parallel(rank: int, size: int, root: Path) -> Any:
    monitor = RouterMonitor(every_n_steps=2)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp"} if size > 1 else {}
    return watched(InOrder(rank, size, Net()), monitor, **options)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
