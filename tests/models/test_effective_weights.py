"""Weights that are computed: LoRA pairs against the libraries that train them, parametrised ones against the layer
itself.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.testing import assert_close

from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.sites import Site, sites

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers import ModernBertConfig
    from transformers.models.modernbert.modeling_modernbert import ModernBertAttention
    from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """A mixture's weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.w)


class Net(nn.Module):
    """Layers that peft knows how to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.bert = ModernBertAttention(ModernBertConfig(hidden_size=8, num_attention_heads=2), 0)
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(8, 6, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.attn = nn.MultiheadAttention(8, 2)
        self.experts = Experts()


LAYERS = ["linear", "bert.Wqkv", "embed", "conv"]


def adapt(module: nn.Module, *targets: str, **options: object) -> nn.Module:
    """The module with two adapters, neither of them at 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter, rank in (("default", 2), ("other", 4)):
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), **options)
            module = peft.inject_adapter_in_model(config, module, adapter)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return module


@pytest.fixture
def adapted() -> nn.Module:
    return adapt(Net(), *LAYERS, "grouped", "attn", target_parameters=["experts.w"])


def site(module: nn.Module, name: str) -> Site:
    return next(found for found in sites(module) if found.name == name)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_a_pair_is_the_change_that_peft_merges(adapted: nn.Module, layer: str, adapter: str) -> None:
    merged = adapted.get_submodule(layer).get_delta_weight(adapter).detach()  # type: ignore[operator]
    expected = merged.reshape(3, 8, 8) if layer == "bert.Wqkv" else merged.flatten(1)

    assert_close(site(adapted, f"{layer}.lora.{adapter}").weight().float(), expected)


def test_a_pair_on_a_transposed_linear_layer_has_outputs_as_rows() -> None:
    layer = adapt(nn.ModuleDict({"c_fc": Conv1D(12, 8)}), "c_fc").get_submodule("c_fc")

    assert_close(site(layer, "lora.default").weight().float(), layer.get_delta_weight("default").detach().T)  # type: ignore[operator]


def test_a_pair_on_fused_attention_is_queries_keys_and_values(adapted: nn.Module) -> None:
    assert site(adapted, "bert.Wqkv.lora.default").labels == (
        "bert.Wqkv.lora.default.q",
        "bert.Wqkv.lora.default.k",
        "bert.Wqkv.lora.default.v",
    )
    assert site(adapted, "attn.lora.default").weight().shape == (3, 8, 8)


def test_a_pair_on_experts_is_one_matrix_each(adapted: nn.Module) -> None:
    merged = adapted.get_submodule("experts").get_delta_weight("other").detach()  # type: ignore[operator]
    found = site(adapted, "experts.lora.other")

    assert_close(found.weight().float(), merged)
    assert found.labels == tuple(f"experts.lora.other.e{i}" for i in range(3))


def test_a_pair_on_a_grouped_convolution_puts_out_what_its_layers_do(adapted: nn.Module) -> None:
    layer = adapted.get_submodule("grouped")
    patch = torch.randn(1, 8, 3, 3)
    out = layer.lora_B["default"](layer.lora_A["default"](patch))  # type: ignore[index, operator]

    assert_close(site(adapted, "grouped.lora.default").weight().float() @ patch.flatten(), out.flatten())


def test_base_weights_stand_beside_their_pairs(adapted: nn.Module) -> None:
    names = {found.name for found in sites(adapted)}

    assert {f"{layer}.base_layer.weight" for layer in LAYERS} <= names
    assert not any("lora_" in name for name in names)


@pytest.mark.parametrize("pattern", ["*.lora.other", "*lora_A.other.weight", "re:lora_(embedding_)?B.other"])
def test_pairs_answer_to_their_name_and_to_those_of_their_factors(adapted: nn.Module, pattern: str) -> None:
    assert "linear.lora.other" in [found.name for found in sites(adapted, match=pattern)]
    assert "linear.lora.default" not in [found.name for found in sites(adapted, match=pattern)]


