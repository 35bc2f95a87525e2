"""Rounds of `LotteryTicket`.

Oracle: a plain loop that prunes by `torch.nn.utils.prune`, which keeps its masks in modules.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.testing import assert_close

from lightning_lowrank import LotteryTicket, watching
from lightning_lowrank.methods.lottery.masks import pruned
from tests.trainings import QUIET, Classifier, MemoryLogger, Ordered, Resumable, mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lightning_lowrank", "ignore:.*callbacks used to create the checkpoint"
)


class Look(L.Callback):
    """Weights at the start of each batch, after those before it in the list have acted, and gradients at each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.states: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append({key: value.clone() for key, value in pl_module.state_dict().items()})
        self.states.append(len(trainer.optimizers[0].state))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        found = {key: p.grad.clone() for key, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def fit(module: L.LightningModule, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> L.Trainer:
    settings = QUIET | {"logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = L.Trainer(**settings | {"enable_checkpointing": keeps} | options, callbacks=list(callbacks))
    trainer.fit(module, ckpt_path=resume)
    return trainer


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value == 0 for key, value in state.items() if value.ndim > 1}


def density(state: dict[str, Tensor]) -> float:
    gone = list(zeros(state).values())
    return 1 - sum(int(mask.sum()) for mask in gone) / sum(mask.numel() for mask in gone)


def by_torch(rounds: int, share: float) -> list[Tensor]:
    """Matrices after rounds of four steps of AdamW each, pruned by torch, from the same start."""
    torch.manual_seed(5)
    net = mlp(32)
    start, layers = copy.deepcopy(net.state_dict()), [layer for layer in net if isinstance(layer, nn.Linear)]
    for number in range(rounds):
        if number:
            total = sum(layer.weight.numel() for layer in layers)
            left = round(total * (1 - share) ** (number - 1))
            count = left - round(total * (1 - share) ** number)
            # `layer.weight` is that of the last forward pass.
            scores = {(layer, "weight"): getattr(layer, "weight_orig", layer.weight).abs() for layer in layers}
            prune.global_unstructured(
                [(layer, "weight") for layer in layers], prune.L1Unstructured, importance_scores=scores, amount=count
            )
            for i, layer in zip((0, 2, 4), layers, strict=True):
                layer.weight_orig.data.copy_(start[f"{i}.weight"])
                layer.bias.data.copy_(start[f"{i}.bias"])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for images, labels in Resumable():
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            for layer in layers if number else []:
                layer.weight_orig.data *= layer.weight_mask
    return [layer.weight_orig * layer.weight_mask for layer in layers]


def test_the_rounds_are_those_of_a_plain_loop_with_the_pruning_of_torch() -> None:
    torch.manual_seed(5)
    module = Ordered(mlp(32))
    fit(module, LotteryTicket(3, 1, prune=0.4), max_epochs=3, gradient_clip_val=0.5)

    expected = by_torch(3, 0.4)

    found = [p for p in module.parameters() if p.ndim > 1]
    assert [int((one == 0).sum()) for one in found] == [int((one == 0).sum()) for one in expected]
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_each_round_starts_from_the_start_with_nested_masks_of_the_density_asked_for() -> None:
    torch.manual_seed(5)
    module, look = Ordered(mlp(32)), Look()
    fit(module, LotteryTicket(6, 1), look, max_epochs=6)

    starts = look.weights[::4]
    for number, (before, after) in enumerate(pairwise(starts), 1):
        gone, more = zeros(before), zeros(after)
        assert density(after) == pytest.approx(0.8**number, abs=1e-3)
        for key in gone:
            assert not (gone[key] & ~more[key]).any()
            assert_close(after[key], starts[0][key].masked_fill(more[key], 0), rtol=0, atol=0)
        assert_close(after["net.0.bias"], starts[0]["net.0.bias"], rtol=0, atol=0)
    assert [look.states[4 * i] for i in range(6)] == [0] * 6 and look.states[1] > 0


def test_late_rewinding_goes_back_to_the_weights_of_that_step() -> None:
    module, look = Ordered(mlp(32)), Look()
    fit(module, LotteryTicket(2, 1, rewind_step=2), look, max_epochs=2)

    kept = look.weights[4]["net.0.weight"] != 0

    assert_close(look.weights[4]["net.0.weight"][kept], look.weights[2]["net.0.weight"][kept], rtol=0, atol=0)
    assert_close(look.weights[4]["net.2.bias"], look.weights[2]["net.2.bias"], rtol=0, atol=0)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "lr": 0.1},
    "lbfgs": {"lr": 0.1, "max_iter": 3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_are_gone_stay_zeros_and_have_no_gradient(name: str) -> None:
    module, look = Ordered(mlp(32)), Look()
    module.optimizer, module.options = name, OPTIMIZERS[name]
    fit(module, LotteryTicket(2, 1, prune=0.5), look, max_epochs=2)

    gone = zeros(look.weights[4])
    assert density(look.weights[4]) == pytest.approx(0.5, abs=1e-3)
    for state in [*look.weights[5:], module.state_dict()]:
        assert all((state[key][mask] == 0).all() for key, mask in gone.items())
    last = look.gradients[-1]
    assert all((last[key][mask] == 0).all() and (last[key][~mask] != 0).any() for key, mask in gone.items())


def test_layers_lose_the_same_share_each_where_that_is_asked_for() -> None:
    module = Ordered(mlp(32))
    method = LotteryTicket(2, 1, prune=0.5, scope="layer")
    fit(module, method, max_epochs=2)

    shares = [float(mask.float().mean()) for mask in zeros(module.state_dict()).values()]

    assert shares == pytest.approx([0.5] * 3)
    assert method.density == pytest.approx(0.5) and method.round == 1


class Scheduled(Ordered):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.8)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_schedules_begin_anew_each_round() -> None:
    look = Look()
    fit(Scheduled(mlp(32)), LotteryTicket(3, 1), look, max_epochs=3)

    assert len(set(look.rates[:4])) == 4
    assert look.rates == look.rates[:4] * 3


def test_a_second_fit_of_the_module_goes_on_with_its_masks_and_round() -> None:
    module, method, look = Ordered(mlp(32)), LotteryTicket(3, 1, prune=0.5), Look()
    fit(module, method, max_epochs=2)
    before = zeros(module.state_dict())

    fit(module, method, look, max_epochs=2)

    assert density(look.weights[0]) == pytest.approx(0.25, abs=1e-3)
    after = zeros(module.state_dict())
    assert all((after[key] | ~before[key]).all() for key in before)
    assert density(module.state_dict()) == pytest.approx(0.25, abs=1e-3) and method.round == 2


def test_masks_survive_a_resumption_in_the_middle_of_a_round_by_epochs(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6)
    L.seed_everything(0, verbose=False)
    whole = Ordered(mlp(32))
    fit(whole, LotteryTicket(3, 1), max_epochs=4)
    L.seed_everything(0, verbose=False)
    fit(Ordered(mlp(32)), LotteryTicket(3, 1), keep, max_steps=6)
    (path,) = tmp_path.glob("*.ckpt")

    resumed, method = Ordered(mlp(32)), LotteryTicket(3, 1)
    fit(resumed, method, resume=path, max_epochs=4)

    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert method.density == pytest.approx(0.64, abs=1e-3)


def test_a_checkpoint_at_the_end_of_a_round_has_its_trained_weights_and_resumes(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    whole, look = Ordered(mlp(32)), Look()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, LotteryTicket(3, 2), look, keep, max_epochs=6, limit_val_batches=1)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]

    resumed = Ordered(mlp(32))
    fit(resumed, LotteryTicket(3, 2), resume=tmp_path / "epoch=1.ckpt", max_epochs=6, limit_val_batches=1)

    assert density(saved) == 1.0
    assert not torch.equal(saved["net.0.weight"], look.weights[0]["net.0.weight"])
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_search_for_the_learning_rate_takes_no_rounds(tmp_path: Path) -> None:
    class Rated(Ordered):
        lr = 1e-3

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, method = Rated(mlp(32)), LotteryTicket(2, 1)
    trainer = L.Trainer(
        **QUIET | {"enable_checkpointing": True},
        max_epochs=1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[method],
    )
    Tuner(trainer).lr_find(module, num_training=8)
    trainer.fit(module)

    assert method.round == 0 and density(module.state_dict()) == 1.0


