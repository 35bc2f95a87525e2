"""Updates of weights in half precision. Oracle: the optimizer's own step in float32, kept beside, in numpy."""

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import Monitor, Probe, RankMonitor, UpdateSizes
from tests.trainings import QUIET, Classifier, MemoryLogger

STATISTICS = ("effective_rank", "relative_effective_rank", "stable_rank", "frobenius_norm")


class Mastered(torch.optim.Optimizer):
    """Gradient descent on copies in float32, which are rounded to the weights."""

    def __init__(self, parameters: Any, lr: float, *, keeps: bool = True) -> None:
        super().__init__(parameters, {"lr": lr})
        self.steps: list[dict[int, tuple[Tensor, Tensor]]] = []
        self.keeps = keeps
        self.masters = {p: p.detach().float().clone() for group in self.param_groups for p in group["params"]}
        if keeps:
            for p, master in self.masters.items():
                self.state[p]["master_param"] = master

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        moves = {}
        for group in self.param_groups:
            for p in group["params"]:
                before = self.masters[p].clone()
                self.masters[p] -= group["lr"] * p.grad.float()
                moves[id(p)] = (before, self.masters[p].clone())
                p.copy_(self.masters[p])
        self.steps.append(moves)
        return loss


class Half(Classifier):
    """A classifier whose weights are bfloat16."""

    def __init__(self, lr: float = 1e-2, *, keeps: bool = True) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
        self.lr, self.keeps = lr, keeps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": [self.net[0].weight], "name": "first"}, {"params": [self.net[2].weight]}]
        self.own = Mastered(groups, self.lr, keeps=self.keeps)
        return self.own


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> dict[str, dict[str, float]]:
    settings = QUIET | {"max_steps": 1, "logger": MemoryLogger(), "precision": "bf16-true"} | options
    L.Trainer(**settings, callbacks=[monitor]).fit(module)
    assert monitor.first is not None and monitor.failures == 0
    return {name: dict(row) for name, row in monitor.first.values.items()}


def entropy_rank(matrix: Any) -> float:
    shares = np.linalg.svd(matrix, compute_uv=False)
    shares = shares[shares > 1e-9 * shares[0]] / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_the_copy_in_float32_that_the_optimizer_keeps_is_read() -> None:
    module = Half()
    found = watched(module, RankMonitor("updates", STATISTICS))
    before, after = module.own.steps[0][id(module.net[0].weight)]
    move = (after - before).double().numpy()

    assert found["update_effective_rank"]["net.0.weight"] == pytest.approx(entropy_rank(move), rel=1e-3)
    assert found["update_frobenius_norm"]["net.0.weight"] == pytest.approx(np.linalg.norm(move), rel=1e-5)


def test_without_one_effective_ranks_of_what_mostly_stays_are_blank_and_the_others_are_there() -> None:
    module = Half(keeps=False)
    found = watched(module, RankMonitor("updates", STATISTICS))

    assert np.isnan(found["update_effective_rank"]["net.0.weight"])
    assert np.isnan(found["update_relative_effective_rank"]["net.0.weight"])
    assert found["update_stable_rank"]["net.0.weight"] > 0 < found["update_frobenius_norm"]["net.0.weight"]


def test_large_updates_in_half_precision_keep_their_ranks() -> None:
    found = watched(Half(lr=1e4, keeps=False), RankMonitor("updates", STATISTICS))

    assert np.isfinite(found["update_effective_rank"]["net.0.weight"])


def test_rows_that_do_not_move_at_all_blank_nothing() -> None:
    class Rows(Half):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.net[0].weight.register_hook(lambda gradient: gradient * (torch.arange(32)[:, None] < 4) * 1e6)
            return super().configure_optimizers()

    found = watched(Rows(keeps=False), RankMonitor("updates", STATISTICS))

    assert 1 <= found["update_effective_rank"]["net.0.weight"] <= 4.5


def sizes(module: Half, **options: Any) -> dict[str, dict[str, float]]:
    names = [quantity.name for quantity in UpdateSizes().quantities]
    return watched(module, Monitor([Probe("update_size", UpdateSizes(), names)]), **options)


@pytest.mark.parametrize("keeps", [False, True])
def test_sizes_are_those_of_each_group(keeps: bool) -> None:
    module = Half(keeps=keeps)
    began = {id(p): p.detach().bfloat16().double().numpy() for p in module.parameters()}
    found = sizes(module)

    for label, layer in (("first", 0), ("group_1", 2)):
        weight = module.net[layer].weight
        start = began[id(weight)]
        moved = weight.detach().double().numpy() - start
        before, after = (part.double().numpy() for part in module.own.steps[0][id(weight)])
        step = after - before if keeps else moved
        truth = {
            "rms": np.sqrt((step**2).mean()),
            "weight_rms": np.sqrt((start**2).mean()),
            "ratio": np.linalg.norm(step) / np.linalg.norm(start),
            "unchanged_share": (moved == 0).mean(),
        }
        assert {name: found[f"update_size_{name}"][label] for name in truth} == pytest.approx(truth, rel=1e-4)
    assert found["update_size_unchanged_share"]["first"] > 0.02


def test_in_full_precision_nearly_all_weights_move() -> None:
    found = sizes(Half(), precision="32-true")

    assert found["update_size_unchanged_share"]["group_1"] < 0.02
