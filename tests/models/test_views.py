"""Each layer type becomes the matrices that slicing by hand gives."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank.models.views import View, view_of


def view(module: nn.Module, name: str = "weight", *, heads: bool = False, layer: str = "layer") -> View:
    found = view_of(module, f"{layer}.{name}", module.get_parameter(name), heads=heads)
    assert found is not None
    return found


def matrices(module: nn.Module, name: str = "weight", *, heads: bool = False, layer: str = "layer") -> Tensor:
    return view(module, name, heads=heads, layer=layer)(module.get_parameter(name).detach())


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), nn.Embedding(7, 4), nn.EmbeddingBag(7, 4), nn.RNN(3, 5)])
def test_a_weight_of_two_axes_is_its_own_matrix(layer: nn.Module) -> None:
    name = "weight_ih_l0" if isinstance(layer, nn.RNN) else "weight"

    assert_close(matrices(layer, name), layer.get_parameter(name).detach())
    assert view(layer, name).parts == ()


def test_a_bilinear_layer_is_one_matrix_per_output() -> None:
    layer = nn.Bilinear(3, 4, 2)

    assert_close(matrices(layer)[1], layer.weight.detach()[1])
    assert view(layer).parts == ("o0", "o1")


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(4, 6, 2)])
def test_rows_of_a_convolution_are_its_filters(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight").detach()

    assert_close(matrices(layer), torch.stack([weight[i].reshape(-1) for i in range(6)]))


def test_a_grouped_convolution_is_one_matrix_per_group() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    weight = layer.weight.detach()

    assert_close(matrices(layer), torch.stack([weight[:3].reshape(3, 18), weight[3:].reshape(3, 18)]))
    assert view(layer).parts == ("g0", "g1")


@pytest.mark.parametrize("outputs", [4, 8])
def test_a_depthwise_convolution_is_channels_against_taps(outputs: int) -> None:
    layer = nn.Conv2d(4, outputs, 3, groups=4)

    assert_close(matrices(layer), layer.weight.detach().reshape(outputs, 9))


def test_a_transposed_convolution_maps_inputs_to_outputs_times_taps_by_its_outputs() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    weight = layer.weight.detach()

    assert_close(matrices(layer), torch.stack([weight[:, j].reshape(-1) for j in range(6)]))


def test_a_grouped_transposed_convolution_is_one_matrix_per_group() -> None:
    layer = nn.ConvTranspose1d(4, 6, 5, groups=2)
    weight = layer.weight.detach()  # inputs, outputs of one group, taps
    by_hand = [torch.stack([weight[2 * g : 2 * g + 2, j].reshape(-1) for j in range(3)]) for g in range(2)]

    assert_close(matrices(layer), torch.stack(by_hand))


def test_a_depthwise_transposed_convolution_is_channels_against_taps() -> None:
    layer = nn.ConvTranspose2d(4, 8, 3, groups=4)
    weight = layer.weight.detach()

    assert_close(matrices(layer)[5], weight[2, 1].reshape(-1))
    assert matrices(layer).shape == (8, 9)


def test_attention_is_queries_keys_and_values() -> None:
    layer = nn.MultiheadAttention(8, 2)
    weight = layer.in_proj_weight.detach()

    assert_close(matrices(layer, "in_proj_weight"), torch.stack([weight[:8], weight[8:16], weight[16:]]))
    assert view(layer, "in_proj_weight").parts == ("q", "k", "v")


def test_heads_of_attention_are_rows_of_the_projections() -> None:
    layer = nn.MultiheadAttention(8, 2)

    assert_close(matrices(layer, "in_proj_weight", heads=True)[2, 1], layer.in_proj_weight.detach()[20:24])
    assert view(layer, "in_proj_weight", heads=True).parts == ("q.h0", "q.h1", "k.h0", "k.h1", "v.h0", "v.h1")


def test_heads_of_attention_are_columns_of_the_output() -> None:
    layer = nn.MultiheadAttention(8, 2)
    found = view_of(layer, "attn.out_proj.weight", layer.out_proj.weight, heads=True)

    assert found is not None
    assert_close(found(layer.out_proj.weight.detach())[1], layer.out_proj.weight.detach()[:, 4:])


def test_separate_projections_of_attention_split_into_heads_too() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)

    assert_close(matrices(layer, "k_proj_weight"), layer.k_proj_weight.detach())
    assert_close(matrices(layer, "v_proj_weight", heads=True)[1], layer.v_proj_weight.detach()[4:])


def test_a_name_does_not_say_what_is_queries_keys_and_values() -> None:
    for name in ("qkv", "Wqkv", "qkv_proj", "in_proj", "c_attn"):
        assert view(nn.Linear(4, 12), layer=f"attn.{name}").parts == ()


def test_transposed_linear_layers_of_transformers_have_outputs_as_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 4)
    weight = layer.weight.detach()

    assert_close(matrices(layer, layer="h.0.mlp.c_fc"), weight.T)


@pytest.mark.parametrize(
    ("layer", "gates"),
    [(nn.LSTM(3, 5, proj_size=2, bidirectional=True), "ifgo"), (nn.GRU(3, 5, bidirectional=True), "rzn")],
)
def test_recurrent_layers_are_one_matrix_per_gate(layer: nn.Module, gates: str) -> None:
    weight = layer.get_parameter("weight_ih_l0_reverse").detach()
    by_hand = torch.stack([weight[5 * g : 5 * g + 5] for g in range(len(gates))])

    assert_close(matrices(layer, "weight_ih_l0_reverse"), by_hand)
    assert view(layer, "weight_hh_l0").parts == tuple(gates)


def test_the_projection_of_an_lstm_has_no_gates() -> None:
    assert view(nn.LSTM(3, 5, proj_size=2), "weight_hr_l0").parts == ()


@pytest.mark.parametrize("cell", [nn.LSTMCell(3, 5), nn.GRUCell(3, 5)])
def test_cells_have_gates_too(cell: nn.Module) -> None:
    assert matrices(cell, "weight_ih").shape[1:] == (5, 3)


def test_three_axes_of_an_unknown_layer_are_experts() -> None:
    module = nn.Module()
    module.w1 = nn.Parameter(torch.randn(2, 3, 4))

    assert_close(matrices(module, "w1"), module.w1.detach())
    assert view(module, "w1").parts == ("e0", "e1")


def test_a_leading_axis_of_one_is_no_batch() -> None:
    module = nn.Module()
    module.position = nn.Parameter(torch.randn(1, 3, 4))

    assert_close(matrices(module, "position"), module.position.detach()[0])
    assert view(module, "position").parts == ()


def test_more_axes_of_an_unknown_layer_are_columns() -> None:
    module = nn.Module()
    module.core = nn.Parameter(torch.randn(2, 3, 4, 5))

    assert_close(matrices(module, "core"), module.core.detach().reshape(2, 60))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(3, 4), "bias"),
        (nn.LayerNorm((4, 5)), "weight"),
        (nn.BatchNorm2d(3), "weight"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k"),
        (nn.LSTM(3, 4), "bias_ih_l0"),
        (nn.LazyLinear(3), "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_biases_and_scales_are_no_matrices(module: nn.Module, name: str) -> None:
    assert view_of(module, name, dict(module.named_parameters())[name]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.int8])
def test_views_take_any_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(6, 4, dtype=dtype)

    assert_close(View("(heads d) n -> heads d n", {"heads": 2})(tensor), tensor.reshape(2, 3, 4))


def test_a_view_copies_nothing_where_strides_allow() -> None:
    layer = nn.Conv2d(4, 6, 3)

    assert view(layer)(layer.weight).data_ptr() == layer.weight.data_ptr()


def test_spelled_axes_know_their_length_and_names() -> None:
    fitted = View("(d qkv) n -> qkv d n").fitted("w", (12, 5))

    assert fitted.parts == ("q", "k", "v")
    assert fitted(torch.ones(12, 5)).shape == (3, 4, 5)


def test_batches_of_several_axes_are_named_by_each() -> None:
    assert View("(a heads d) n -> a heads d n", {"a": 2, "heads": 2}).fitted("w", (8, 3)).parts == (
        "a0.h0",
        "a0.h1",
        "a1.h0",
        "a1.h1",
    )


def test_an_ellipsis_may_be_the_batch() -> None:
    assert View("... m n -> ... m n").fitted("w", (2, 1, 3, 4)).parts == ("m0.m0", "m1.m0")


def test_own_names_of_parts_are_kept() -> None:
    assert View("(p d) n -> p d n", {"p": 2}, ("gate", "up")).fitted("w", (8, 3)).parts == ("gate", "up")


def test_equal_views_are_equal_however_sizes_are_given() -> None:
    assert View("(h d) n -> h d n", {"h": 2}) == View("(h d) n -> h d n", (("h", 2),))
    assert hash(View("m n -> m n")) == hash(View("m n -> m n"))


def test_a_pattern_without_rows_and_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="must end in rows and columns"):
        View("a b -> (a b)")


def test_a_pattern_that_does_not_fit_names_parameter_shape_and_pattern() -> None:
    with pytest.raises(ValueError, match=r"'\(qkv d\) n -> qkv d n' does not fit layer.weight of shape \(10, 4\)"):
        View("(qkv d) n -> qkv d n").fitted("layer.weight", (10, 4))


def test_a_wrong_number_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match="makes 2 matrices of w, but has 3 names"):
        View("(p d) n -> p d n", {"p": 2}, ("a", "b", "c")).fitted("w", (8, 3))
