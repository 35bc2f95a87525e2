"""Gates on heads and neurons: their gradients from the weight alone are those of real gates in a copy of the model."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from examples.char_transformer import Block
from lightning_lowrank.models.units import heads_of, neurons_of
from lightning_lowrank.monitors.concentration.gates import energies, gate_gradients
from tests.trainings import adapted


class Gated(nn.Module):
    """A layer behind one gate per block of its inputs."""

    def __init__(self, layer: nn.Module, count: int, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis
        self.gates = nn.Parameter(torch.ones(count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        channels = 1 if isinstance(self.layer, nn.Conv2d | nn.ConvTranspose2d) else -1
        repeated = self.gates.repeat_interleave(x.shape[channels] // len(self.gates))
        return self.layer(x * (repeated[:, None, None] if channels == 1 else repeated))


class Attention(nn.Module):
    """Multi-head attention written out, so that a gate can stand before its output projection."""

    def __init__(self, other: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = other.num_heads
        self.weight, self.bias = other.in_proj_weight, other.in_proj_bias
        self.out_proj: nn.Module = nn.Linear(other.embed_dim, other.embed_dim)
        self.out_proj.load_state_dict(other.out_proj.state_dict())

    def forward(self, x: Tensor, *_: Tensor, **__: bool) -> tuple[Tensor, None]:
        q, k, v = F.linear(x, self.weight, self.bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Attending(nn.Module):
    """PyTorch's own attention, whose output projection is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: nn.Module = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def huggingface(name: str) -> nn.Module:
    """Small models of transformers, that take vectors."""
    import transformers as hf

    torch.manual_seed(0)
    of_bert = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "vocab_size": 11,
    }
    of_gpt2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16, "vocab_size": 11}
    made: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**of_bert), add_pooling_layer=False),
        "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**of_gpt2)),
        "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**of_bert, num_key_value_heads=1, head_dim=4)),
        # Where hidden neurons are as many as entries of a state, sizes do not tell which layer reads which.
        "square bert": lambda: hf.BertModel(
            hf.BertConfig(**of_bert | {"intermediate_size": 12}), add_pooling_layer=False
        ),
        "square gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**of_gpt2, n_inner=12)),
        "square llama": lambda: hf.LlamaModel(hf.LlamaConfig(**of_bert | {"intermediate_size": 12})),
        "lfm2": lambda: hf.Lfm2Model(
            hf.Lfm2Config(
                **of_bert | {"intermediate_size": 12},
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"],
                block_auto_adjust_ff_dim=False,
            )
        ),
        "codegen": lambda: hf.CodeGenModel(hf.CodeGenConfig(**of_gpt2 | {"n_head": 4}, rotary_dim=2)),
        # Exactly 36 rows, which are 24 of queries, 6 of keys and 6 of values.
        "phi3": lambda: hf.Phi3Model(
            hf.Phi3Config(
                **of_bert | {"num_attention_heads": 4},
                num_key_value_heads=1,
                head_dim=6,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        "deberta": lambda: hf.DebertaModel(
            hf.DebertaConfig(
                **of_bert, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False
            )
        ),
    }
    return made[name]().eval()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    named = type(model).__name__.endswith("Model")
    outputs = model(inputs_embeds=x).last_hidden_state if named else model(x)
    return outputs.sin().square().mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], list[str]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)),
        (5, 12),
        [],
        ["2", "4"],
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)),
        (5, 2, 7, 7),
        [],
        ["2"],
    ),
    "transposed convolutions": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3)),
        (5, 2, 7, 7),
        [],
        ["2"],
    ),
    "fused qkv": (lambda: Block(12, 3), (5, 8, 12), ["out"], ["mlp.2"]),
    "nn.MultiheadAttention": (Attending, (5, 8, 12), ["attention.out_proj"], []),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True),
        (5, 8, 12),
        ["self_attn.out_proj"],
        ["linear2"],
    ),
    "bert": (
        lambda: huggingface("bert"),
        (5, 8, 12),
        [f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)],
        [f"encoder.layer.{i}.output.dense" for i in (0, 1)],
    ),
    "gpt2": (
        lambda: huggingface("gpt2"),
        (5, 8, 12),
        [f"h.{i}.attn.c_proj" for i in (0, 1)],
        [f"h.{i}.mlp.c_proj" for i in (0, 1)],
    ),
    "square bert": (
        lambda: huggingface("square bert"),
        (5, 8, 12),
        [f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)],
        [f"encoder.layer.{i}.output.dense" for i in (0, 1)],
    ),
    "square gpt2": (
        lambda: huggingface("square gpt2"),
        (5, 8, 12),
        [f"h.{i}.attn.c_proj" for i in (0, 1)],
        [f"h.{i}.mlp.c_proj" for i in (0, 1)],
    ),
    "square llama": (
        lambda: huggingface("square llama"),
        (5, 8, 12),
        [f"layers.{i}.self_attn.o_proj" for i in (0, 1)],
        [f"layers.{i}.mlp.down_proj" for i in (0, 1)],
    ),
    # Its gated convolution has three gates in one projection, and no heads.
    "lfm2": (
        lambda: huggingface("lfm2"),
        (5, 8, 12),
        ["layers.1.self_attn.out_proj"],
        [f"layers.{i}.feed_forward.w2" for i in (0, 1)],
    ),
    "codegen": (
        lambda: huggingface("codegen"),
        (5, 8, 12),
        [f"h.{i}.attn.out_proj" for i in (0, 1)],
        [f"h.{i}.mlp.fc_out" for i in (0, 1)],
    ),
    "phi3": (
        lambda: huggingface("phi3"),
        (5, 8, 12),
        [f"layers.{i}.self_attn.o_proj" for i in (0, 1)],
        [],
    ),
    "deberta": (
        lambda: huggingface("deberta"),
        (5, 8, 12),
        [f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)],
        [f"encoder.layer.{i}.output.dense" for i in (0, 1)],
    ),
    "llama": (
        lambda: huggingface("llama"),
        (5, 8, 12),
        [f"layers.{i}.self_attn.o_proj" for i in (0, 1)],
        [f"layers.{i}.mlp.down_proj" for i in (0, 1)],
    ),
}


