"""Where queries and keys are. Oracle: the scores that modules compute, before and after weights are zeroed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_lowrank.models.attention import Attention, Finder
from tests.architectures import CASES, INNER, PLACES, Case

# Sam2 has another softmax, whose result it never uses; Hiera's scores have an axis of windows.
ODD = ("Sam2MultiScaleAttention", "HieraMaskUnitAttention")
# Linear attention, attention in blocks, queries from experts.
WITHOUT = ("MiniMaxLightningAttention", "GraniteSpeechConformerAttention", "GraniteSpeechPlusConformerAttention")
UNTOLD = ("JetMoeAttention",)


@contextmanager
def softmax_heard() -> Iterator[list[Tensor]]:
    """Inputs of softmax."""
    seen: list[Tensor] = []
    own = {(place, "softmax"): place.softmax for place in (torch, Tensor, F)}

    def heard(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda scores, *args, **options: (
            seen.append(scores.detach().clone()) or function(scores, *args, **options)
        )

    for (place, name), function in own.items():
        setattr(place, name, heard(function))
    try:
        yield seen
    finally:
        for (place, name), function in own.items():
            setattr(place, name, function)


def changed_heads(run: Callable[[], Tensor], attention: Attention, part: str, head: int) -> list[int]:
    """Heads whose scores are others when the part of one head is zero."""
    projection = {"q": attention.queries, "k": attention.keys}[part]
    before, weight = run(), projection.parameter
    kept = weight.detach().clone()
    with torch.no_grad():
        projection(weight)[head].zero_()
        after = run()
        weight.copy_(kept)
    differing = (before - after).abs().reshape(-1, *before.shape[-3:]).amax((0, 2, 3)) > 1e-9
    return differing.nonzero().flatten().tolist()


def of_one(layer: nn.Module, **options: Any) -> Attention:
    (attention,) = Finder(nn.ModuleDict({"attn": layer}), **options).found()
    for projection in (attention.queries, attention.keys):
        if isinstance(getattr(projection.layer, "bias", None), Tensor):
            nn.init.zeros_(projection.layer.bias)
    return attention


@pytest.mark.parametrize("case", [c for c in CASES if c.cls not in (*ODD, *WITHOUT, *UNTOLD)], ids=lambda c: c.cls)
def test_queries_and_keys_of_fused_layers_are_those_that_the_class_compares(case: Case) -> None:
    layer = case.built()
    attention = of_one(layer)
    x = torch.randn(PLACES, INNER, dtype=case.dtype, generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        with softmax_heard() as seen, torch.no_grad():
            case.call(layer, x)
        return seen[0]

    for head in range(attention.heads):
        assert changed_heads(run, attention, "q", head) == changed_heads(run, attention, "k", head) == [head]


def test_queries_that_cannot_be_told_are_named_with_the_reason() -> None:
    for case in (case for case in CASES if case.cls in UNTOLD):
        finder = Finder(case.built())

        assert finder.found() == []


def llama(**sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, vocab_size=9, **sizes, attn_implementation="eager"
    )
    return LlamaModel(config)


def test_fewer_heads_of_keys_are_shared_by_heads_of_queries_that_follow_each_other() -> None:
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    first, second = Finder(model).found()

    def run() -> Tensor:
        with softmax_heard() as seen, torch.no_grad():
            model(input_ids=torch.arange(5)[None], use_cache=False)
        return seen[0].nan_to_num(neginf=0)

    assert (first.name, second.name) == ("layers.0.self_attn", "layers.1.self_attn")
    assert first.labels == [f"layers.0.self_attn.h{head}" for head in range(4)]
    assert [changed_heads(run, first, "q", head) for head in range(4)] == [[0], [1], [2], [3]]
    assert [changed_heads(run, first, "k", head) for head in range(2)] == [[0, 1], [2, 3]]


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3Model

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    return Phi3Model(Phi3Config(**sizes, **heads, attn_implementation="eager"))


def test_fewer_heads_of_keys_in_a_fused_layer() -> None:
    model = phi3()
    (attention,) = Finder(model).found()

    def run() -> Tensor:
        with softmax_heard() as seen, torch.no_grad():
            model(input_ids=torch.arange(5)[None], use_cache=False)
        return seen[0].nan_to_num(neginf=0)

    assert [changed_heads(run, attention, "q", head) for head in range(4)] == [[0], [1], [2], [3]]
    assert [changed_heads(run, attention, "k", head) for head in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}], ids=["fused", "separate"])
def test_attention_of_torch(options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    (attention,) = Finder(layer).found()
    x, context = torch.randn(1, 5, 8), torch.randn(1, 5, options.get("kdim", 8))

    def run() -> Tensor:
        with softmax_heard() as seen, torch.no_grad():
            layer(x, context, torch.randn(1, 5, options.get("vdim", 8)))
        return seen[0][None]

    assert attention.keys(attention.keys.parameter).shape == (2, 4, options.get("kdim", 8))
    for head in range(2):
        assert changed_heads(run, attention, "q", head) == changed_heads(run, attention, "k", head) == [head]


class Plain(nn.Module):
    """Queries and keys under names of the caller's choice."""

    def __init__(self, *names: str, heads: int = 2, rows: int = 8) -> None:
        super().__init__()
        self.num_heads = heads
        for name in names:
            self.add_module(name, nn.Linear(8, rows, bias=False))