class Cooling(Ordered):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def top_half(state: dict[str, Tensor]) -> Tensor:
    magnitudes = torch.cat([value.flatten().abs() for value in state.values() if value.ndim > 1])
    return magnitudes >= magnitudes.sort().values[len(magnitudes) // 2]


@pytest.mark.parametrize("unit", ["steps_per_round", "epochs_per_round"])
def test_an_early_bird_prunes_when_the_mask_has_settled_and_trains_the_ticket_for_a_whole_round(unit: str) -> None:
    torch.manual_seed(0)
    module, look = Cooling(mlp(32)), Look()
    length = 200 if unit.startswith("steps") else 50
    method = LotteryTicket(2, prune=0.5, early_bird=True, look_every_n_steps=5, **{unit: length})
    fit(module, method, look, max_epochs=200)

    end = next(i for i, rate in enumerate(look.rates) if i and rate == look.rates[0])
    masks = [top_half(state) for state in look.weights[:end:5]]
    # Where the round ends the weights are rewound already: the look before it is the last that is seen here.
    moved = [(masks[-1] != mask).double().mean() for mask in masks]
    assert end % 5 == 0 and 25 <= end < 150
    assert max(moved[len(masks) // 2 :]) < 0.3 * moved[0]
    assert density(module.state_dict()) == pytest.approx(0.5, abs=1e-3)
    assert len(look.rates) - end in (range(200, 201) if unit.startswith("steps") else range(195, 201))


def test_the_curves_say_the_round_and_what_is_left_of_each_layer() -> None:
    module, logger = Ordered(mlp(32)), MemoryLogger()
    fit(module, LotteryTicket(3, 1, prune=0.5, every_n_steps=4, per_site=True), max_epochs=3, logger=logger)

    curves = logger.numbers()
    last = {tag: list(curve.values())[-1] for tag, curve in curves.items()}
    assert list(curves["ticket/round"].values()) == [0, 1, 2]
    assert list(curves["ticket/density"].values()) == pytest.approx([1, 0.5, 0.25], abs=1e-3)
    for key, mask in zeros(module.state_dict()).items():
        assert last[f"ticket_layer_density/{key}"] == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)


def test_equal_magnitudes_leave_exactly_as_many_as_asked_for() -> None:
    first = pruned([torch.ones(4, 5), torch.ones(20)], [None, None], 0.5, 1, "global")

    second = pruned([torch.ones(4, 5), torch.ones(20)], first, 0.5, 2, "global")

    assert [int(mask.sum()) for mask in first] == [20, 0] and sum(int(mask.sum()) for mask in second) == 10


def with_loop(method: LotteryTicket) -> None:
    net = mlp(8)
    with watching(net, torch.optim.SGD(net.parameters(), 0.1), method):
        pass


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: LotteryTicket(1, 1), "rounds=1"),
    (lambda: LotteryTicket(2), "give exactly one of them"),
    (lambda: LotteryTicket(2, 1, steps_per_round=1), "give exactly one of them"),
    (lambda: LotteryTicket(2, 0), "epochs_per_round=0"),
    (lambda: LotteryTicket(2, 1, prune=1.0), "prune=1.0"),
    (lambda: LotteryTicket(2, steps_per_round=4, rewind_step=4), "rewind_step=4"),
    (lambda: LotteryTicket(2, 1, scope="net"), "scope"),
    (lambda: LotteryTicket(2, 1, early_bird=True, look_every_n_steps=0), "look_every_n_steps=0"),
    (lambda: with_loop(LotteryTicket(2, 1)), "use steps_per_round"),
    (lambda: fit(Classifier(), LotteryTicket(2, 1, match="none*"), max_epochs=1), "matches nothing"),
    (lambda: fit(Classifier(), LotteryTicket(2, 1, match="*bias"), max_epochs=1), "finds no matrix"),
    (lambda: fit(Classifier(), LotteryTicket(2, 1), LotteryTicket(3, 1), max_epochs=1), "two LotteryTicket"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_before_training(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_other_weights_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6)
    fit(Ordered(mlp(32)), LotteryTicket(3, 1), keep, max_steps=6)
    (path,) = tmp_path.glob("*.ckpt")

    with pytest.raises(ValueError, match="give the same match"):
        fit(Ordered(mlp(32)), LotteryTicket(3, 1, match="net.0*"), resume=path, max_epochs=3)
