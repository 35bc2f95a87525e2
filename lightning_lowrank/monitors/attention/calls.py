"""Hearing what attentions call in the training's own forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_lowrank.maths.spectra.spectrum import full_precision, working_dtype
from lightning_lowrank.models.taps import Tap, Timed, recomputes, refuse_compiled
from lightning_lowrank.monitors.attention.scores import Draw, of_product, of_softmax, sums_of

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
HEARD = (F.scaled_dot_product_attention, *SOFTMAX)
FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Ear(TorchFunctionMode):
    """Hears functions of torch that are called while it is entered.

    Args:
        hear: Called with the function and its arguments.
    """

    def __init__(self, hear: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__()
        self._hear = hear

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the graph shall be the one that it would have been
            return func(*args, **kwargs)
        if func == F.multi_head_attention_forward:
            with self._within():
                return func(*args, **kwargs)
        if func in HEARD:
            self._hear(func, args, kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """Hears a function of torch that no mode is active in, where it would call itself without end."""
        own = {func.__name__: func for func in (F.scaled_dot_product_attention, F.softmax)}
        vars(F).update({name: partial(self._told, func) for name, func in own.items()})
        try:
            yield
        finally:
            vars(F).update(own)

    def _told(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self._hear(func, args, kwargs)
        return func(*args, **kwargs)


class Calls:
    """Statistics of the scores of some attentions, added up over the calls of a due step.

    A function mode is entered with each of the modules and left with it. It sees what eager code calls in between, and
    changes none of it. Of modules inside one another the innermost counts.

    Args:
        num_rows: Rows of scores, for each call and head, that are looked at.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._modules: Mapping[str, nn.Module] = {}
        self._heads: Mapping[str, int] = {}
        self._fast: Mapping[str, list[nn.Module]] = {}
        self._timed: Timed = nullcontext
        self._ear = Ear(self._heard)
        self._hooks: list[RemovableHandle] = []
        self._inside: list[str] = []
        self._sums: dict[str, Tensor] = {}
        self._tops: dict[str, Tensor] = {}
        self._error: Exception | None = None

    def plan(self, root: nn.Module, modules: Mapping[str, nn.Module], heads: Mapping[str, int]) -> None:
        """Choose the modules.

        Args:
            root: The module that they are in.
            modules: By the name under which they are heard.
            heads: Of queries, likewise.

        Raises:
            ValueError: One is inside a compiled module.
        """
        try:
            refuse_compiled(root, modules, "attention")
        except ValueError as error:
            raise ValueError(f"{error}; scores=False ignores calls of attention") from None
        self._modules, self._heads = modules, heads
        fast = [part for part in root.modules() if isinstance(part, FAST)]
        self._fast = {name: [one for one in fast if _share(one, part)] for name, part in modules.items()}

    def attach(self, timed: Timed, seed: int) -> None:
        """Listen to this batch."""
        self._timed = timed
        self._draw = Draw(self._num_rows, torch.Generator("cpu").manual_seed(seed))
        if not self._hooks:
            self._hooks = [
                hook for name, part in self._modules.items() if self._slow(name) for hook in self._on(name, part)
            ]

    def detach(self) -> None:
        """Stop listening; leave no hook and no mode behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        while self._inside:  # an exception that hooks do not see has ended a forward pass
            self._leave(nn.Identity(), (), None)

    def take(self) -> tuple[dict[str, Tensor], Exception | None]:
        """By module the sums over rows `[5, H]` with the largest score of each head behind them `[6, H]`; what went
        wrong.
        """
        found = {name: torch.cat([sums, self._tops[name][None]]) for name, sums in self._sums.items()}
        error = self._error
        self._sums, self._tops, self._error = {}, {}, None
        return found, error

    def __getstate__(self) -> dict[str, Any]:
        """A copy listens to nothing until it is planned."""
        return vars(Calls(self._num_rows)) | {"_ear": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_ear": Ear(self._heard)})

    def _slow(self, name: str) -> bool:
        """Whether hooks and a mode change no kernel: in eval mode torch's own layers have a fast path for when nobody
        listens.
        """
        return all(part.training for part in self._fast[name])

    def _on(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        return [
            part.register_forward_pre_hook(Tap(partial(self._enter, name))),
            part.register_forward_hook(Tap(self._leave), always_call=True),
        ]

    def _enter(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if not recomputes():
            if not self._inside:
                self._ear.__enter__()  # type: ignore[no-untyped-call]
            self._inside.append(name)

    def _leave(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._inside and not recomputes():
            self._inside.pop()
            if not self._inside:
                self._ear.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One call; with no mode of ours active."""
        with self._timed():
            try:
                self._add(self._inside[-1], func, args, kwargs)
            except Exception as error:  # this runs inside the user's forward
                self._error = self._error or error.with_traceback(None)

    def _add(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heads, device = self._heads[name], next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
        with full_precision(device):
            if func in SOFTMAX:
                scores = self._of_softmax(self._modules[name], heads, *args, **kwargs)
            else:
                scores = self._of_product(heads, *args, **kwargs)
            if scores is None:
                return
            if scores.shape[1] != heads:
                raise ValueError(
                    f"a call of attention in {name!r} has {scores.shape[1]} heads, its weights have {heads}"
                )
            sums, tops = (found.to(working_dtype(device)) for found in sums_of(scores))
            before = self._tops.get(name)
            self._sums[name] = sums if before is None else self._sums[name] + sums
            self._tops[name] = tops if before is None else torch.maximum(before, tops)

    def _of_product(
        self,
        heads: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attn_mask is not None and query.ndim == attn_mask.ndim == 3 and len(query) == len(attn_mask):
            attn_mask = _by_head(attn_mask, heads)
        return of_product(self._draw, _by_head(query, heads), _by_head(key, heads), value, attn_mask, *args, **kwargs)

    def _of_softmax(
        self, part: nn.Module, heads: int, input: Tensor, dim: int | None = None, *_: Any, **__: Any
    ) -> Tensor | None:
        """None where it is not over the keys of each head."""
        if dim not in (-1, input.ndim - 1):
            return None
        if input.ndim == 3 and isinstance(part, nn.MultiheadAttention):  # elsewhere it may be anything
            input = _by_head(input, heads)
        return of_softmax(self._draw, input) if input.ndim == 4 and input.shape[1] == heads else None


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """With an axis of heads, where these lie behind one another along the axis of sequences."""
    if tensor.ndim != 3:
        return tensor
    return tensor.unflatten(0, (-1, heads)) if len(tensor) % heads == 0 else tensor[:, None]


def _share(one: nn.Module, other: nn.Module) -> bool:
    """Whether one of them is inside the other, or both are the same."""
    return any(part is one for part in other.modules()) or any(part is other for part in one.modules())
