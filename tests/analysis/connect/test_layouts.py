"""Transformers of Hugging Face, which `torch.fx` cannot trace: planted permutations are found, functions stay."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from lightning_lowrank.analysis.connect.matching import matched
from lightning_lowrank.models.tracing import traced

TOKENS = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 20, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def classifying_bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def masked_bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, head_dim=4))


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """With biases and norms that tell units apart."""
    torch.manual_seed(seed)
    module = make().double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def outputs_of(module: nn.Module) -> Callable[..., Tensor]:
    return lambda state: functional_call(module, dict(state), (TOKENS,))[0].detach()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Tied weights once."""
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


@pytest.mark.parametrize("kind", ["stream|neurons|heads", "of head"])
@pytest.mark.parametrize("make", [gpt2, classifying_bert, masked_bert], ids=lambda make: make.__name__)
def test_a_transformer_whose_units_changed_places_is_put_back(make: Callable[[], nn.Module], kind: str) -> None:
    module = made(make)
    original = state_of(module)
    shuffled, generator = dict(original), torch.Generator().manual_seed(1)
    moving = [group for group in traced(module) if re.search(rf"({kind})( \d+)?$", group.name)]
    for group in moving:
        group.permute(shuffled, torch.randperm(group.size, generator=generator))
    assert len(moving) == (5 if "stream" in kind else 12)
    assert_close(outputs_of(module)(shuffled), outputs_of(module)(original))

    found = matched(original, shuffled, traced(module), outputs_of(module))

    assert_close(found.state, original, rtol=0, atol=0)
    assert found.dropped == [] and "stream" in found.used


@pytest.mark.parametrize("make", [gpt2, classifying_bert, masked_bert, llama], ids=lambda make: make.__name__)
def test_every_matrix_belongs_to_a_group(make: Callable[[], nn.Module]) -> None:
    module = made(make)

    bound = {binding.name for group in traced(module) for binding in group.bindings}

    assert {name for name, p in module.named_parameters() if p.ndim > 1} <= bound


def test_within_heads_of_rotary_embeddings_nothing_moves() -> None:
    a, b = made(llama, 1), made(llama, 2)

    found = matched(state_of(a), state_of(b), traced(a), outputs_of(b))

    assert len(found.dropped) == 6 and all("queries and keys" in name for name in found.dropped)
    assert found.deviation < 1e-10 and {"stream", "model.layers.1.mlp.down_proj neurons"} <= set(found.used)
