"""Statistics of scores. Oracle: attention written out in numpy, one query after the other."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_lowrank.monitors.attention.calls import Calls
from lightning_lowrank.monitors.attention.scores import Draw, sums_of

B, H, L, S, D = 3, 4, 5, 6, 8
EVERY_ROW = 10**6


class Calling(nn.Module):
    """Calls what it is given."""

    def forward(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)


def heard(function: Callable[..., Any], *args: Any, num_rows: int = EVERY_ROW, **options: Any) -> dict[str, Any]:
    """Sums over rows, by head."""
    calls, part = Calls(num_rows), Calling()
    calls.plan(part, {"a": part}, {"a": H})
    calls.attach(nullcontext, seed=0)
    plain = function(*args, **options)
    watched = part(function, *args, **options)
    calls.detach()
    if isinstance(plain, Tensor):
        torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    found, error = calls.take()
    if error is not None:
        raise error
    return found and dict(zip(("rows", "entropy", "even", "sink", "even sink", "top"), found["a"].numpy(), strict=True))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


Q, K, V = drawn(B, H, L, D), drawn(B, H, S, D) * 1.5, drawn(B, H, S, 7)


def expected(logits: np.ndarray) -> dict[str, Any]:
    """From scores `[B, H, L, S]`, -inf where a key is closed."""
    names = ("rows", "entropy", "even", "sink", "even sink", "top")
    found = {name: np.full(logits.shape[1], -np.inf if name == "top" else 0.0) for name in names}
    for b, h, row in np.ndindex(logits.shape[:3]):
        scores = logits[b, h, row]
        there = scores[np.isfinite(scores)]
        if not len(there):
            continue
        shares = np.exp(there - there.max()) / np.exp(there - there.max()).sum()
        found["rows"][h] += 1
        found["entropy"][h] -= (shares * np.log(shares)).sum()
        found["even"][h] += np.log(len(there))
        found["sink"][h] += shares[0] if np.isfinite(scores[0]) else 0.0
        found["even sink"][h] += np.isfinite(scores[0]) / len(there)
        found["top"][h] = max(found["top"][h], there.max())
    return found


def logits(
    q: Tensor = Q, k: Tensor = K, scale: float = D**-0.5, mask: np.ndarray | None = None, causal: bool = False
) -> np.ndarray:
    q, k = q.double().numpy(), np.repeat(k.double().numpy(), q.shape[1] // k.shape[1], 1)
    scores = np.einsum("bhld,bhsd->bhls", q, k) * scale
    if causal:
        scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool), scores, -np.inf)
    return scores if mask is None else scores + mask


OPEN = drawn(B, 1, L, S) > -0.5
OPEN[0, 0, 0] = False  # a row without a key
BIAS = drawn(1, H, L, S)
CLOSED = torch.where(OPEN, 0.0, torch.finfo(torch.float32).min)

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], np.ndarray]] = {
    "plain": ((Q, K, V), {}, logits()),
    "by name": ((), {"query": Q, "key": K, "value": V}, logits()),
    "causal": ((Q, K, V), {"is_causal": True}, logits(causal=True)),
    "causal, all by place": ((Q, K, V, None, 0.0, True), {}, logits(causal=True)),
    "scale": ((Q, K, V), {"scale": 2.0}, logits(scale=2.0)),
    "a mask of what is open": ((Q, K, V), {"attn_mask": OPEN}, logits(mask=np.where(OPEN, 0, -np.inf))),
    "a mask that is added": ((Q, K, V, BIAS), {}, logits(mask=BIAS.double().numpy())),
    "a mask of least numbers": ((Q, K, V, CLOSED), {}, logits(mask=np.where(OPEN, 0, -np.inf))),
    "a mask of two axes": ((Q, K, V, OPEN[1, 0]), {}, logits(mask=np.where(OPEN[1, 0], 0, -np.inf))),
    "fewer heads of keys": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}, logits(k=K[:, :2])),
    "queries of all sequences": ((Q[:1], K, V), {}, logits(q=Q[:1].expand(B, -1, -1, -1))),
    "heads behind one another": ((Q.flatten(0, 1), K.flatten(0, 1), V.flatten(0, 1)), {}, logits()),
}


@pytest.mark.parametrize("call", CALLS)
def test_numbers_are_those_of_attention_written_out(call: str) -> None:
    args, options, scores = CALLS[call]
    found = heard(F.scaled_dot_product_attention, *args, **options)

    for name, value in expected(scores).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_dropout_leaves_the_shares_as_they_are() -> None:
    found = heard(lambda: F.scaled_dot_product_attention(Q, K, V, dropout_p=0.5).shape)

    np.testing.assert_allclose(found["entropy"], expected(logits())["entropy"], rtol=1e-5)


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda x: torch.softmax(x, -1),
    "a method": lambda x: x.softmax(dim=3),
    "functional": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "a layer": lambda x: nn.Softmax(dim=-1)(x),
}


@pytest.mark.parametrize("how", SOFTMAX)
def test_softmax_over_scores_is_heard_once(how: str) -> None:
    scores = torch.tensor(logits(causal=True), dtype=torch.float32)
    found = heard(SOFTMAX[how], scores)

    for name, value in expected(logits(causal=True)).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("shape", "axis"), [((B, H, L, S), 1), ((B, L, S), -1), ((B, H + 1, L, S), -1), ((B, H), -1)])
def test_softmax_over_anything_else_is_not(shape: tuple[int, ...], axis: int) -> None:
    assert heard(torch.softmax, drawn(*shape), axis) == {}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_torch_is_heard(need_weights: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(H * D, H, batch_first=batch_first, bias=False)
    x, calls = drawn(B, L, H * D), Calls(EVERY_ROW)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = x if batch_first else x.transpose(0, 1)
    calls.plan(layer, {"a": layer}, {"a": H})
    alone = layer(inputs, inputs, inputs, key_padding_mask=padding, need_weights=need_weights)[0]
    calls.attach(nullcontext, seed=0)
    watched = layer(inputs, inputs, inputs, key_padding_mask=padding, need_weights=need_weights)[0]
    calls.detach()
    sums = calls.take()[0]["a"].numpy()
    q, k = ((x @ w.T).unflatten(-1, (H, D)).transpose(1, 2).detach() for w in layer.in_proj_weight.chunk(3)[:2])
    truth = expected(logits(q, k, mask=np.where(padding, -np.inf, 0)[:, None, None]))

    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    np.testing.assert_allclose(sums, list(truth.values()), rtol=1e-4, atol=1e-5)
    assert (
        F.softmax.__name__ == "softmax" and F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    )


def test_a_drawn_sample_has_as_many_rows_as_asked_and_is_near_the_whole() -> None:
    q, k = drawn(16, H, 40, D), drawn(16, H, 40, D)
    sample = heard(F.scaled_dot_product_attention, q, k, k, num_rows=64)
    every = heard(F.scaled_dot_product_attention, q, k, k)

    assert set(sample["rows"]) == {64.0}
    np.testing.assert_allclose(sample["entropy"] / 64, every["entropy"] / 640, rtol=0.05)
    assert (sample["top"] <= every["top"]).all()


@pytest.mark.parametrize(("batch", "queries"), [(1, 1000), (1000, 1), (8, 8), (7, 50), (500, 500)])
def test_rows_are_drawn_from_all_of_them(batch: int, queries: int) -> None:
    draw = Draw(64, torch.Generator().manual_seed(0))
    sequences, rows = draw(batch, queries, torch.device("cpu"))

    assert 56 <= len(sequences) * len(rows) <= 64
    assert len(set(sequences.tolist())) == len(sequences) and len(set(rows.tolist())) == len(rows)


def test_what_is_not_finite_makes_its_head_blank() -> None:
    scores = drawn(B, H, L, S)
    scores[0, 1, 2, 3] = torch.nan
    sums, tops = sums_of(scores)

    assert sums.isnan().any(0).tolist() == tops.isnan().tolist() == [False, True, False, False]


def test_a_call_that_has_no_rows_is_an_error_that_is_kept() -> None:
    with pytest.raises(ValueError, match="has 3 heads, its weights have 4"):
        heard(F.scaled_dot_product_attention, Q[:, :3], K[:, :3], V[:, :3])
    with pytest.raises(ValueError, match="has queries of shape"):
        heard(F.scaled_dot_product_attention, Q[None], K[None], V[None])


def test_no_mode_is_left_when_a_forward_pass_fails() -> None:
    calls, part = Calls(4), Calling()

    def fail(kind: type[BaseException]) -> None:
        raise kind

    calls.plan(part, {"a": part}, {"a": H})
    calls.attach(nullcontext, seed=0)
    with pytest.raises(ValueError):
        part(fail, ValueError)
    assert _get_current_function_mode_stack() == []
    with pytest.raises(KeyboardInterrupt):
        part(fail, KeyboardInterrupt)
    calls.detach()

    assert _get_current_function_mode_stack() == []
    assert not part._forward_hooks and not part._forward_pre_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_runs_again_in_the_backward_pass_counts_once(reentrant: bool) -> None:
    calls, part = Calls(EVERY_ROW), Calling()
    q = Q.clone().requires_grad_()
    calls.plan(part, {"a": part}, {"a": H})
    calls.attach(nullcontext, seed=0)
    checkpoint(lambda x: part(F.scaled_dot_product_attention, x, K, V), q, use_reentrant=reentrant).sum().backward()
    calls.detach()

    assert calls.take()[0]["a"][0].tolist() == [B * L] * H


def test_a_compiled_function_is_not_heard_and_its_result_is_the_same() -> None:
    own = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin(), backend="aot_eager")

    assert heard(own, Q, K, V) == {}