def test_a_pair_has_the_rank_of_its_factors_even_in_bfloat16() -> None:
    module = nn.Module()
    module.lora_A = nn.Parameter(torch.randn(2, 32).bfloat16())
    module.lora_B = nn.Parameter(torch.randn(48, 2).bfloat16())

    assert torch.linalg.matrix_rank(site(module, "lora").weight()) == 2


@pytest.mark.parametrize("name", ["linear", "embed", "conv", "bert.Wqkv", "experts", "grouped"])
def test_the_tangent_of_a_pair_is_its_derivative(adapted: nn.Module, name: str) -> None:
    found = site(adapted, f"{name}.lora.default")
    a, b = (p.detach().double() for p in found.parameters)
    da, db = torch.randn_like(a), torch.randn_like(b)
    assert found.product is not None
    # Exact for what is linear in each factor.
    expected = found.view(found.product(a + da, b + db) - found.product(a, b) - found.product(da, db))

    assert_close(found.tangent([da, db]), expected)
    assert_close(found.tangent([da, torch.zeros_like(db)]) + found.tangent([torch.zeros_like(da), db]), expected)


def pair(a: tuple[int, int], b: tuple[int, int], letters: str = "AB", **attributes: object) -> nn.Module:
    """A layer with the two factors as parameters, as loralib and litgpt have them."""
    module = nn.Module()
    module.register_parameter(f"lora_{letters[0]}", nn.Parameter(torch.randn(a)))
    module.register_parameter(f"lora_{letters[1]}", nn.Parameter(torch.randn(b)))
    for name, value in attributes.items():
        setattr(module, name, value)
    return nn.ModuleDict({"layer": module})


@pytest.mark.parametrize("letters", ["AB", "ab"])
def test_factors_may_be_parameters_of_the_layer(letters: str) -> None:
    module = pair((2, 5), (7, 2), letters)
    a, b = module.parameters()

    assert_close(site(module, "layer.lora").weight(), b.detach().double() @ a.detach().double())


def test_factors_may_be_layers_called_up_and_down() -> None:
    module = nn.ModuleDict({"lora_down": nn.Linear(5, 2), "lora_up": nn.Linear(2, 7)})

    assert site(module, "lora").weight().shape == (7, 5)


def test_factors_may_be_stored_the_other_way_round() -> None:
    module = pair((5, 2), (2, 7))
    a, b = module.parameters()

    assert_close(site(module, "layer.lora").weight(), (a.detach().double() @ b.detach().double()).T)


def test_merged_pairs_are_one_matrix_per_enabled_part() -> None:
    module = pair((4, 5), (14, 2), enable_lora=[True, False, True])
    a, b = (p.detach().double() for p in module.parameters())
    found = site(module, "layer.lora")

    assert_close(found.weight(), torch.stack([b[:7] @ a[:2], b[7:] @ a[2:]]))
    assert found.labels == ("layer.lora.q", "layer.lora.v")


@pytest.mark.parametrize(
    "module",
    [pair((4, 5), (7, 3)), pair((6, 5), (15, 2), qkv_shapes=(9, 3, 3)), nn.ParameterDict({"lora_A": torch.ones(2, 3)})],
    ids=["shapes", "unequal parts", "alone"],
)
def test_factors_that_do_not_make_a_pair_stand_for_themselves(module: nn.Module) -> None:
    assert [found.parameters for found in sites(module)] == [(parameter,) for parameter in module.parameters()]


PARAMETRIZED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 7)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv1d(5, 7, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 7)),
    "orthogonal, Cayley": lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"),
}


@pytest.fixture(params=PARAMETRIZED)
def parametrized(request: pytest.FixtureRequest) -> nn.Module:
    return PARAMETRIZED[request.param]()


