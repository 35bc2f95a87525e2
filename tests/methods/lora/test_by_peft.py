"""`backend="peft"`: peft makes the pairs, and all else is as it is without it. Oracles: peft, and numpy's SVD."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

from lightning_lowrank import LoRA
from tests.trainings import QUIET, Classifier, Resumable, gpt2, mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lightning_lowrank", "ignore:.*fan_in_fan_out", "ignore:.*callbacks used to create the checkpoint"
)
X = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
INITS = ("default", "pissa", "pissa_niter_2", "olora", "orthogonal", "corda")


def called(net: nn.Module) -> torch.Tensor:
    """In evaluation mode, with gradients: CorDA sees inputs, and there is no dropout."""
    return net.eval()(X)


@pytest.mark.parametrize("make", [lambda: mlp(32), gpt2], ids=["mlp", "gpt2"])
@pytest.mark.parametrize("init", INITS)
def test_a_model_begins_as_it_was_and_is_given_back(init: str, make: Any) -> None:
    net = make()
    if make is gpt2 and init in ("olora", "orthogonal"):
        with pytest.raises(ValueError, match=f"peft's init='{init}' treats Conv1D as transposed"):
            LoRA(2, init=init, match="*c_attn.weight", backend="peft").prepare(net)
        return
    keys, outputs, state = list(net.state_dict()), called(net), torch.get_rng_state()

    LoRA(2, alpha=3, init=init, backend="peft").prepare(net)

    assert torch.equal(torch.get_rng_state(), state)
    assert any(key.endswith("lora_A.default.weight") for key in net.state_dict())
    assert_close(called(net), outputs, rtol=1e-5, atol=1e-6)
    LoRA.merge(net)
    assert_close(called(net), outputs, rtol=1e-5, atol=1e-6)
    assert list(net.state_dict()) == keys and not hasattr(net, "peft_config")
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("train_also", [(), "*bias"])
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_training_is_that_of_the_other_backend(init: str, train_also: Any) -> None:
    found = {}
    for backend in ("parametrize", "peft"):
        L.seed_everything(3, verbose=False)
        module = Classifier(mlp(32))
        lora = LoRA(2, alpha=3, init=init, rslora=True, train_also=train_also, learning_rate_ratio=4, backend=backend)
        L.Trainer(**QUIET, max_steps=4, logger=False, callbacks=[lora]).fit(module)
        found[backend] = dict(LoRA.merge(module).named_parameters())

    assert_close(found["peft"], found["parametrize"], rtol=1e-3, atol=1e-4)


def test_corda_takes_out_the_top_of_the_weight_as_its_inputs_see_it() -> None:
    net = mlp(32)
    before = net[0].weight.detach().double().numpy()
    LoRA(3, init="corda", backend="peft").prepare(net)

    called(net)

    x = X.double().numpy() / X.max().item()
    covariance = x.T @ x
    covariance += 0.01 * np.diag(covariance).mean() * np.eye(64)
    u, s, vt = np.linalg.svd(before @ covariance)
    expected = (u[:, :3] * s[:3]) @ vt[:3] @ np.linalg.inv(covariance)
    layer: Any = net[0]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert_close(product.detach().double(), torch.from_numpy(expected), rtol=1e-2, atol=1e-3)
    assert_close(layer.base_layer.weight.double(), torch.from_numpy(before - expected), rtol=1e-2, atol=1e-3)


def fitted(root: Path, resume: Path | None = None, **options: Any) -> Classifier:
    L.seed_everything(3, verbose=False)
    module, lora = Classifier(mlp(32)), LoRA(2, alpha=3.0, backend="peft", **options)
    keep = [] if resume else [ModelCheckpoint(root, every_n_train_steps=2, save_top_k=-1)]
    settings = QUIET | {"enable_checkpointing": not resume, "max_steps": 4, "logger": False, "num_sanity_val_steps": 0}
    L.Trainer(**settings, callbacks=[lora, *keep]).fit(module, Resumable(), ckpt_path=resume)
    return module.eval()


@pytest.mark.parametrize("init", ["default", "pissa", "corda"])
@pytest.mark.parametrize("how", ["adapter_only", "merge_on_save", ""])
def test_a_run_is_resumed_to_the_bit_from_each_way_to_save(how: str, init: str, tmp_path: Path) -> None:
    options = {"init": init, **({how: True} if how else {})}
    whole = fitted(tmp_path / "whole", **options)

    resumed = fitted(tmp_path / "resumed", next((tmp_path / "whole").glob("*step=2.ckpt")), **options)

    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_merged_checkpoint_is_loaded_without_the_callback(tmp_path: Path) -> None:
    module = fitted(tmp_path, merge_on_save=True, train_also="*bias")

    plain = Classifier.load_from_checkpoint(next(tmp_path.glob("*step=4.ckpt")), net=mlp(32)).eval()

    assert_close(plain(X), module(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "corda"])
def test_peft_loads_what_is_exported(init: str, tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    base = mlp(32)
    module = Classifier(copy.deepcopy(base))
    lora = LoRA(2, alpha=3.0, init=init, backend="peft")
    L.Trainer(**QUIET, max_steps=3, logger=False, callbacks=[lora]).fit(module)

    LoRA.export_adapter(module, tmp_path, within="net")

    loaded = PeftModel.from_pretrained(copy.deepcopy(base.eval()), tmp_path).eval()
    assert_close(loaded(X), module.eval()(X), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(X), base(X), atol=1e-3)


class Twice(nn.Module):
    """A layer under two names, and one that is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(64, 64)
        self.attention, self.head = nn.MultiheadAttention(64, 2), nn.Linear(64, 10)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"match": "first.weight"}, r"several layers share it, \['first', 'second'\]"),
        ({"match": "*in_proj_weight"}, "backend='peft' with init='default' adapts linear layers"),
        ({"init": "eva"}, "init='eva' works only with backend='parametrize'"),
    ],
)
def test_what_peft_cannot_adapt_is_refused_by_name(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LoRA(2, **options, backend="peft").prepare(Twice())
