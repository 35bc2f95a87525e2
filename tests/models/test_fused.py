"""Queries, keys and values of every attention of transformers that has them in one layer, by what the layer does."""

import re
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_lowrank.models.fused import KNOWN
from lightning_lowrank.models.sites import Site, sites
from tests.architectures import CASES, CONFIG, INNER, PAGE, PLACES, Case, config, found, layers, page

ATTENTIONS = {f"{case.package}.{case.cls}": case for case in CASES}
every = pytest.mark.parametrize("name", ATTENTIONS)


class Run:
    """An attention on random rows, as a function of the weight of its fused layer."""

    def __init__(self, case: Case) -> None:
        self.case, self.layer = case, case.built()
        self.rounding = 1e-8 if case.dtype == torch.double else 1e-4
        self.rows = torch.randn(PLACES, INNER, dtype=case.dtype, generator=torch.Generator().manual_seed(1))
        self.weight = self.layer.get_parameter(f"{case.attribute}.weight")

    def at(self, change: Tensor | float = 0.0) -> Tensor:
        """What it puts out with a change of the weight."""
        before = self.weight.detach().clone()
        with torch.no_grad():
            self.weight += change
            output = found(self.case.call(self.layer, self.rows)).clone()
            self.weight.copy_(before)
        return output

    def gradient_at_the_last_place(self) -> Tensor:
        found(self.case.call(self.layer, self.rows))[-1].sin().sum().backward()
        assert self.weight.grad is not None
        return self.weight.grad

    def parts(self, *, heads: bool = False) -> tuple[Site, dict[str, Tensor]]:
        """The site, and by the ends of its labels which entries of the weight they are of."""
        (site,) = sites(self.layer, match=f"{self.case.attribute}.weight", heads=heads)
        numbers = site.view(torch.arange(self.weight.numel()).view(self.weight.shape)).flatten(0, -3)
        of = {}
        for label, entries in zip(site.labels, numbers, strict=True):
            mask = torch.zeros(self.weight.numel(), dtype=self.case.dtype)
            mask[entries.flatten()] = 1
            of[label.removeprefix(f"{site.name}.")] = mask.view(self.weight.shape)
        return site, of


def is_linear(run: Run, mask: Tensor) -> bool:
    change = mask * torch.randn(mask.shape, dtype=mask.dtype, generator=torch.Generator().manual_seed(2))
    first, second, third = run.at(), run.at(change), run.at(2 * change)
    return bool((third - 2 * second + first).norm() < run.rounding * (second - first).norm())


@every
def test_what_is_called_queries_are_of_one_place_and_what_is_called_values_is_mixed_linearly(name: str) -> None:
    """The gradient of one place's output has rank one in the queries and nowhere else: others see other places too."""
    run = Run(ATTENTIONS[name])
    site, masks = run.parts()
    parts = dict(zip(masks, site.view(run.gradient_at_the_last_place()), strict=True))
    values = {part: torch.linalg.svdvals(matrix) for part, matrix in parts.items()}
    of_one_place = {part for part, value in values.items() if value[1] < run.rounding * value[0]}

    assert set(masks) == ({"q", "k", "v"} if len(masks) == 3 else {"k", "v"})
    assert of_one_place == masks.keys() & {"q"} or not run.case.mixes_places
    assert {part for part, mask in masks.items() if is_linear(run, mask)} == {"v"} or not run.case.values_are_linear


@every
def test_heads_do_not_see_each_other(name: str) -> None:
    """Keys of one head and values of another have no effect together."""
    run = Run(ATTENTIONS[name])
    _, masks = run.parts(heads=True)
    if not run.case.values_are_linear or not run.case.mixes_places:
        pytest.skip("heads meet in a norm" if run.case.mixes_places else "its groups are no heads")
    draws = torch.randn(run.weight.shape, dtype=run.case.dtype, generator=torch.Generator().manual_seed(3))
    together = {
        (i, j): run.at((masks[f"k.h{i}"] + masks[f"v.h{j}"]) * draws)
        - run.at(masks[f"k.h{i}"] * draws)
        - run.at(masks[f"v.h{j}"] * draws)
        + run.at()
        for i in (0, 1)
        for j in (0, 1, 3)
    }
    size = run.at().norm()

    assert {pair for pair, change in together.items() if change.norm() > run.rounding * size} == {(0, 0), (1, 1)}


