"""What pairs add, what they begin as, what becomes of them. Oracles: peft, and numpy's decompositions."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_lowrank import LoRA
from tests.trainings import Fused, gpt2, mlp


class Kinds(nn.Module):
    """A layer of each kind that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        self.turned = Conv1D(10, 12)
        self.plain = nn.Linear(10, 8)
        self.kernel = nn.Conv2d(1, 5, 3, stride=2, padding=1)
        self.line = nn.Conv1d(5, 6, 2)  # peft drops the dilation of others
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.plain(torch.tanh(self.turned(self.table(x)))))
        x = self.line(torch.tanh(self.kernel(x[:, None])).mean(2))
        return self.head(x.mean(-1))


LAYERS = ("table", "turned", "plain", "kernel", "line")
TOKENS = torch.arange(40).reshape(4, 10) % 17


def loss_of(module: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return module(TOKENS).square().mean()


def ours(module: nn.Module, **options: Any) -> nn.Module:
    LoRA(**{"r": 2} | options).prepare(module)
    return module


def factors_of(module: nn.Module, layer: str) -> tuple[nn.Parameter, nn.Parameter]:
    found = module.get_submodule(layer)
    name = "lora_embedding_" if hasattr(found, "lora_embedding_A") else "lora_"
    return getattr(found, f"{name}A"), getattr(found, f"{name}B")


def of_peft(module: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    found: Any = module.get_submodule(layer)
    if "default" in found.lora_embedding_A:
        return found.lora_embedding_A["default"], found.lora_embedding_B["default"]
    return found.lora_A["default"].weight, found.lora_B["default"].weight


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("rslora", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_outputs_and_gradients_are_those_of_peft(rslora: bool, dropout: float) -> None:
    layers = [layer for layer in LAYERS if layer != "table" or not dropout]
    base = Kinds()
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=layers, use_rslora=rslora, lora_dropout=dropout, init_lora_weights=False
    )
    expected = inject_adapter_in_model(config, copy.deepcopy(base))
    found = ours(copy.deepcopy(base), alpha=6.0, match=[f"{x}.weight" for x in layers], rslora=rslora, dropout=dropout)
    for layer in layers:
        for own, theirs in zip(factors_of(found, layer), of_peft(expected, layer), strict=True):
            own.data.copy_(theirs.detach().reshape(own.shape))

    losses = loss_of(found), loss_of(expected)
    for loss in losses:
        loss.backward()

    assert_close(*losses)
    for layer in layers:
        for own, theirs in zip(factors_of(found, layer), of_peft(expected, layer), strict=True):
            assert_close(own.grad, theirs.grad.reshape(own.shape))
        assert found.get_submodule(layer).weight.grad is None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_what_is_taken_out_of_a_weight_is_what_peft_takes(init: str) -> None:
    base = mlp(32)
    u, _, v = torch.linalg.svd(base[0].weight.detach(), full_matrices=False)
    base[0].weight.data = u * 2.0 ** -torch.arange(32) @ v
    theirs: Any = inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=init), copy.deepcopy(base)
    )

    found = ours(copy.deepcopy(base), r=3, alpha=6.0, match="0.weight", init=init)

    assert_close(found[0].weight, theirs[0].base_layer.weight, rtol=1e-3, atol=1e-5)


def test_pissa_leaves_the_tail_of_the_spectrum_and_balances_the_top() -> None:
    net = mlp(32)
    values = np.linalg.svd(net[0].weight.detach().numpy(), compute_uv=False)

    ours(net, r=3, alpha=6.0, init="pissa")

    a, b = (x.detach().numpy() for x in factors_of(net, "0"))
    left = np.linalg.svd(net[0].weight.detach().numpy(), compute_uv=False)
    np.testing.assert_allclose(left[: len(values) - 3], values[3:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(2 * a @ a.T, np.diag(values[:3]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(2 * b.T @ b, np.diag(values[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Kinds, lambda: mlp(32), gpt2, Fused], ids=["kinds", "mlp", "gpt2", "attention"])
@pytest.mark.parametrize("init", ["default", "pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_a_model_begins_as_it_was(init: str, make: Any) -> None:
    net = make().eval()
    x = TOKENS if make is Kinds else torch.rand(4, 64)
    before = net(x)
    keys, classes = list(net.state_dict()), [type(layer) for layer in net.modules()]

    lora = LoRA(r=2, init=init, alpha=3.0)
    lora.prepare(net)

    assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape))
    adapted, merged = net(x), lora.merged_state_dict(net)
    assert not torch.allclose(adapted, before, atol=1e-4)
    assert lora.merge(net) is net
    assert_close(net(x), adapted, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == keys
    assert [type(layer) for layer in net.modules()] == classes
    assert_close(merged, dict(net.state_dict()), rtol=0, atol=0)
    assert all(p.requires_grad for p in net.parameters())


def test_queries_keys_and_values_have_a_pair_each_whatever_their_order() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    config = GPTNeoXConfig(
        vocab_size=17, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16
    )
    net = ours(GPTNeoXModel(config), match="*query_key_value.weight")
    layer: Any = net.layers[0].attention.query_key_value
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["k"].fill_(1.0)

    LoRA.merge(net)

    changed = (layer.weight != before).any(1).view(3, 3, 4)  # heads, then q, k and v
    assert changed[:, 1].all() and not changed[:, 0].any() and not changed[:, 2].any()


@pytest.mark.parametrize("mode", [True, False])  # pretrained models of Hugging Face are trained in evaluation mode
def test_eva_takes_the_top_directions_of_the_first_inputs(mode: bool) -> None:
    net, x = mlp(32), torch.rand(50, 64) * torch.linspace(0, 3, 64)
    ours(net, r=4, init="eva", match="0.weight")
    with torch.no_grad():
        net.eval()(torch.rand(3, 64))
    net.train(mode)(x)
    net(torch.rand(9, 64))

    vectors = np.linalg.svd(x.numpy())[2][:4]

    cosines = np.linalg.svd(vectors @ factors_of(net, "0")[0].detach().numpy().T, compute_uv=False)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


def test_copies_have_pairs_of_their_own() -> None:
    net, x = ours(mlp(32), init="orthogonal"), torch.rand(3, 64)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = net(x)
        with torch.no_grad():
            other[0].lora_A.add_(1.0)
        assert_close(net(x), before)
        assert not torch.allclose(other(x), before)
        assert list(LoRA.merge(other).state_dict()) == list(mlp(32).state_dict())


def test_tied_layers_share_their_pairs_and_stay_tied() -> None:
    from tests.trainings import Tied

    net, x = ours(Tied(), match="first.weight", init="orthogonal"), torch.rand(3, 64)
    with torch.no_grad():
        net.first.lora_B.add_(0.1)
    before = net(x)

    assert net.second.lora_A is net.first.lora_A
    LoRA.merge(net)
    assert net.first.weight is net.second.weight
    assert_close(net(x), before, rtol=1e-4, atol=1e-5)
