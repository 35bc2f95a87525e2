"""The laws of ReLoRA: what a restart leaves, what it resets, how ranks add up. Oracles: numpy, and counting."""

import copy
import math
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_lowrank import ReLoRA, watching
from lightning_lowrank.methods.lora.restarts import Reset
from tests.trainings import QUIET, Classifier, Fused, MemoryLogger, gpt2, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")


class Loop:
    """A loop of steps on random images."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        torch.manual_seed(0)
        self.method = ReLoRA(**{"r": 3, "every": 4, "rewarm": 0, "every_n_steps": 1} | options)
        self.method.prepare(net)
        self.net, self.optimizer = net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    def run(self, steps: int, at: Any = lambda i: None) -> "Loop":
        dtype = next(self.net.parameters()).dtype
        with watching(self.net, self.optimizer, self.method) as watch:
            for i in range(steps):
                with watch.batch():
                    self.optimizer.zero_grad()
                    watch.loss(self.net(torch.rand(8, 64, dtype=dtype)).square().mean()).backward()
                    self.optimizer.step()
                    kept = at(i)
                if callable(kept):
                    kept()
        return self


@pytest.mark.parametrize("make", [lambda: mlp(32), Fused, gpt2], ids=["mlp", "attention", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_the_function_is_the_same_after_a_restart(dtype: torch.dtype, tolerance: float, make: Any) -> None:
    net = make().to(dtype)
    x, seen = torch.rand(4, 64, dtype=dtype), []

    def look(i: int) -> Any:
        if i == 3:
            net.eval()
            seen.append(net(x).detach())
            net.train()
            return lambda: seen.append(net.eval()(x).detach())
        return None

    loop = Loop(net, r=2).run(4, look)

    assert loop.method._act.cycle == 1
    assert_close(seen[1], seen[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("words", "share"), [("zero", 1.0), ("magnitude:0.9", 0.9), ("random:0.75", 0.75), ("none", 0.0)]
)
def test_the_share_that_is_reset_is_as_asked(words: str, share: float) -> None:
    parameter = nn.Parameter(torch.rand(20, 5))
    moments = {"exp_avg": torch.rand(20, 5) + 1, "exp_avg_sq": torch.rand(20, 5) + 1, "step": torch.tensor(7.0)}
    before = copy.deepcopy(moments)

    zeroed, total = Reset.of(words)(moments, parameter, torch.Generator().manual_seed(0))

    zeros = sum(int((moments[key] == 0).sum()) for key in ("exp_avg", "exp_avg_sq"))
    assert zeros / 200 == pytest.approx(share) and (zeroed, total) == (zeros, 200)
    assert moments["step"] == (0 if words == "zero" else 7)
    left = moments["exp_avg"] != 0
    assert_close(moments["exp_avg"][left], before["exp_avg"][left])
    if words.startswith("magnitude"):
        assert before["exp_avg"][left].min() >= before["exp_avg"][~left].max()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adamax, torch.optim.RMSprop])
@pytest.mark.parametrize("words", ["magnitude:0.9", "magnitude:0.5", "random:0.5", "zero"])
def test_no_moment_is_left_over_one_that_was_reset(words: str, kind: type[torch.optim.Optimizer]) -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    loop = Loop(net, every=4, reset=words, match="0.weight")
    loop.optimizer = kind(net.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.RMSprop else {}))
    pair, largest = (net[0].lora_A, net[0].lora_B), []

    loop.run(4)
    for p in pair:
        first, *others = [t == 0 for t in loop.optimizer.state[p].values() if t.ndim]
        assert others and all(torch.equal(first, other) for other in others)
    loop.run(3, lambda i: largest.append(max(float(p.detach().abs().max()) for p in pair)))

    assert max(largest) < 1  # a learning rate of 1e-3 moves nothing further


def test_moments_that_are_equal_are_reset_by_share_too() -> None:
    state = {"exp_avg": torch.zeros(10, 10)}

    assert Reset.of("magnitude:0.5")(state, nn.Parameter(torch.zeros(10, 10)), torch.Generator()) == (50, 100)


def test_ranks_add_up_until_the_matrix_is_full() -> None:
    net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    before, ranks = net[0].weight.detach().numpy().copy(), []
    loop = Loop(net, match="0.weight")

    def look(i: int) -> Any:
        change = net[0].weight.detach().numpy() - before
        return lambda: (
            ranks.append(np.linalg.matrix_rank(net[0].weight.detach().numpy() - before)) if i % 4 == 3 else change
        )

    loop.run(24, look)

    assert ranks == [3, 6, 9, 12, 12, 12]
    reported = loop.method.latest.values["lora_update_rank"]["0.weight"]
    assert reported == 12 == loop.method.latest.values["relora_rank_bound"]["0.weight"]


def test_rates_rise_after_a_restart_and_groups_stay_the_users() -> None:
    net = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    loop = Loop(net, every=3, rewarm=4, match="0.weight")
    loop.optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    moved: list[float] = []

    def look(i: int) -> Any:
        p = net[1].bias
        moved.append(float((p.detach() - look.last).norm() / p.grad.norm()))
        assert loop.optimizer.param_groups[0]["lr"] == 1.0 and len(loop.optimizer.param_groups) == 1
        look.last = p.detach().clone()

    look.last = net[1].bias.detach().clone()
    loop.run(6, look)

    assert moved == pytest.approx([1, 1, 1, 0.25, 0.5, 0.75], rel=1e-3)


def test_in_a_warm_start_weights_train_and_pairs_after_it() -> None:
    net = mlp(32)
    loop, weights, pairs = Loop(net, warm_start_steps=2, match="0.weight"), [], []

    def look(i: int) -> None:
        weights.append(net[0].weight.detach().clone())
        pairs.append(net[0].lora_B.detach().clone())

    loop.run(4, look)

    assert not torch.equal(weights[0], weights[1]) and not pairs[1].any()
    assert torch.equal(weights[1], weights[3]) and pairs[3].any()
    assert net[0].weight not in loop.optimizer.state


def test_restarts_are_reported() -> None:
    logger = MemoryLogger()
    method = ReLoRA(every=3, rewarm=0, reset="random:0.5", r=2, every_n_steps=1, detail="all")
    L.Trainer(**QUIET, max_epochs=2, logger=logger, callbacks=[method]).fit(Classifier(mlp(32)))

    assert logger.curve("relora/cycles") == {i: float(i // 3) for i in range(16)}
    shares = logger.curve("relora/reset_share")
    assert all(value == 0.5 for step, value in shares.items() if step >= 3)
    assert math.isfinite(logger.curve("relora_overlap/net.0.weight")[6])
    assert logger.curve("relora_overlap_random/net.0.weight")[6] == 2 / 32


@pytest.mark.parametrize("words", ["magnitude", "magnitude:0", "random:2", "some", "zero:1", "magnitude:x"])
def test_a_reset_that_says_nothing_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="reset="):
        ReLoRA(reset=words)
