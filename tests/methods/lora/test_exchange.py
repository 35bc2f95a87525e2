"""Adapters to peft and from it, checked by peft; and the three ways to save."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from lightning_lowrank import LoRA
from tests.trainings import QUIET, Classifier, Validated, gpt2, mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lightning_lowrank", "ignore:.*fan_in_fan_out", "ignore:.*callbacks used to create the checkpoint"
)
X = torch.rand(5, 64)


def disturbed(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return net.eval()


@pytest.mark.parametrize("make", [lambda: mlp(32), gpt2], ids=["mlp", "gpt2"])
@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_peft_loads_what_is_exported(init: str, make: Any, tmp_path: Path) -> None:
    base = make().eval()
    net = copy.deepcopy(base)
    LoRA(r=2, alpha=3.0, init=init).prepare(net)
    disturbed(net)

    LoRA.export_adapter(net, tmp_path)

    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(loaded(X), net(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(X), make().eval()(X), atol=1e-3)


def test_what_is_exported_says_how_its_weights_lie(tmp_path: Path) -> None:
    for net, expected in ((gpt2(), True), (mlp(32), False)):
        LoRA(r=2, exclude=["head.*"] if expected else None).prepare(net)
        LoRA.export_adapter(disturbed(net), tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is expected


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_imported(rslora: bool, tmp_path: Path) -> None:
    base = mlp(32).eval()
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"2": 7}, use_rslora=rslora
    )
    theirs = disturbed(get_peft_model(copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path)
    lora = LoRA(r=4, init="pissa")

    lora.import_adapter(base, tmp_path)

    assert_close(base(X), theirs(X), rtol=1e-4, atol=1e-5)


def test_an_own_export_comes_back_and_a_larger_rank_is_refused(tmp_path: Path) -> None:
    base = gpt2().eval()
    net = copy.deepcopy(base)
    LoRA(r=2).prepare(net)
    LoRA.export_adapter(disturbed(net), tmp_path)

    other = copy.deepcopy(base)
    LoRA(r=3).import_adapter(other, tmp_path)

    assert_close(other(X), net(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the folder has rank 2, larger than r=1"):
        LoRA(r=1).import_adapter(copy.deepcopy(base), tmp_path)


def fitted(root: Path, **options: Any) -> tuple[Classifier, LoRA, Path]:
    L.seed_everything(3, verbose=False)
    module, lora = Classifier(mlp(32)), LoRA(**{"r": 2} | options)
    keep = ModelCheckpoint(root, filename="last")
    L.Trainer(**QUIET | {"enable_checkpointing": True}, max_epochs=1, logger=False, callbacks=[lora, keep]).fit(module)
    return module.eval(), lora, root / "last.ckpt"


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_merged_checkpoint_is_loaded_without_the_callback(init: str, tmp_path: Path) -> None:
    module, _, path = fitted(tmp_path, init=init, merge_on_save=True)

    plain = Classifier.load_from_checkpoint(path, net=mlp(32)).eval()

    assert_close(plain(X), module(X), rtol=1e-4, atol=1e-5)
    assert list(plain.state_dict()) == list(Classifier(mlp(32)).state_dict())


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("how", ["adapter_only", "merge_on_save", ""])
def test_a_checkpoint_is_tested_as_it_was_saved(how: str, init: str, tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen = self(X)

        test_dataloader = Validated.val_dataloader

    module, _, path = fitted(tmp_path, init=init, **({how: True} if how else {}))
    L.seed_everything(3, verbose=False)
    other = Tested(mlp(32))  # the same base

    L.Trainer(**QUIET, logger=False, callbacks=[LoRA(r=2, init=init, **({how: True} if how else {}))]).test(
        other, ckpt_path=path, verbose=False
    )

    assert_close(other.seen, module(X), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_adapters_has_them_alone_and_wants_its_base(tmp_path: Path) -> None:
    _, _, path = fitted(tmp_path, adapter_only=True)
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert set(kept) == {*(f"net.{i}.lora_{x}" for i in (0, 2) for x in "AB"), "net.4.weight", "net.4.bias"}

    L.seed_everything(4, verbose=False)
    with pytest.raises(ValueError, match="trained on another base"):
        L.Trainer(**QUIET, max_epochs=2, logger=False, callbacks=[LoRA(r=2, adapter_only=True)]).fit(
            Classifier(mlp(32)), ckpt_path=path
        )


def test_a_plain_model_that_is_tested_with_the_callback_stays_plain() -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        test_dataloader = Validated.val_dataloader

    module = Tested(mlp(32))
    before = copy.deepcopy(module.state_dict())

    L.Trainer(**QUIET, logger=False, callbacks=[LoRA(r=2)]).test(module, verbose=False)

    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in module.parameters())
