"""Sizes of activations, gradients and weights in real trainings. Oracle: the step by hand, in numpy and autograd."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_lowrank import ActivationMonitor, Monitor
from tests.processes import together
from tests.trainings import Classifier, InOrder, MemoryLogger, digits, half

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WIDTH, DEPTH = 16, 3


class Block(nn.Module):
    """Two branches that write to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """Blocks on a stream, one of whose channels is massive and one of which is nearly silent."""

    def __init__(self, block: type[nn.Module] = Block, *, recomputes: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recomputes = recomputes
        self.embed, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        with torch.no_grad():
            self.embed.bias[3], self.embed.bias[5] = 1000.0, -200.0
            for layer in (self.embed, *(getattr(b, name) for b in self.blocks for name in ("mix", "down"))):
                layer.weight[7], layer.bias[7] = 0.0, 1e-4
            self.blocks[1].mix.weight[2] *= 9

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.recomputes is None else checkpoint(block, x, use_reentrant=self.recomputes)
        return self.head(x)


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    L.Trainer(logger=logger, callbacks=[monitor], **QUIET, **{"max_steps": 1} | options).fit(module)
    return logger


def norm(*tensors: Tensor) -> float:
    return float(np.sqrt(sum((tensor.detach().double().numpy() ** 2).sum() for tensor in tensors)))


def expected(net: Residual, batches: list[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """By quantity and site, of all batches together."""
    streams: list[list[Tensor]] = [[] for _ in range(DEPTH + 1)]
    written: dict[str, list[Tensor]] = {}
    for images, labels in batches:
        x = net.embed(images)
        for i, block in enumerate(net.blocks):
            x.retain_grad()
            streams[i].append(x)
            mixed = block.mix(block.norm(x))
            down = block.down(torch.relu(block.up(block.norm(x + mixed))))
            x = x + mixed + down
            written.setdefault(f"{i}.mix", []).append(mixed)
            written.setdefault(f"{i}.down", []).append(down)
        x.retain_grad()
        streams[DEPTH].append(x)
        cross_entropy(net.head(x), labels).backward()
    net.zero_grad()
    found: dict[str, dict[str, float]] = {}
    for i in range(DEPTH):
        before, after = streams[i], streams[i + 1]
        rows = torch.cat(after).detach().double().numpy()
        tops, squares, means = np.abs(rows).max(0), (rows**2).mean(0), np.abs(rows).mean(0)
        numbers = {
            "rms": np.sqrt((rows**2).mean()),
            "growth": norm(*after) / norm(*before),
            "depth_growth": norm(*after) / norm(*streams[0]),
            "write_ratio": norm(*(b - a for a, b in zip(before, after, strict=True))) / norm(*before),
            "gradient_gain": norm(*(x.grad for x in before)) / norm(*(x.grad for x in after)),
            "massive_ratio": tops.max() / np.median(tops),
            "massive_count": (tops > 100 * np.median(tops)).sum(),
            "kurtosis": (squares**2).mean() / squares.mean() ** 2,
            "dormant_share": (means <= 0.025 * means.mean()).mean(),
        }
        for name, value in numbers.items():
            found.setdefault(name, {})[f"net.blocks.{i}"] = float(value)
        for branch in ("mix", "down"):
            ratio = norm(*written[f"{i}.{branch}"]) / norm(*before)
            found.setdefault("branch_ratio", {})[f"net.blocks.{i}.{branch}"] = ratio
    return found


def of_weights(net: Residual) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"row_uniformity": {}, "alignment": {}}
    for i, block in enumerate(net.blocks):
        for name in ("mix", "up", "down"):
            rows = (getattr(block, name).weight.detach().double().numpy() ** 2).sum(1)
            found["row_uniformity"][f"net.blocks.{i}.{name}.weight"] = rows.sum() ** 2 / (rows**2).sum() / len(rows)
    for i in range(DEPTH - 1):
        left = np.linalg.svd(net.blocks[i].down.weight.detach().double().numpy())[0][:, 0]
        right = np.linalg.svd(net.blocks[i + 1].mix.weight.detach().double().numpy())[2][0]
        found["alignment"][f"net.blocks.{i}"] = abs(left @ right)
    return found


def assert_found(monitor: Monitor, truth: dict[str, dict[str, float]], rel: float = 1e-3) -> None:
    assert monitor.first is not None and monitor.failures == 0
    for name, sites in truth.items():
        row = monitor.first.values[f"activation_{name}"]
        known = {site: value for site, value in row.items() if not np.isnan(value)}
        assert known == pytest.approx(sites, rel=rel, abs=1e-6), name


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    return [digits()[16 * i : 16 * (i + 1)] for i in range(num)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_numbers_are_those_of_the_step_by_hand(accumulate: int) -> None:
    net, monitor = Residual(), ActivationMonitor()
    truth = expected(net, batches(accumulate))
    watched(InOrder(0, 1, net), monitor, accumulate_grad_batches=accumulate)

    assert_found(monitor, truth | of_weights(net))
    assert monitor.first is not None
    assert max(truth["massive_count"].values()) == 2 and max(truth["dormant_share"].values()) > 0
    assert max(monitor.first.values["activation_write_defect"].values()) < 1e-3


def test_a_gradient_scaler_changes_no_gain() -> None:
    net, monitor = Residual(), ActivationMonitor()
    nn.init.zeros_(net.embed.bias)  # which are too large for half precision
    truth = expected(net, batches(1))["gradient_gain"]
    watched(InOrder(0, 1, net), monitor, plugins=half())

    assert_found(monitor, {"gradient_gain": truth}, rel=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_runs_again_is_read_once(reentrant: bool) -> None:
    net, monitor = Residual(recomputes=reentrant), ActivationMonitor()
    truth = expected(net, batches(1))
    if reentrant:  # its output has no gradient of its own
        truth["gradient_gain"] = {}
    watched(InOrder(0, 1, net), monitor)

    assert_found(monitor, truth)


class InPlace(Block):
    """Writes to what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.mix(self.norm(x.clone()))
        x += self.down(torch.relu(self.up(self.norm(x.clone()))))
        return x


def test_a_block_that_writes_in_place_has_growth_and_gain_and_no_write_ratio() -> None:
    net, monitor = Residual(InPlace), ActivationMonitor()
    truth = expected(net, batches(1)) | {"write_ratio": {}, "write_defect": {}}
    watched(InOrder(0, 1, net), monitor)

    assert_found(monitor, truth)


class AfterNorm(Block):
    """Norms what it has written, so that branches are not what it adds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def test_branches_that_are_not_what_is_added_are_told_by_the_defect() -> None:
    net, monitor = Residual(AfterNorm), ActivationMonitor()
    watched(InOrder(0, 1, net), monitor)

    assert monitor.first is not None
    defects = monitor.first.values["activation_write_defect"]
    assert defects["net.blocks.0"] > 0.5 and np.nanmin(list(defects.values())) > 0.05


class Attending(Block):
    """Queries, keys and values in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)[:, None]
        mixed = scaled_dot_product_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y))[:, 0]
        x = x + self.mix(mixed)
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_queries_keys_and_values_in_the_block_itself_are_no_branches() -> None:
    monitor = ActivationMonitor()
    watched(InOrder(0, 1, Residual(Attending)), monitor)

    assert monitor.first is not None
    assert max(monitor.first.values["activation_write_defect"].values()) < 1e-3
    branches = {site for site, ratio in monitor.first.values["activation_branch_ratio"].items() if ratio == ratio}
    assert branches == {f"net.blocks.{i}.{part}" for i in range(DEPTH) for part in ("mix", "down")}


def test_chance_is_what_random_weights_have() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 200), *(nn.Linear(200, 200) for _ in range(30)), nn.Linear(200, 10))
    for layer in net:
        nn.init.normal_(layer.weight)
    monitor = ActivationMonitor()
    watched(Classifier(net, lr=0.0), monitor)
    assert monitor.first is not None
    found = {name: list(row.values()) for name, row in monitor.first.values.items()}

    for name, near in (("activation_alignment", 0.5), ("activation_row_uniformity", 0.02)):
        assert np.nanmean(found[name]) == pytest.approx(np.nanmean(found[f"{name}_chance"]), rel=near)


def test_wide_matrices_have_no_alignment_and_the_rest() -> None:
    monitor = ActivationMonitor(max_width=WIDTH - 1)
    watched(InOrder(0, 1, Residual()), monitor)

    assert monitor.first is not None and monitor.failures == 0
    assert np.isnan(list(monitor.first.values["activation_alignment"].values())).all()
    assert np.isfinite(list(monitor.first.values["activation_rms"].values())).sum() == DEPTH


def test_a_model_without_layers_says_what_to_match() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 64) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT

    with pytest.raises(ValueError, match=r"finds no block; match layers .* Layers: \['net'\]"):
        watched(Classifier(Own()), ActivationMonitor())


def in_parallel(rank: int, size: int, root: Path) -> Any:
    monitor = ActivationMonitor(every_n_steps=2)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp"} if size > 1 else {}
    watched(InOrder(rank, size, Residual()), monitor, **options)
    return monitor.first and monitor.first.values


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    (alone,) = together(in_parallel, tmp_path, 1)

    assert str(first) == str(second)
    for quantity, row in alone.items():
        assert first[quantity] == pytest.approx(row, rel=1e-4, abs=1e-6, nan_ok=True)
