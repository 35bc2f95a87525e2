"""Blocks are found by their lists. Oracle: the models' own documentation of where their layers are."""

from torch import nn

from lightning_lowrank.models.blocks import blocks
from tests.trainings import gpt2, mlp


def test_blocks_are_in_the_outermost_lists_of_one_class() -> None:
    def layer() -> nn.Module:
        return nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    net = nn.ModuleDict({"body": nn.ModuleList([layer(), layer()]), "mixed": nn.ModuleList([nn.Tanh(), nn.ReLU()])})

    assert blocks(net) == ["body.0", "body.1"]


def test_those_of_transformers_are_the_layers_of_their_encoders() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 8}

    assert blocks(BertModel(BertConfig(**sizes, vocab_size=9))) == [f"encoder.layer.{i}" for i in range(3)]


def test_one_layer_alone_or_a_sequence_is_no_list() -> None:
    assert blocks(gpt2()) == blocks(mlp()) == []
