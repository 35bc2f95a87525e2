"""What `GaLore` refuses before training, by name."""

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lowrank import GaLore, RankMonitor, watching
from lightning_lowrank.methods.elementwise import decay_of
from tests.trainings import QUIET, Classifier, Ordered, mlp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": True}, "rank is an integer or a number"),
        ({"rank": {}}, "must not be empty"),
        ({"rank": "best"}, "'measured'"),
        ({"residual": "fira", "side": "both"}, "'both' projects both sides; use side='auto'"),
        ({"rank": {"*": -1}}, "rank=-1"),
        ({"rank": {"*": 2}, "match": "*"}, "match must not be given"),
        ({"update_every": 0}, "update_every=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"side": "top"}, "'auto' or 'left' or 'right' or 'both'"),
        ({"basis": "dct"}, "'subspace' or 'svd' or 'random'"),
        ({"on_refresh": "forget"}, "'keep' or 'reset' or 'rotate'"),
        ({"seed": -1}, "seed=-1"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLore(**options)


class Layerwise(torch.optim.SGD):
    """Scales each step by the ratio of the norms of weight and gradient, as LARS and LAMB do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"] * (1 + p.norm()) / (1 + p.grad.norm())))
        return loss


class Silent(torch.optim.SGD):
    """Does not call its closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


class Drifting(torch.optim.SGD):
    """Pulls weights to 1 and not to 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(0.01 * p.grad.sign() + 0.1 * (p - 1))
        return loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Muon, "Muon updates each entry with the gradients of other entries"),
        (torch.optim.Adafactor, "Adafactor updates each entry with the gradients of other entries"),
        (torch.optim.ASGD, "the steps of ASGD depend on the weights"),
        (torch.optim.LBFGS, "LBFGS failed on a small test matrix"),
        (torch.optim.SparseAdam, "SparseAdam failed on a small test matrix"),
        (Layerwise, "Layerwise updates each entry with the gradients of other entries"),
        (Drifting, "the steps of Drifting depend on the weights"),
        (Silent, "Silent failed on a small test matrix .* closure"),
    ],
)
def test_an_optimizer_that_does_not_treat_each_entry_by_itself_is_refused(make: Any, message: str) -> None:
    net = nn.Linear(8, 6, bias=False)

    with (
        pytest.raises(ValueError, match=message),
        watching(net, make(net.parameters(), lr=0.1), GaLore(2, match="*")),
    ):
        pass


@pytest.mark.parametrize(
    ("make", "decay"),
    [
        (lambda p: torch.optim.AdamW(p), "decoupled"),
        (lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True), "decoupled"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1, maximize=True), "coupled"),
        (lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True), "decoupled"),
        (lambda p: torch.optim.RAdam(p), "coupled"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True), "coupled"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "coupled"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "coupled"),
        (lambda p: torch.optim.Adadelta(p), "coupled"),
        (lambda p: torch.optim.Adamax(p, lr=torch.tensor(0.1)), "coupled"),
    ],
)
def test_how_an_optimizer_decays_weights_is_found_out_without_a_trace(make: Any, decay: str) -> None:
    parameter = nn.Parameter(torch.randn(3, 4))
    optimizer = make([parameter])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, random, values = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state(), parameter.detach().clone()

    assert decay_of(optimizer, optimizer.param_groups[0]) == decay
    assert optimizer.state_dict() == before
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(parameter, values)


def start(net: nn.Module, galore: GaLore, *parameters: nn.Parameter) -> None:
    with watching(net, torch.optim.SGD(parameters or net.parameters(), lr=0.1), galore):
        pass


def test_what_is_not_there_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 4))

    with pytest.raises(ValueError, match="'encoder' matches nothing"):
        start(net, GaLore(match="encoder"))
    with pytest.raises(ValueError, match="no matrix among"):
        start(net, GaLore(match="*bias"))
    with pytest.raises(ValueError, match="all matrices are embeddings or the head"):
        start(nn.Sequential(net[0], net[2]), GaLore())
    with pytest.raises(ValueError, match=r"no optimizer has any of the matrices \['1.weight'\]"):
        start(net, GaLore(), *net[2].parameters())
    with (
        pytest.raises(ValueError, match=r"'rotate'.*Adamax keeps .*exp_inf"),
        watching(net, torch.optim.Adamax(net.parameters()), GaLore(on_refresh="rotate")),
    ):
        pass


def test_a_rank_that_saves_nothing_anywhere_is_refused_with_the_short_sides() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))

    with pytest.raises(ValueError, match=r"rank=16\) saves nothing: .*'0.weight': .* short side, 16.*'1.weight'.*, 12"):
        start(net, GaLore(16, match="*"))
    with pytest.raises(ValueError, match=r"saves nothing: \{'1.weight': 'rank 12 is not below its short side, 12'\}"):
        start(net, GaLore({"1.*": 12}))


@pytest.mark.parametrize("rank", [12, {"1.*": 400, "*": 4}])
def test_a_matrix_for_which_nothing_is_saved_is_left_alone_and_named(
    rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    galore = GaLore(rank, match=None if isinstance(rank, dict) else "*")

    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="no batch was seen"):
        start(net, galore)

    assert "0.weight  16 x 16 as 16 x" in caplog.text
    assert f"1.weight (rank {400 if isinstance(rank, dict) else 12} is not below its short side, 12)" in caplog.text


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    net = nn.Linear(8, 6)
    both = [torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.2)]

    with (
        pytest.raises(ValueError, match="'weight' is in two optimizers"),
        watching(net, both, GaLore(match="*")),
    ):
        pass
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in both)


def test_a_second_one_is_refused_in_a_trainer_and_in_a_loop() -> None:
    net, two = nn.Linear(8, 6), [GaLore(2, match="*"), GaLore(3, match="*", name="other")]

    with (
        pytest.raises(ValueError, match="two GaLore in one training"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), *two),
    ):
        pass
    with pytest.raises(ValueError, match="two GaLore in one training"):
        L.Trainer(**QUIET, logger=False, max_steps=1, callbacks=[RankMonitor(), *two]).fit(Classifier())


def test_strategies_that_hide_parameters_and_sharded_ones_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class DeepSpeedStrategy:
        """By its name."""

    galore, trainer = GaLore(), L.Trainer(**QUIET, logger=False)
    trainer.strategy.__class__ = type("Engine", (type(trainer.strategy), DeepSpeedStrategy), {})
    with pytest.raises(ValueError, match="GaLore cannot act under strategy DeepSpeedStrategy"):
        galore.setup(trainer, Classifier(), "fit")

    monkeypatch.setattr("lightning_lowrank.methods.method.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match=r"GaLore cannot act on 'weight', which is sharded .*FSDP2"):
        start(nn.Linear(8, 6), GaLore(match="*"))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 4}, r"'net.0.weight' had the projected shape \(3, 64\) in the resumed run, and has \(4, 64\) now"),
        ({"side": "both"}, r"has \(3, 3\) now"),
        ({"match": "net.0.weight"}, "had the matrices .* give the same match and exclude"),
    ],
)
def test_a_run_of_other_ranks_or_matrices_is_not_resumed(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 3, "match": "*weight"}
    quiet = QUIET | {"logger": False, "num_sanity_val_steps": 0}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    L.Trainer(**quiet | {"enable_checkpointing": True}, max_steps=2, callbacks=[GaLore(**options), keep]).fit(
        Ordered(mlp(32))
    )
    (path,) = tmp_path.glob("*.ckpt")

    with pytest.raises(ValueError, match=message):
        L.Trainer(**quiet, max_steps=4, callbacks=[GaLore(**options | changed)]).fit(Ordered(mlp(32)), ckpt_path=path)