NUM_HEADS = {"codegen": 4, "phi3": 4}


@pytest.mark.parametrize("case", MODELS)
def test_gate_gradients_are_those_of_gates_in_a_copy_of_the_model(case: str) -> None:
    make, shape, heads, neurons = MODELS[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    found = heads_of(model, {}), neurons_of(model, None, heads)
    loss(model, x).backward()

    assert [list(parts) for parts in found] == [heads, neurons]
    assert {part.count for part in found[0].values()} <= {NUM_HEADS.get(case, 3)}
    for name, part in {**found[0], **found[1]}.items():
        (weight,) = part.parameters
        assert weight.grad is not None
        ours = gate_gradients(weight, weight.grad, part.count, part.axis)
        assert_close(ours, real(model, name, part.count, part.axis, x), rtol=1e-9, atol=1e-14)


def real(model: nn.Module, name: str, count: int, axis: int, x: Tensor) -> Tensor:
    """By autograd, of gates that stand before the layer."""
    copy = deepcopy(model)
    if isinstance(
        copy.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention
    ):  # never called, so that a gate would not be either
        owner = name.rpartition(".")[0]
        copy.set_submodule(owner, Attention(copy.get_submodule(owner)).double())  # type: ignore[arg-type]
    gated = Gated(copy.get_submodule(name), count, axis)
    copy.set_submodule(name, gated)
    loss(copy, x).backward()
    assert gated.gates.grad is not None
    return gated.gates.grad


class Gated3(nn.Module):
    """Names and order of Meta's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 9)


def test_a_gate_that_is_declared_last_reads_no_neurons() -> None:
    assert list(neurons_of(Gated3(), None, [])) == ["w2"]


def test_square_layers_of_which_nothing_tells_that_one_reads_the_other_have_no_neurons() -> None:
    assert neurons_of(nn.ModuleDict({"actor": nn.Linear(6, 6), "critic": nn.Linear(6, 1)}), None, []) == {}
    assert list(neurons_of(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)), None, [])) == ["2"]


def test_heads_and_neurons_can_be_named() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))

    assert heads_of(net, {"1": 4})["1"].count == 4
    assert list(neurons_of(net, "0", [])) == ["0"]


@pytest.mark.parametrize("heads", [{"1": 5}, {"1": 0}, {"1": True}, {"attention": 2}])
def test_heads_that_are_not_there_are_refused(heads: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"heads: '(1|attention)'"):
        heads_of(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), heads)


def test_a_parametrised_layer_is_not_computed_when_parts_are_looked_for() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)))
    before = deepcopy(net.state_dict())

    assert heads_of(net, {}) == neurons_of(net, None, []) == {}
    assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_whose_weight_is_not_what_they_say_are_left_out() -> None:
    """Grouped convolutions; packed weights of quantised layers."""
    packed = nn.Linear(5, 4)
    packed.weight = nn.Parameter(torch.zeros(20, 1))
    grouped = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6))

    assert neurons_of(nn.Sequential(nn.Linear(6, 5), packed), None, []) == neurons_of(grouped, None, []) == {}
    assert neurons_of(nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4)), None, []) == {}


@pytest.mark.parametrize("named", [{"heads": {"2": 5}}, {"neurons": ["2"]}])
def test_a_computed_weight_that_is_named_is_refused(named: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))

    with pytest.raises(ValueError, match=r"(heads|neurons): .*'2'.*computed"):
        heads_of(net, named["heads"]) if "heads" in named else neurons_of(net, named["neurons"], [])


def test_a_weight_that_another_layer_has_too_tells_nothing_of_neurons() -> None:
    """Its gradient is that of both uses."""
    net = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 5), nn.Linear(5, 11, bias=False))
    alone = [*neurons_of(net, None, [])]
    net[2].weight = net[0].weight

    assert alone == ["2"]
    assert neurons_of(net, None, []) == {}


def test_a_block_that_is_used_in_several_layers_has_its_neurons_once() -> None:
    block = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))

    assert list(neurons_of(nn.ModuleList([block, block]), None, [])) == ["0.2"]


def test_between_the_factors_of_a_lora_pair_are_no_neurons() -> None:
    assert neurons_of(adapted(), None, []) == {}


def test_energies_are_mean_squares_of_blocks_along_an_axis() -> None:
    tensor = torch.arange(24.0).view(4, 6)

    assert_close(
        energies(tensor, 3, 1), torch.stack([tensor[:, i : i + 2].square().mean() for i in (0, 2, 4)]).double()
    )
    assert_close(energies(tensor, 2, 0), torch.stack([tensor[:2].square().mean(), tensor[2:].square().mean()]).double())
    assert_close(energies(torch.tensor([1e-30])), torch.tensor([1e-60], dtype=torch.float64))