def test_a_parametrised_weight_is_that_of_the_layer_in_evaluation(parametrized: nn.Module) -> None:
    found = sites(parametrized)
    parametrized.eval()

    assert [s.name for s in found] == ["weight"]
    assert_close(found[0].weight(), parametrized.weight.detach().flatten(1), rtol=0, atol=0)  # type: ignore[operator]


def test_a_weight_is_computed_without_a_trace(parametrized: nn.Module) -> None:
    parametrized.train()
    state = {name: tensor.clone() for name, tensor in parametrized.state_dict().items()}
    versions = [tensor._version for tensor in parametrized.state_dict(keep_vars=True).values()]
    buffers, random = [id(buffer) for buffer in parametrized.buffers()], torch.get_rng_state()
    found = site(parametrized, "weight")
    found.weight()
    found.tangent([torch.ones_like(p) for p in found.parameters])

    assert_close(parametrized.state_dict(), state, rtol=0, atol=0)
    assert [tensor._version for tensor in parametrized.state_dict(keep_vars=True).values()] == versions
    assert [id(buffer) for buffer in parametrized.buffers()] == buffers
    assert all(module.training for module in parametrized.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_types_are_those_of_the_layer_not_of_its_parametrization(parametrized: nn.Module) -> None:
    assert (
        len(sites(parametrized, match=["type:Linear"] if isinstance(parametrized, nn.Linear) else "type:_ConvNd")) == 1
    )


def test_the_tangent_of_a_parametrised_weight_is_the_change_of_its_largest_original() -> None:
    found = site(parametrizations.weight_norm(nn.Linear(5, 7)), "weight")
    magnitude, direction = (torch.randn_like(p) for p in found.parameters)

    assert_close(found.tangent([magnitude, direction]), direction)


class Noisy(nn.Module):
    """What no parametrization should do: count in place, draw, depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight + torch.rand(()) + self.training


def test_even_a_noisy_parametrization_leaves_no_trace() -> None:
    layer = parametrize.register_parametrization(nn.Linear(3, 4), "weight", Noisy())
    calls, random = layer.get_buffer("parametrizations.weight.0.calls").clone(), torch.get_rng_state()
    site(layer, "weight").weight()

    assert_close(layer.get_buffer("parametrizations.weight.0.calls"), calls)
    assert torch.equal(torch.get_rng_state(), random)


def test_flags_come_back_after_an_exception() -> None:
    layer = parametrize.register_parametrization(nn.Linear(3, 4), "weight", Noisy())
    found = site(layer, "weight")
    layer.get_submodule("parametrizations.weight.0").forward = lambda weight: 1 / 0  # type: ignore[method-assign]

    with pytest.raises(ZeroDivisionError):
        found.weight()
    assert all(module.training for module in layer.modules())


class Factored(nn.Module):
    """A weight that is a product of two smaller originals."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :2].clone(), weight[:2].clone()


def test_the_tangent_of_smaller_originals_is_pushed_through_the_parametrization() -> None:
    found = site(parametrize.register_parametrization(nn.Linear(5, 7), "weight", Factored(), unsafe=True), "weight")
    left, right = (p.detach() for p in found.parameters)
    d_left, d_right = torch.randn_like(left), torch.randn_like(right)

    assert_close(found.weight(), left @ right)
    assert_close(found.tangent([d_left, d_right]), d_left @ right + left @ d_right)


def test_a_second_parametrization_counts() -> None:
    layer = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Factored(), unsafe=True)
    sites(layer)
    parametrize.register_parametrization(layer, "weight", nn.Tanh(), unsafe=True)

    assert_close(site(layer, "weight").weight(), layer.weight.detach())


def test_a_parametrised_out_projection_has_heads() -> None:
    layer = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(layer.out_proj)
    found = next(s for s in sites(layer, heads=True) if s.name == "out_proj.weight")

    assert_close(found.weight()[1], layer.out_proj.weight.detach()[:, 4:])


