"""Sites: which matrices a module has, under which names, and how users choose."""

import sys
from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from lightning_lowrank.models.sites import Site, sites
from lightning_lowrank.models.views import View


class Block(nn.Module):
    """Attention and a convolution, as users name them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.conv = nn.Conv1d(8, 8, 3, groups=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([Block(), Block()])


NET = Net()
IN_A_BLOCK = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.2.weight", "conv.weight"]
NAMES = ["embed.weight", *(f"blocks.{i}.{name}" for i in (0, 1) for name in IN_A_BLOCK)]


def names(module: nn.Module, **choice: object) -> list[str]:
    return [site.name for site in sites(module, **choice)]  # type: ignore[arg-type]


def site(module: nn.Module, **choice: object) -> Site:
    (found,) = sites(module, **choice)  # type: ignore[arg-type]
    return found


def test_every_matrix_is_there_in_the_order_of_the_module() -> None:
    assert names(NET) == NAMES


def test_there_is_one_label_per_matrix() -> None:
    for heads in (False, True):
        for found in sites(NET, heads=heads):
            assert len(found.labels) == found.weight().shape[:-2].numel()


def test_labels_are_the_name_and_the_part() -> None:
    labels = list(
        chain.from_iterable(
            found.labels for found in sites(NET.blocks[0], match=["attn.in_proj_weight", "conv.*", "mlp.0.*"])
        )
    )

    assert labels == [
        "attn.in_proj_weight.q",
        "attn.in_proj_weight.k",
        "attn.in_proj_weight.v",
        "mlp.0.weight",
        "conv.weight.g0",
        "conv.weight.g1",
    ]


def test_heads_reach_the_output_projection() -> None:
    found = site(NET, match="blocks.0.attn.out_proj.weight", heads=True)

    assert found.labels == ("blocks.0.attn.out_proj.weight.h0", "blocks.0.attn.out_proj.weight.h1")
    assert_close(
        found.weight()[1], NET.blocks[0].get_submodule("attn.out_proj").get_parameter("weight").detach()[:, 4:]
    )


def test_weight_matrices_and_tangent_agree_on_a_plain_parameter() -> None:
    found = site(NET, match="blocks.1.conv.weight")
    change = torch.randn_like(found.parameters[0])

    assert_close(found.weight(), found.view(found.parameters[0].detach()))
    assert_close(found.tangent([change]), found.view(change))
    assert not found.weight().requires_grad


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("embed.weight", ["embed.weight"]),
        ("*.attn.*", [n for n in NAMES if ".attn." in n]),
        (["embed.*", "*.conv.weight"], ["embed.weight", "blocks.0.conv.weight", "blocks.1.conv.weight"]),
        (r"re:mlp\.[02]", [n for n in NAMES if ".mlp." in n]),
        ("re:^blocks.0.*conv", ["blocks.0.conv.weight"]),
        ("type:Linear", [n for n in NAMES if ".mlp." in n or "out_proj" in n]),
        ("type:_ConvNd", [n for n in NAMES if ".conv." in n]),
        ("blocks.[!0].conv.*", ["blocks.1.conv.weight"]),
    ],
)
def test_match_keeps_what_a_pattern_fits(match: str | list[str], expected: list[str]) -> None:
    assert names(NET, match=match) == expected
    assert names(NET, exclude=match) == [n for n in NAMES if n not in expected]


def test_exclude_takes_from_what_match_keeps() -> None:
    assert names(NET, match="blocks.0.*", exclude=["*.attn.*", "type:Linear"]) == ["blocks.0.conv.weight"]


def test_matrices_with_a_shorter_side_are_left_out() -> None:
    assert names(NET, min_size=6) == [n for n in NAMES if "embed" not in n and ".conv." not in n]


def test_the_size_is_that_of_one_head_where_heads_are_asked() -> None:
    assert "blocks.0.attn.in_proj_weight" not in names(NET, min_size=6, heads=True)


@pytest.mark.parametrize(
    "choice", [{"match": "*.attm.*"}, {"exclude": ["*.attn.*", "*.attm.*"]}, {"views": {"*.attm.*": "m n -> m n"}}]
)
def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(choice: dict[str, object]) -> None:
    with pytest.raises(
        ValueError,
        match=r"'\*\.attm\.\*' matches nothing; nearest: .*attn.*; available: .*'embed.weight'.* and \d+ more",
    ):
        sites(NET, **choice)  # type: ignore[arg-type]


def test_a_type_that_is_not_there_is_refused_with_the_types() -> None:
    with pytest.raises(ValueError, match=r"'type:Conv2d' matches nothing; nearest: .*'Conv1d'"):
        sites(NET, match="type:Conv2d")


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"match: 're:\(' is not a regular expression"):
        sites(NET, match="re:(")


def test_a_pattern_that_fits_only_biases_is_refused() -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        sites(NET, match="*.bias")


def test_own_views_replace_those_of_the_layer() -> None:
    found = site(
        NET,
        match="blocks.0.mlp.0.weight",
        views={"*.mlp.0.weight": View("(parts d) n -> parts d n", {"parts": 2}, ("gate", "up"))},
    )

    assert found.labels == ("blocks.0.mlp.0.weight.gate", "blocks.0.mlp.0.weight.up")
    assert_close(found.weight()[1], found.parameters[0].detach()[8:])


def test_own_views_make_matrices_of_vectors() -> None:
    found = site(nn.Linear(3, 6), match="bias", views={"bias": View("(m n) -> m n", {"m": 2})})

    assert found.weight().shape == (2, 3)


def test_the_last_view_that_fits_counts() -> None:
    found = site(nn.Linear(4, 6, bias=False), views={"*": "(qkv d) n -> qkv d n", "weight": "m n -> n m"})

    assert found.weight().shape == (4, 6)


def test_a_view_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit embed.weight of shape \(5, 8\)"):
        sites(NET, views={"embed.weight": "(qkv d) n -> qkv d n"})


def test_tied_weights_are_there_once_and_answer_to_each_name() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 8), "head": nn.Linear(8, 5, bias=False)})
    module["head"].weight = module["embed"].weight

    assert names(module) == ["embed.weight"]
    assert names(module, match="head.weight") == ["embed.weight"]


def test_frozen_weights_are_there() -> None:
    assert names(nn.Linear(3, 4).requires_grad_(False)) == ["weight"]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_weights_are_there_once_they_exist() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    before = names(module)
    module(torch.ones(2, 3))

    assert before == ["1.weight"]
    assert names(module) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("_orig_mod.net", "net"),
        ("net._orig_mod", "net"),
        ("module.net", "net"),
        ("_forward_module.module.net", "net"),
        ("net._fsdp_wrapped_module._checkpoint_wrapped_module.0", "net.0"),
        ("my_orig_mod.net", "my_orig_mod.net"),
        ("my layer", "my_layer"),
        ("größe", "gr__e"),
    ],
)
def test_names_lose_wrappers_and_odd_characters(raw: str, clean: str) -> None:
    module: nn.Module = nn.Linear(3, 4)
    for part in reversed(raw.split(".")):
        module, child = nn.Module(), module
        module.add_module(part, child)

    assert names(module) == [f"{clean}.weight"]
    assert names(module, match=f"{raw}.weight") == names(module, match=f"{clean}.weight") == [f"{clean}.weight"]


def test_compiled_modules_have_the_names_of_plain_ones() -> None:
    assert names(nn.Sequential(torch.compile(nn.Linear(3, 4), backend="eager"))) == ["0.weight"]


def test_names_that_clash_once_clean_get_a_number() -> None:
    module = nn.ModuleDict({"a b": nn.Linear(3, 4), "a_b": nn.Linear(3, 4), "a-b": nn.Linear(3, 4)})

    assert names(module) == ["a_b.weight", "a_b.weight_2", "a-b.weight"]


def test_labels_are_unique_although_a_part_is_called_like_a_layer() -> None:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.ones(2, 3, 4)))
    module.add_module("w ", nn.ParameterDict({"e0": torch.ones(3, 4)}))
    module.add_module("x", nn.ParameterDict({"w": torch.ones(3, 4)}))
    labels = list(chain.from_iterable(found.labels for found in sites(module)))

    assert len(labels) == len(set(labels)) == 4


def test_meta_modules_have_sites() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), parametrizations.weight_norm(nn.Linear(8, 4)))

    assert [tuple(found.weight().shape) for found in sites(module)] == [(2, 4, 18), (4, 8)]
    assert all(found.weight().device.type == "meta" for found in sites(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    assert site(nn.Linear(3, 4, dtype=dtype)).weight().dtype == dtype


def test_a_module_without_matrices_has_no_sites() -> None:
    assert sites(nn.LayerNorm(3)) == []


def test_looking_for_sites_touches_nothing() -> None:
    module = nn.Sequential(Block(), parametrizations.spectral_norm(nn.Linear(4, 4)))
    state: dict[str, Tensor] = {k: v.clone() for k, v in module.state_dict().items()}
    versions = [p._version for p in module.parameters()]
    random = torch.get_rng_state()
    sites(module, heads=True)

    assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert [p._version for p in module.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random)


def num_calls(module: nn.Module) -> int:
    """Function calls that `sites` makes, once its caches are full."""
    num_events = 0

    def count(*_: object) -> None:
        nonlocal num_events
        num_events += 1

    sites(module)
    sys.setprofile(count)
    try:
        sites(module)
    finally:
        sys.setprofile(None)
    return num_events


def test_work_grows_with_the_number_of_layers_not_with_its_square() -> None:
    few, many = (num_calls(nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))) for layers in (50, 400))

    assert many < 10 * few