def test_every_class_that_is_known_was_run() -> None:
    known = {(cls, attribute) for package, cls, attribute in KNOWN if package == "transformers"}

    assert known == {(case.cls, case.attribute) for case in CASES}
    assert known <= {(cls, attribute) for _, cls, attribute in layers()}


def test_the_page_of_architectures_is_that_of_the_installed_version() -> None:
    if f"transformers {transformers.__version__} " not in PAGE.read_text():
        pytest.skip(f"it is of another version than {transformers.__version__}")

    assert PAGE.read_text() == page(), "run python -m tests.architectures"


GROUPED: dict[str, Callable[[], nn.Module]] = {
    # 3 n rows, of which 2 n are queries.
    "Phi-3": lambda: modeling("phi3").Phi3Attention(
        config(num_attention_heads=4, num_key_value_heads=1, head_dim=8), layer_idx=0
    ),
    "GPTBigCode": lambda: modeling("gpt_bigcode").GPTBigCodeAttention(config(multi_query=True), layer_idx=0),
    "Falcon": lambda: modeling("falcon").FalconAttention(config(multi_query=True), layer_idx=0),
    "Falcon, new": lambda: modeling("falcon").FalconAttention(
        config(new_decoder_architecture=True, num_kv_heads=2), layer_idx=0
    ),
    "DBRX": lambda: modeling("dbrx").DbrxAttention(
        config(attn_config=SimpleNamespace(**vars(CONFIG["attn_config"]) | {"kv_n_heads": 2})), layer_idx=0
    ),
    "EXAONE": lambda: modeling("exaone4_5").Exaone4_5_VisionAttention(config(num_key_value_heads=2)),
}


def modeling(package: str) -> Any:
    return import_module(f"transformers.models.{package}.modeling_{package}")


@pytest.mark.parametrize("name", GROUPED)
def test_queries_with_more_heads_than_keys_are_left_whole(name: str) -> None:
    layer = GROUPED[name]()
    whole = next(site for site in sites(layer, heads=True) if re.search("qkv|c_attn|query_key_value", site.name))

    assert whole.labels == (whole.name,)


def test_three_gates_of_a_convolution_are_no_queries_keys_and_values() -> None:
    layer = modeling("lfm2").Lfm2ShortConv(config(conv_L_cache=3, conv_bias=False), 0)
    (whole,) = sites(layer, match="in_proj.weight")

    assert whole.shape == (3 * INNER, INNER)


class Own(nn.Module):
    """Somebody's attention, who may order what comes out as they please."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(4, 12)


def test_a_class_that_is_not_known_is_left_whole_unless_a_view_says_it() -> None:
    assert sites(Own(), match="qkv.weight")[0].labels == ("qkv.weight",)
    (site,) = sites(Own(), match="qkv.weight", views={"*qkv.weight": "(qkv d) n -> qkv d n"})
    assert site.labels == ("qkv.weight.q", "qkv.weight.k", "qkv.weight.v")


def test_wrappers_and_subclasses_are_read_as_what_they_wrap() -> None:
    class Mine(modeling("gpt2").GPT2Attention):  # type: ignore[misc]
        pass

    layer = nn.ModuleDict({"attn": Mine(config(), layer_idx=0)})
    expected = [f"attn.c_attn.weight.{part}" for part in "qkv"]

    assert list(sites(layer, match="*c_attn.weight")[0].labels) == expected
    layer["attn"].c_attn = torch.compile(layer["attn"].c_attn, backend="eager")
    assert list(sites(layer, match="*c_attn.weight")[0].labels) == expected


def test_keys_and_values_of_another_sequence_are_told_apart() -> None:
    layer = modeling("gpt2").GPT2Attention(config(), is_cross_attention=True, layer_idx=0)
    (site,) = sites(layer, match="c_attn.weight")

    assert site.labels == ("c_attn.weight.k", "c_attn.weight.v")
    assert torch.equal(site.weight()[1], layer.c_attn.weight.detach()[:, INNER:].T)