def test_autocast_and_grad_mode_do_not_matter() -> None:
    for module in (pair((2, 5), (7, 2)), parametrizations.weight_norm(nn.Linear(5, 7))):
        (found,) = sites(module)
        changes = [torch.randn_like(p) for p in found.parameters]
        plain = found.weight(), found.tangent(changes)
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            assert_close((found.weight(), found.tangent(changes)), plain, rtol=0, atol=0)
            assert not found.weight().requires_grad


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "older weight norm": lambda: weight_norm(nn.Conv1d(5, 7, 3)),
    "older spectral norm": lambda: spectral_norm(nn.Linear(5, 7)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(5, 7), "weight", amount=0.4),
    "pruned twice": lambda: prune.random_unstructured(
        prune.ln_structured(nn.Conv1d(5, 7, 3), "weight", amount=2, n=2, dim=0), "weight", amount=0.4
    ),
}


@pytest.fixture(params=HOOKED)
def hooked(request: pytest.FixtureRequest) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return HOOKED[request.param]()


def call(layer: nn.Module) -> Tensor:
    """What the layer multiplies by in a call."""
    layer(torch.zeros(1, 5) if isinstance(layer, nn.Linear) else torch.zeros(1, 5, 4))
    return layer.weight.detach().flatten(1)  # type: ignore[operator, union-attr]


def test_a_hooked_weight_is_that_of_the_layer_in_evaluation_under_the_name_that_the_layer_has(
    hooked: nn.Module,
) -> None:
    call(hooked.train())
    found = site(hooked, "weight")

    assert_close(found.weight(), call(hooked.eval()), rtol=1e-6, atol=1e-7)
    assert not found.weight().requires_grad
    assert len(sites(hooked)) == 1


def test_a_hooked_weight_is_computed_without_a_trace(hooked: nn.Module) -> None:
    call(hooked.train())
    state = {name: tensor.clone() for name, tensor in hooked.state_dict().items()}
    versions = [tensor._version for tensor in hooked.state_dict(keep_vars=True).values()]
    found = site(hooked, "weight")
    found.weight()
    found.tangent([torch.ones_like(p) for p in found.parameters])

    assert_close(hooked.state_dict(), state, rtol=0, atol=0)
    assert [tensor._version for tensor in hooked.state_dict(keep_vars=True).values()] == versions


def test_hooked_weights_answer_to_their_name_and_to_those_of_their_originals(hooked: nn.Module) -> None:
    names = [name for name, parameter in hooked.named_parameters() if parameter.ndim > 1]

    assert all(len(sites(hooked, match=name)) == 1 for name in ["weight", *names])


def test_what_is_masked_takes_no_part_in_the_tangent() -> None:
    layer = prune.l1_unstructured(nn.Linear(5, 7), "weight", amount=0.4)
    change = torch.randn(7, 5)

    assert_close(site(layer, "weight").tangent([change]), change * layer.weight_mask)


def test_pruning_gives_no_name_away_and_gives_the_weight_back() -> None:
    layer = nn.Linear(5, 7)
    names = [[s.name for s in sites(layer)], list(chosen_parameters(layer, "*weight", None))]
    prune.l1_unstructured(layer, "weight", amount=0.4)
    prune.l1_unstructured(layer, "bias", amount=0.4)

    assert [[s.name for s in sites(layer)], list(chosen_parameters(layer, "*weight", None))] == names
    assert set(chosen_parameters(layer, None, None)) == {"bias", "weight"}
    pruned = site(layer, "weight").weight()
    prune.remove(layer, "weight")
    assert_close(site(layer, "weight").weight(), pruned, rtol=0, atol=0)


def test_fused_attention_stays_apart_when_it_is_pruned() -> None:
    layer = nn.MultiheadAttention(8, 2)
    prune.random_unstructured(layer, "in_proj_weight", amount=0.5)
    found = site(layer, "in_proj_weight")

    assert found.labels == ("in_proj_weight.q", "in_proj_weight.k", "in_proj_weight.v")
    assert_close(found.weight().flatten(0, 1), layer.in_proj_weight.detach())
