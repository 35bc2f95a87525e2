"""How the tensor of a parameter becomes matrices: an einops pattern per layer type, or the user's own.

Shape letters:  B any batch axes   M rows, N columns of a matrix
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod

import torch
from einops import EinopsError, rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.fused import PARTS, Fused

# Axes that know their length and the names of their entries.
SPELLED = (*PARTS, "ifgo", "rzn")

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


@dataclass(frozen=True)
class View:
    """An einops pattern whose right side ends in `rows columns`; the axes before these number the matrices.

    Attributes:
        pattern: For instance `(heads d) n -> heads d n`: one matrix per head.
        sizes: Lengths of axes that the shape does not determine, as a mapping or pairs. Axes called `qkv`, `qvk`, `kv`,
            `ifgo` and `rzn` have known lengths.
        parts: Names of the matrices, appended to the name of the site with a dot. By default: `q`, `k`, `v` for an axis
            called `qkv`, `h0`, `h1`, ... for one called `heads`.

    Examples:
        >>> View("(heads d) n -> heads d n", {"heads": 4})(torch.ones(32, 5)).shape
        torch.Size([4, 8, 5])
    """

    pattern: str
    sizes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        left, arrow, right = self.pattern.partition("->")
        if not arrow or len(_groups(right)) < 2:
            raise ValueError(f"view {self.pattern!r} must end in rows and columns, as in '(heads d) n -> heads d n'")
        named = {axis: len(axis) for axis in SPELLED if re.search(rf"\b{axis}\b", left)}
        # A tuple, so that views can be hashed and compared.
        object.__setattr__(self, "sizes", tuple({**named, **dict(self.sizes)}.items()))

    def __call__(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "*B M N"]:
        """The matrices in a tensor of the parameter's shape."""
        return rearrange(tensor, self.pattern, **dict(self.sizes))

    def fitted(self, name: str, shape: Sequence[int]) -> "View":
        """The same view with a name for each matrix that it makes of this shape.

        Raises:
            ValueError: The pattern does not fit the shape, or has another number of matrices than of `parts`.
        """
        return _fitted(self, name, tuple(shape))

    def shape(self, name: str, shape: Sequence[int]) -> torch.Size:
        """Shape of what it makes of a tensor of this shape."""
        try:
            return _shape(self, tuple(shape))
        except (EinopsError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"view {self.pattern!r} does not fit {name} of shape {tuple(shape)}: {reason}") from error


# Kept, since sites are looked for at every sample.
@cache
def _fitted(view: View, name: str, shape: tuple[int, ...]) -> View:
    """See `View.fitted`."""
    batch = view.shape(name, shape)[:-2]
    parts = view.parts or _names(_groups(view.pattern.partition("->")[2])[:-2], batch)
    if len(parts) != prod(batch) and (parts or batch):
        raise ValueError(
            f"view {view.pattern!r} makes {prod(batch)} matrices of {name}, but has {len(parts)} names: {list(parts)}"
        )
    return replace(view, parts=parts)


@cache
def _shape(view: View, shape: tuple[int, ...]) -> torch.Size:
    """Shape of what a view makes of a tensor of this shape."""
    return view(torch.empty(shape, device="meta")).shape


@cache
def _known(pattern: str, **sizes: int) -> View:
    """A view of the table."""
    return View(pattern, sizes)


def view_of(
    module: nn.Module, name: str, parameter: Tensor, *, heads: bool = False, fused: Fused | None = None
) -> View | None:
    """The view that a layer's type implies, None where the parameter is no matrix (biases, scales of norms, vectors).

    Args:
        module: The layer that owns it; for the `out_proj` of an `nn.MultiheadAttention`, the attention.
        name: Full name; its last part is read.
        heads: One matrix per head, where the layer knows how many it has.
        fused: How queries, keys and values lie in what the layer puts out, where it puts out these.
    """
    local = name.rpartition(".")[2]
    if is_lazy(parameter) or parameter.ndim < 2 or local == "bias" or isinstance(module, NORMS):
        return None
    for layer, rule in TABLE.items():
        if isinstance(module, layer):
            found = rule(module, local, parameter, heads)
            break
    else:
        found = _by_axes(module, parameter, fused, heads)
    return found and found.fitted(name, parameter.shape)


