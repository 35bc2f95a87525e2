"""Advice on ranks, from runs: energies are those of numpy, and LoRA, GaLore and peft take the ranks as they are."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import CurvatureMonitor, GaLore, LoRA, RankAdvisor
from lightning_lowrank.methods.rank_advisor import stable_rate
from lightning_lowrank.reports.rank_advice import Energies, advise
from tests.trainings import QUIET, Classifier, MemoryLogger, Ordered, mlp


def made(seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(mlp(16), **options)


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
    L.seed_everything(3, verbose=False)
    logger = MemoryLogger()
    L.Trainer(**QUIET | {"max_steps": 7, "logger": logger} | options, callbacks=list(callbacks)).fit(module)
    return logger


def energies(matrix: Tensor) -> Any:
    return np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False) ** 2


class KeepGradients(L.Callback):
    """Energies of the gradients of even steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step % 2 == 0:
            for name, p in pl_module.named_parameters():
                if p.ndim == 2 and p.grad is not None:
                    self.sums[name] = self.sums.get(name, 0) + energies(p.grad)


def test_energies_are_those_of_the_way_and_of_the_gradients_by_numpy() -> None:
    module, advisor, kept = made(), RankAdvisor(1000, every_n_steps=2), KeepGradients()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, advisor, kept)

    by_updates, by_gradients = advisor.advice, advisor.advise(1000, by="gradients")

    names = list(by_updates.energies)
    assert len(names) == 2 and set(names) < set(before)
    for name in names:
        way = energies(module.get_parameter(name) - before[name])
        assert_allclose(by_updates.energies[name].values, way, rtol=1e-5, atol=1e-9 * way[0])
        sums = kept.sums[name]
        assert_allclose(by_gradients.energies[name].values, sums, rtol=1e-5, atol=1e-9 * sums[0])
        rank = by_updates.ranks[name]
        assert by_updates.share(name) == pytest.approx(way[:rank].sum() / way.sum())


def test_the_budget_is_kept_and_uniform_ranks_of_the_same_budget_capture_no_more() -> None:
    advisor = RankAdvisor(600)
    fit(made(), advisor)

    for budget in (250, 600, 1500):
        advice = advisor.advise(budget)
        shapes = {name: one.shapes[0] for name, one in advice.energies.items()}
        assert advice.spent == sum(rank * sum(shapes[name]) for name, rank in advice.ranks.items()) <= budget
        assert advice.cost_of(advice.uniform) <= budget
    assert advisor.advise(10**6).captured(advisor.advise(10**6).ranks) == pytest.approx(1)


def test_the_curves_say_the_ranks_and_how_far_the_advice_still_moves() -> None:
    advisor = RankAdvisor(600, every_n_steps=2, per_site=True)
    logger = fit(made(), advisor)

    ranks = {name: list(logger.curve(f"advisor_rank/{name}").values()) for name in advisor.advice.ranks}
    moved = list(logger.curve("advisor/moved").values())

    costs = {name: one.cost("lora") for name, one in advisor.advice.energies.items()}
    spent = [sum(costs[name] * ranks[name][i] for name in ranks) for i in range(4)]
    new = [sum(costs[name] * max(0, ranks[name][i] - ranks[name][i - 1]) for name in ranks) for i in range(1, 4)]
    assert_allclose(moved, [1, *(one / whole for one, whole in zip(new, spent[1:], strict=True))])


def test_a_resumed_run_gives_the_advice_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, rest = (RankAdvisor(600, every_n_steps=2) for _ in range(3))
    quiet: dict[str, Any] = QUIET | {"logger": False, "num_sanity_val_steps": 0}
    torch.manual_seed(0)
    L.Trainer(**quiet, max_steps=6, callbacks=[whole]).fit(Ordered())
    torch.manual_seed(0)
    trainer = L.Trainer(**quiet, max_steps=3, callbacks=[first])
    trainer.fit(Ordered())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    L.Trainer(**quiet, max_steps=6, callbacks=[rest]).fit(
        Ordered(), ckpt_path=tmp_path / "some.ckpt", weights_only=True
    )

    assert whole.advice == rest.advice != first.advice
    assert whole.advise(600, by="gradients") == rest.advise(600, by="gradients")


def test_lora_takes_the_ranks_and_makes_as_many_numbers_as_were_said() -> None:
    advisor = RankAdvisor(800)
    fit(made(), advisor)
    module = made()

    LoRA(advisor.advice.patterns).prepare(module)

    pairs = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in pairs.values()) == advisor.advice.spent
    assert {
        f"{name.removesuffix('lora_A')}weight": len(p) for name, p in pairs.items() if name.endswith("lora_A")
    } == advisor.advice.patterns


def test_galore_takes_the_ranks_and_keeps_as_many_numbers_as_were_said() -> None:
    advisor = RankAdvisor(800, method="galore", by="gradients")
    fit(made(), advisor)
    module, galore = made(), GaLore(advisor.advice.patterns, basis="svd", on_refresh="keep")
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(**QUIET | {"max_steps": 2, "logger": False}, callbacks=[galore])
    trainer.fit(module)

    state = trainer.optimizers[0].state
    moments = sum(
        t.numel()
        for name, p in module.named_parameters()
        if name in advisor.advice.ranks
        for t in state[p].values()
        if t.ndim == 2
    )
    assert moments + galore.bytes_of_bases // 4 == advisor.advice.spent


