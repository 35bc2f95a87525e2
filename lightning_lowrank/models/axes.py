"""Which axis of what a layer puts out is its features: one answer for all who listen."""

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _LPPoolNd,
    _MaxPoolNd,
    _MaxUnpoolNd,
)

LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
SECOND = (_BatchNorm, nn.GroupNorm, nn.FeatureAlphaDropout)
# Features stand before the places, of which there are as many axes as the name of the class says: `MaxPool2d`.
BEFORE_PLACES = (
    *(_ConvNd, _InstanceNorm, _DropoutNd),
    *(_MaxPoolNd, _AvgPoolNd, _LPPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd, _MaxUnpoolNd),
)
PLACES = re.compile(r"([123])d$")

# Attributes that say how many features a layer puts out.
WIDTHS = (
    "out_features",
    "out_channels",
    "embedding_dim",
    "embed_dim",
    "hidden_size",
    "num_features",
    "num_channels",
    "nf",
)


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer whose weight has its inputs as rows."""
    return not isinstance(layer, _ConvNd) and any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


def width(layer: nn.Module) -> int:
    """How many features it puts out, 0 where it does not say; a recurrent layer in both directions says half of it."""
    sizes = [getattr(layer, name, 0) for name in WIDTHS] + list(getattr(layer, "normalized_shape", ())[-1:])
    return max((size for size in sizes if type(size) is int), default=0)


def feature_axis(layer: nn.Module, shape: Sequence[int], around: nn.Module | None = None) -> int:
    """The axis of an output that contains the features of the layer; all other axes are positions and examples.

    The type of a PyTorch layer determines it. For a block, an activation or a layer of another library, the layers
    inside of it (or else next to it) decide. It is the axis that is as long as one of them says, in the place that this
    one uses. If there is no such axis, it is the last of up to three axes.

    Args:
        shape: Shape of the output, with at least two axes.
        around: The module that the layer is part of.

    Raises:
        ValueError: Two axes are possible, or none of four or more.

    Examples:
        >>> feature_axis(nn.Linear(3, 5), (2, 7, 7, 5)), feature_axis(nn.Conv2d(3, 5, 1), (2, 5, 7, 7))
        (-1, -3)
    """
    said = _said(layer)
    if said is not None or len(shape) == 2:
        return -1 if said is None else said
    found = set(_seen(layer, shape)) or set(_seen(around, shape))
    if len(found) == 1 or (not found and len(shape) == 3):
        return max(found, default=-1)
    raise ValueError(
        f"cannot tell which axis has the features in an output of shape {tuple(shape)} of a {type(layer).__name__}; "
        "match linear layers, convolutions or norms inside of it or next to it"
    )


def _said(layer: nn.Module) -> int | None:
    """The axis that its type says."""
    if isinstance(layer, LAST) or is_transposed(layer):
        return -1
    if isinstance(layer, SECOND):
        return 1
    if isinstance(layer, BEFORE_PLACES):
        places = (PLACES.search(cls.__name__) for cls in type(layer).__mro__)
        return next((-1 - int(found[1]) for found in places if found), None)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1:
        plain = type(layer).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return {"channels_first": 1, "channels_last": -1}.get(getattr(layer, "data_format", ""), -1 if plain else None)
    return None


def _seen(block: nn.Module | None, shape: Sequence[int]) -> Iterator[int]:
    """Axes where layers of a block have their features and that are as long as they say, counted from the last."""
    for layer in block.modules() if block is not None else ():
        axis = _said(layer)
        if axis is not None and -len(shape) <= axis < len(shape) and shape[axis] == width(layer):
            yield axis if axis < 0 else axis - len(shape)