@pytest.mark.parametrize(
    "names", [("q_proj", "k_proj"), ("query", "key"), ("to_q", "to_k"), ("wq", "wk"), ("q_lin", "k_lin"), ("q", "k")]
)
def test_names_of_layers_say_what_they_make(names: tuple[str, str]) -> None:
    (attention,) = Finder(Plain(*names, "v_proj", "unrelated")).found()

    assert (attention.queries.weight, attention.keys.weight) == tuple(f"{name}.weight" for name in names)


def test_layers_that_no_name_tells_are_told_by_the_user() -> None:
    net = nn.ModuleDict({"a": Plain("theta", "phi"), "b": Plain("both", rows=24)})
    layouts = {"a.theta.weight": "q heads d", "a.phi.*": "k heads d", "b.*": "heads kqv d"}
    first, second = Finder(net, layouts, {"b.both.weight": 4}).found()
    weight = second.keys.parameter

    assert (first.heads, second.heads, first.name, second.name) == (2, 4, "a", "b")
    torch.testing.assert_close(second.keys(weight)[1], weight[6:8])
    torch.testing.assert_close(second.queries(weight)[3], weight[20:22])


def test_computed_weights_are_known_by_the_name_that_the_layer_has() -> None:
    net = Plain("q_proj", "k_proj")
    parametrizations.weight_norm(net.q_proj)
    nn.utils.prune.random_unstructured(net.k_proj, "weight", 0.5)
    (attention,) = Finder(net).found()

    assert (attention.queries.weight, attention.keys.weight) == ("q_proj.weight", "k_proj.weight")
    assert attention.keys.parameter is net.k_proj.weight_orig


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(Plain("q_proj", "k_proj"), LoraConfig(target_modules=["q_proj"]))


UNTOLD_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an unknown order": (lambda: Plain("qkv", rows=24), "their order is unknown"),
    "no partner": (lambda: Plain("q_proj", "wk"), "it has 0 layers of keys next to it"),
    "no number of heads": (lambda: Plain("q_proj", "k_proj", heads=0), "the number of its heads is unknown"),
    "heads that do not divide": (lambda: Plain("q_proj", "k_proj", heads=3), "do not divide into 3 heads"),
    "an adapter": (adapted, "an adapter is added to it"),
}


@pytest.mark.parametrize("case", UNTOLD_MODELS)
def test_what_cannot_be_told_is_left_out_with_a_reason(case: str) -> None:
    make, reason = UNTOLD_MODELS[case]
    finder = Finder(make())

    assert finder.found() == []
    assert reason in "; ".join(finder.untold.values())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern that matches nothing": (
        {"layouts": {"*.nope": "qkv heads d"}},
        "layouts: .*matches nothing.*qkv.weight",
    ),
    "no order": ({"layouts": {"qkv.weight": "qkv d"}}, "layouts: 'qkv d' is not an order of axes"),
    "no keys": ({"layouts": {"qkv.weight": "q heads d"}}, "'qkv.weight' are unknown: it has 0 layers of keys"),
    "heads": (
        {"layouts": {"qkv.weight": "qkv heads d"}, "heads": {"qkv.weight": 5}},
        "'qkv.weight' are unknown: its",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_user_says_wrongly_is_refused(case: str) -> None:
    options, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        Finder(Plain("qkv", rows=24), **options).found()