def test_peft_takes_the_ranks(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    advisor = RankAdvisor(800)
    module = made()
    fit(module, advisor)

    config = peft.LoraConfig(**advisor.advice.peft(within="net"))
    adapted = peft.get_peft_model(nn.Module.__getattr__(module, "net"), config)

    ranks = {
        name.removeprefix("base_model.model."): layer.r["default"]
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {f"net.{name}.weight": rank for name, rank in ranks.items()} == advisor.advice.patterns
    assert {layer.scaling["default"] for layer in adapted.modules() if hasattr(layer, "scaling")} == {1.0}


def test_of_a_lora_run_it_reads_the_products_under_the_names_of_the_weights() -> None:
    module, advisor = made(), RankAdvisor(300, match=["*0*lora_*", "*2*lora_*"])
    fit(module, LoRA(6), advisor)

    for name, one in advisor.advice.energies.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        product = energies(layer.lora_B @ layer.lora_A)  # type: ignore[operator]
        assert_allclose(one.values, product, rtol=1e-4, atol=1e-6 * product[0])
    assert len(advisor.advice.patterns) == 2


class Linear(L.LightningModule):
    """A quadratic loss in one weight."""

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.net = nn.Linear(12, 8, bias=False)
        self.rate = rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(32, n, generator=generator) for n in (12, 8))
        return DataLoader(TensorDataset(x * torch.arange(1, 13), y), 32)


def test_the_rate_of_gradient_descent_is_that_of_the_curvature_in_the_second_factors() -> None:
    advisor = RankAdvisor(100, match="net.weight")
    fit(Linear(1e-4), CurvatureMonitor("standard", ["hessian"], every_n_steps=1), advisor, max_steps=4)
    (x, y) = next(iter(Linear().train_dataloader()))
    hessian = 2 * x.T @ x / y.numel()  # of a row of the weight
    limits = []
    for seed in range(20):
        torch.manual_seed(seed)
        module = Linear()
        LoRA(advisor.advice.patterns, seed=seed).prepare(module)
        a = module.net.lora_A.detach()  # type: ignore[union-attr]
        limits.append(2 / float(torch.linalg.eigvalsh(a @ hessian @ a.T)[-1]))

    rates = advisor.advice.rates
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert rates["ten_times"] == pytest.approx(1e-3)
    assert rates["gradient_descent_below"] == pytest.approx(stable_rate(top, advisor.advice), rel=1e-3)
    assert np.median(limits) / 30 < rates["gradient_descent_below"] < np.median(limits)


def test_a_run_that_it_looks_at_is_the_run_without_it() -> None:
    alone, watched = made(), made()
    fit(alone)
    fit(watched, RankAdvisor(600, every_n_steps=2))

    assert all(torch.equal(*pair) for pair in zip(alone.parameters(), watched.parameters(), strict=True))
    assert alone.losses == watched.losses


def test_a_weight_that_is_computed_is_read_as_the_layer_has_it() -> None:
    module, advisor = made(), RankAdvisor(600, match="net.0*")
    nn.utils.parametrizations.weight_norm(module.net[0])  # type: ignore[index]
    before = module.net[0].weight.detach().clone()  # type: ignore[index]
    fit(module, advisor)

    way = energies(module.net[0].weight - before)  # type: ignore[index]
    assert_allclose(advisor.advice.energies["net.0.weight"].values, way, rtol=1e-4, atol=1e-8 * way[0])


def test_a_fused_weight_gets_one_rank_for_all_its_parts() -> None:
    class Attention(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, 8, 8)
            return self.net[1](self.net[0](rows, rows, rows)[0].flatten(1))  # type: ignore[index]

    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    module, advisor = Attention(nn.Sequential(attention, nn.Linear(64, 10))), RankAdvisor(100, match="*in_proj_weight")
    before = attention.in_proj_weight.detach().clone()
    fit(module, advisor)
    pairs = Attention(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(64, 10)))
    LoRA(advisor.advice.patterns).prepare(pairs)

    parts = (attention.in_proj_weight - before).chunk(3)
    (one,) = advisor.advice.energies.values()
    assert_allclose(one.values, sum(map(energies, parts)), rtol=1e-5, atol=1e-9)
    assert sum(p.numel() for name, p in pairs.named_parameters() if "lora_" in name) == advisor.advice.spent


def test_memory_is_a_budget_too() -> None:
    known = {"a.weight": Energies(((30, 20),), tuple(range(20, 0, -1)))}

    assert advise(known, "1.6 kB").budget == 100 and advise(known, "1.6 kB").ranks == {"a.weight": 2}
    assert advise(known, "0.4 kB", method="galore").ranks == {"a.weight": 1}  # 20 + 2 * 30 numbers


def test_json_has_what_the_table_has(tmp_path: Path) -> None:
    advisor = RankAdvisor(800)
    fit(made(), advisor)
    advisor.advice.save(tmp_path / "ranks.json")

    told = json.loads((tmp_path / "ranks.json").read_text())

    assert told["ranks"] == advisor.advice.ranks and told["spent"] <= told["budget"] == 800
    assert 0 < told["captured_by_uniform"] <= told["captured"] < 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"budget": 0}, "budget=0 must be a whole number of parameters"),
        ({"budget": "8 apples"}, "or memory, such as '8 MB'"),
        ({"budget": 10, "method": "dora"}, "method is 'lora' or 'galore'"),
        ({"budget": 10, "by": "weights"}, "by is 'updates' or 'gradients'"),
        ({"budget": 10, "least": -1}, "least=-1 must be a whole number"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RankAdvisor(**options)


def test_what_cannot_be_advised_on_is_refused_before_training() -> None:
    frozen = made()
    frozen.requires_grad_(False)
    frozen.net[4].requires_grad_(True)  # type: ignore[index,union-attr]

    with pytest.raises(ValueError, match="none of the chosen matrices is trained"):
        fit(frozen, RankAdvisor(1000))
    with pytest.raises(ValueError, match="is too small: rank 1 for every matrix"):
        fit(made(), RankAdvisor(50))
