"""Ranks that peft's allocator shares out. Oracle: peft's own model in a plain loop."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from lightning_lowrank import AdaLoRA, LoRA, watching
from tests.trainings import QUIET, Classifier, Resumable, mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lightning_lowrank", "ignore:.*callbacks used to create the checkpoint", "ignore:Note that `r` is not used"
)
X = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
PLAN: dict[str, Any] = {"total_steps": 12, "r": 2, "initial_r": 5, "first_steps": 2, "last_steps": 3, "every": 2}
FACTORS = ("lora_A", "lora_B", "lora_E")


def left(net: nn.Module) -> int:
    return sum(int(layer.lora_E["default"].count_nonzero()) for layer in net.modules() if hasattr(layer, "lora_E"))


def test_a_training_is_that_of_pefts_own_model() -> None:
    torch.manual_seed(0)
    net = mlp(32).double()
    other = copy.deepcopy(net)
    method = AdaLoRA(**PLAN, alpha=3, match=["0.weight", "2.weight"], orthogonality=0.5)
    method.prepare(net)
    config = AdaLoraConfig(
        target_r=2, init_r=5, tinit=2, tfinal=3, deltaT=2, total_step=12, lora_alpha=3, target_modules=["0", "2"]
    )
    wrapped = get_peft_model(other, config)
    other[4].requires_grad_(True)
    theirs: Any = wrapped.base_model
    for name in ("0", "2"):
        for part in FACTORS:
            mine, its = (getattr(one.get_submodule(name), part)["default"] for one in (net, other))
            its.data = mine.detach().clone()
        other.get_submodule(name).ranknum.requires_grad_(False)  # peft lets weight decay shrink it
    ours_optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    its_optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 1e-2)

    with watching(net, ours_optimizer, method) as watch:
        for i in range(12):
            with watch.batch():
                ours_optimizer.zero_grad()
                watch.loss(net(X.double()).square().mean()).backward()
                ours_optimizer.step()
            its_optimizer.zero_grad()
            loss = other(X.double()).square().mean()
            several = [p for n, p in other.named_parameters() if "lora_A" in n or "lora_B" in n]
            covariances = [p @ p.T if len(p) == 5 else p.T @ p for p in several]
            penalty = sum(torch.norm(c - torch.eye(5).double()) for c in covariances) / len(several)
            (loss + 0.5 * penalty).backward()
            its_optimizer.step()
            theirs.update_and_allocate(i)
            if i in (5, 11):
                assert_close(net(X.double()), other(X.double()), rtol=1e-6, atol=1e-8)

    assert left(net) == left(other) == 4


def fitted(root: Path, resume: Path | None = None, **options: Any) -> tuple[Classifier, AdaLoRA]:
    L.seed_everything(3, verbose=False)
    module, method = Classifier(mlp(32)), AdaLoRA(**PLAN, alpha=3, every_n_steps=1, **options)
    keep = [] if resume else [ModelCheckpoint(root, every_n_train_steps=3, save_top_k=-1)]
    settings = QUIET | {"enable_checkpointing": not resume, "max_steps": 12, "logger": False, "num_sanity_val_steps": 0}
    L.Trainer(**settings, callbacks=[method, *keep]).fit(module, Resumable(), ckpt_path=resume)
    return module.eval(), method


@pytest.mark.parametrize("how", ["adapter_only", "merge_on_save", ""])
@pytest.mark.parametrize("step", [3, 9])
def test_a_run_is_resumed_to_the_bit_before_and_after_ranks_are_settled(step: int, how: str, tmp_path: Path) -> None:
    options = {how: True} if how else {}
    whole, method = fitted(tmp_path / "whole", **options)

    resumed, _ = fitted(tmp_path / "resumed", next((tmp_path / "whole").glob(f"*step={step}.ckpt")), **options)

    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert method.latest is not None
    values = method.latest.values
    assert list(values["adalora_directions"].values()) == [4] == [sum(values["adalora_rank"].values())]


def test_it_is_merged_and_exported_as_plain_lora_of_the_ranks_that_are_left(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    base = mlp(32)
    module = Classifier(copy.deepcopy(base))
    L.Trainer(**QUIET, max_steps=12, logger=False, callbacks=[AdaLoRA(**PLAN)]).fit(module)
    outputs = module.eval()(X)

    LoRA.export_adapter(module, tmp_path, within="net")

    loaded = PeftModel.from_pretrained(base.eval(), tmp_path).eval()
    assert_close(loaded(X), outputs, rtol=1e-4, atol=1e-5)
    assert not any("lora_E" in name for name, _ in loaded.named_parameters())
    LoRA.merge(module)
    assert_close(module(X), outputs, rtol=1e-4, atol=1e-5)
    assert list(module.net.state_dict()) == list(mlp(32).state_dict())


BAD: dict[str, dict[str, Any]] = {
    "r=12 must not be larger than initial_r=12": {"r": 12},
    "leave no step in between of total_steps=12": {"first_steps": 6, "last_steps": 6},
    "every=0": {"every": 0},
    "orthogonality=-1": {"orthogonality": -1.0},
    "give only one": {"merge_on_save": True, "adapter_only": True},
}


@pytest.mark.parametrize("why", BAD)
def test_options_out_of_range_are_refused(why: str) -> None:
    with pytest.raises(ValueError, match=why):
        AdaLoRA(**{"total_steps": 12} | BAD[why])