def _attention(module: nn.Module, local: str, parameter: Tensor, heads: bool) -> View | None:
    """Queries, keys and values apart; with heads also by head, in the output projection by its columns."""
    if local in ("bias_k", "bias_v"):
        return None
    sizes = {"heads": int(module.num_heads)} if heads else {}  # type: ignore[arg-type]
    if local == "in_proj_weight":
        return _known("(qkv heads d) n -> qkv heads d n", **sizes) if heads else _known("(qkv d) n -> qkv d n")
    if local == "weight" and heads:
        return _known("m (heads d) -> heads m d", **sizes)
    return _known("(heads d) n -> heads d n", **sizes) if heads else _known("m n -> m n")


def _convolution(module: nn.Module, local: str, parameter: Tensor, heads: bool) -> View | None:
    """Outputs against inputs times taps, per group; channels against taps where each channel is its own group."""
    assert isinstance(module, _ConvNd)
    transposed = isinstance(module, _ConvTransposeNd)
    taps = " ".join(f"k{i}" for i in range(parameter.ndim - 2))
    first, second = ("d_in", "d_out") if transposed else ("d_out", "d_in")
    if module.groups == 1 or (module.groups == module.in_channels and not transposed):
        return _known(f"{first} {second} {taps} -> d_out (d_in {taps})")
    if module.groups == module.in_channels:
        return _known(f"d_in d_out {taps} -> (d_in d_out) ({taps})")
    return _known(f"(groups {first}) {second} {taps} -> groups d_out (d_in {taps})", groups=module.groups)


def _gates(axis: str) -> "Rule":
    def rule(module: nn.Module, local: str, parameter: Tensor, heads: bool) -> View | None:
        """Gates apart; the projection of an LSTM (`weight_hr`) has none."""
        fused = local.startswith(("weight_ih", "weight_hh"))
        return _known(f"({axis} d) n -> {axis} d n") if fused else _known("m n -> m n")

    return rule


def _bilinear(module: nn.Module, local: str, parameter: Tensor, heads: bool) -> View | None:
    """One bilinear form per output."""
    return _known("outputs m n -> outputs m n")


def _by_axes(module: nn.Module, parameter: Tensor, fused: Fused | None, heads: bool) -> View | None:
    """Layers without a rule: fused attention as its class reads it, transformers' transposed `Conv1D` by its class,
    others by their axes.
    """
    transposed = is_transposed(module) and parameter.ndim == 2
    if fused is not None and parameter.ndim == 2:
        view = _fused(fused, parameter.shape[int(transposed)], transposed, heads)
        if view is not None:
            return view
    if transposed:
        return _known("n m -> m n")
    if parameter.ndim == 3:
        return _known("1 m n -> m n" if parameter.shape[0] == 1 else "experts m n -> experts m n")
    return _known("m n -> m n" if parameter.ndim == 2 else "m ... -> m (...)")


def _fused(fused: Fused, rows: int, transposed: bool, heads: bool) -> View | None:
    """Queries, keys and values apart, with heads also by head; None where they cannot be told."""
    told = fused.pattern(heads=heads) or fused.pattern(heads=False)
    if told is None or rows % (len(fused.parts) * prod(told[1].values())):
        return None
    (read, _, parts), sizes = told[0].partition(" -> "), told[1]
    names = [f"{part}.h{i}" for part in fused.parts for i in range(fused.num_heads)] if heads and sizes else ()
    return View(f"n {read} -> {parts} n" if transposed else f"{read} n -> {parts} n", sizes, tuple(names))


Rule = Callable[[nn.Module, str, Tensor, bool], View | None]

TABLE: dict[type[nn.Module], Rule] = {
    nn.MultiheadAttention: _attention,
    _ConvNd: _convolution,
    nn.Bilinear: _bilinear,
    nn.LSTM: _gates("ifgo"),
    nn.LSTMCell: _gates("ifgo"),
    nn.GRU: _gates("rzn"),
    nn.GRUCell: _gates("rzn"),
}


def _groups(side: str) -> list[str]:
    """Axes of one side of a pattern, a parenthesis as one."""
    return re.findall(r"\([^)]*\)|[^\s()]+", side)


def _names(axes: Sequence[str], batch: Sequence[int]) -> tuple[str, ...]:
    """One name per batch entry: its place along each axis."""
    if not batch:
        return ()
    # An ellipsis is one word and any number of axes.
    known = axes if len(axes) == len(batch) else ["m"] * len(batch)
    return tuple(".".join(names) for names in product(*map(_along, known, batch)))


def _along(axis: str, length: int) -> Sequence[str]:
    """Names along one axis: its letters where it is spelled out, else its first letter and a number."""
    if axis in SPELLED and length == len(axis):
        return axis
    initial = (re.findall(r"[A-Za-z]", axis) or ["m"])[0]
    return [f"{initial}{i}" for i in range(length)]
