"""What LoRA refuses or warns of before training, by name."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import AdaLoRA, LoRA, ReLoRA, watching
from tests.processes import together
from tests.trainings import QUIET, Classifier, Validated, gpt2, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank lora")


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.first.weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.first.weight.to(x.dtype).T)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a rank above the matrix": (
        lambda: mlp(32),
        {"r": 41},
        r"r=41 is larger than the largest rank of 'net.0.weight' \(32 x 64\)",
    ),
    "a quantised layer": (Quantised, {}, "'net.first' is quantised, so changes cannot be merged into it"),
    "trained and adapted": (lambda: mlp(32), {"match": "net.0.weight", "train_also": "*.0.*"}, "which is adapted"),
    "dropout without inputs": (gpt2, {"match": "*wte.weight", "dropout": 0.1}, "is used without calling the layer"),
    "nothing that fits": (lambda: mlp(32), {"train_also": "net.9"}, "train_also: 'net.9' matches nothing"),
    "ranks and match": (lambda: mlp(32), {"r": {"net.0.weight": 64}}, "r=64 is larger than the largest rank"),
}


def fit(module: L.LightningModule, lora: LoRA, *callbacks: L.Callback) -> None:
    L.Trainer(**QUIET, max_steps=2, logger=False, callbacks=[lora, *callbacks]).fit(module)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_left_as_it_was(case: str) -> None:
    make, options, why = REFUSED[case]
    module = Classifier(make())
    keys = list(module.state_dict())

    with pytest.raises(ValueError, match=why):
        fit(module, LoRA(**options))

    assert list(module.state_dict()) == keys
    assert all(p.requires_grad or not p.is_floating_point() for p in module.parameters())


BAD: dict[str, dict[str, Any]] = {
    "r=0": {"r": 0},
    "alpha=0": {"alpha": 0.0},
    "init='some'": {"init": "some"},
    "init='corda' works only with backend='peft'": {"init": "corda"},
    "backend='some'": {"backend": "some"},
    "r=3 is odd": {"init": "orthogonal", "r": 3},
    "dropout=1": {"dropout": 1.0},
    "learning_rate_ratio=0": {"learning_rate_ratio": 0.0},
    "give only one": {"merge_on_save": True, "adapter_only": True},
    "match must not be given": {"r": {"*": 2}, "match": "*"},
    "intruders=-1": {"intruders": -1},
}


@pytest.mark.parametrize("why", BAD)
def test_options_out_of_range_are_refused(why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LoRA(**BAD[why])


class Doing(L.Callback):
    def __init__(self, do: Callable[[Any], Any]) -> None:
        self.do = do

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.do(pl_module)


def zeroed(module: nn.Module) -> None:
    with torch.no_grad():
        module.net[0].lora_A.zero_()  # type: ignore[index, union-attr, operator]


IDLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the base trains": (lambda m: m.requires_grad_(True), "the base weight 'net.0.weight' is not frozen"),
    "all is frozen": (lambda m: m.requires_grad_(False), "the pairs of 'net.0.weight' are frozen"),
    "both are zero": (zeroed, "both factors of 'net.0.weight' are zero"),
}


@pytest.mark.parametrize("case", IDLE)
def test_pairs_that_could_not_learn_are_refused(case: str) -> None:
    do, why = IDLE[case]
    module, lora = Classifier(mlp(32)), LoRA(r=2)
    lora.prepare(module)

    with pytest.raises(ValueError, match=why):
        L.Trainer(**QUIET, max_steps=2, logger=False, callbacks=[Doing(do), lora]).fit(module)


def test_pairs_that_no_optimizer_has_are_refused() -> None:
    class Some(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[4].parameters(), lr=0.1)

    with pytest.raises(ValueError, match="no optimizer has the pairs of"):
        fit(Some(mlp(32)), LoRA(r=2))


def test_a_loop_that_was_not_prepared_is_told_what_to_call() -> None:
    net = mlp(32)

    with (
        pytest.raises(ValueError, match=r"lora.prepare\(model\)"),
        watching(net, torch.optim.SGD(net.parameters(), lr=0.1), LoRA(r=2)),
    ):
        pass


def test_another_lora_on_an_adapted_module_is_refused_and_the_same_goes_on() -> None:
    module = Classifier(mlp(32))
    fit(module, LoRA(r=2))
    before = {key: value.clone() for key, value in module.state_dict().items()}

    fit(module, LoRA(r=2))

    assert list(module.state_dict()) == list(before)
    assert not torch.equal(module.state_dict()["net.0.lora_B"], before["net.0.lora_B"])
    with pytest.raises(ValueError, match="already adapted"):
        fit(module, LoRA(r=3))


SCALED: dict[str, tuple[Callable[..., LoRA], dict[str, Any]]] = {
    "LoRA": (lambda **options: LoRA(r=4, **options), {"alpha": 8}),
    "LoRA, rslora": (lambda **options: LoRA(r=4, **options), {"rslora": True}),
    "LoRA, adapters alone": (lambda **options: LoRA(r=4, adapter_only=True, **options), {"alpha": 8}),
    "LoRA, merged on save": (lambda **options: LoRA(r=4, merge_on_save=True, **options), {"alpha": 8}),
    "LoRA, by peft": (lambda **options: LoRA(r=4, backend="peft", **options), {"alpha": 8}),
    "ReLoRA": (lambda **options: ReLoRA(r=4, **options), {"alpha": 8}),
    "AdaLoRA": (lambda **options: AdaLoRA(total_steps=8, r=2, initial_r=4, **options), {"alpha": 8}),
}


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("case", SCALED)
def test_a_checkpoint_of_another_scaling_is_refused(case: str, stage: str, tmp_path: Path) -> None:
    make, others = SCALED[case]
    torch.manual_seed(0)
    trainer = L.Trainer(**QUIET, max_steps=2, logger=False, callbacks=[make()])
    trainer.fit(Validated(mlp(32)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    torch.manual_seed(0)
    module = Validated(mlp(32))

    other = L.Trainer(**QUIET, max_steps=4, logger=False, callbacks=[make(**others)])
    with pytest.raises(ValueError, match=r"'net.0.weight' were trained with the scaling (1|0.99).* and now it is 2"):
        getattr(other, stage)(module, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert module.losses == []


def test_a_pair_that_no_gradient_reaches_is_named_and_a_frozen_head_too() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(torch.tanh(self.used(x)), self.read.weight))

    with pytest.warns(UserWarning, match=r"the pairs of \['net.read.weight'\] get no gradient"):
        fit(Classifier(Around()), LoRA(r=2))

    module = Classifier(mlp(32))
    module.net[4].requires_grad_(False)
    with pytest.warns(UserWarning, match="was frozen before and stays so"):
        fit(module, LoRA(r=2))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.used(x)))


def in_processes(rank: int, size: int, root: Path) -> dict[str, tuple[list[str], str]]:
    """What is warned of, and how it ends."""
    found = {}
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        L.seed_everything(0, verbose=False)
        trouble, options = "", {"devices": size, "strategy": strategy, "max_steps": 3, "logger": False}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                L.Trainer(**QUIET | options, callbacks=[LoRA(r=2)]).fit(Classifier(Unused()))
            except RuntimeError as error:
                trouble = str(error)
        found[strategy] = ([str(one.message) for one in caught if "get no gradient" in str(one.message)], trouble)
    return found


def test_pairs_that_are_not_called_are_named_before_ddp_stops_for_them(tmp_path: Path) -> None:
    found, _ = together(in_processes, tmp_path)

    for said, _ in found.values():
        assert len(said) == 1 and "['net.unused.weight']" in said[0] and "ddp_find_unused_parameters_true" in said[0]
    assert "was not used in producing loss" in found["ddp"][1] or "unused" in found["ddp"][1]
    assert found["ddp_find_unused_parameters_true"][1] == ""


def test_layers_of_configure_model_are_adapted_before_the_optimizer_is_made() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.made = False

        def configure_model(self) -> None:
            if not self.made:
                self.net, self.made = mlp(32), True

    module = Late()

    fit(module, LoRA(r=2))

    assert module.net[0].lora_B.any() and module.net[4].weight.requires_grad and not module.net[0].weight.requires_grad


def test_the_table_says_what_is_adapted_trained_and_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Classifier(gpt2()), LoRA(r=2, adapter_only=True, train_also="*ln_f*"))

    table = next(record.message for record in caplog.records if "weights adapted" in record.message)
    assert "4 weights adapted" in table and "trained in full: 154 parameters, 616 bytes" in table
    assert "c_attn.weight  (12, 36)  q12 x 2 + k12 x 2 + v12 x 2" in table
    assert "wte.weight (embedding)" in table and "saved in a checkpoint" in table
