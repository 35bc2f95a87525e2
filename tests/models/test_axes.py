"""Which axis has the features: layers of which it is known by construction, at every number of axes that they take."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank.models.axes import feature_axis

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.pytorch_utils import Conv1D

# No other axis is as long.
FEATURES = 11

PLACES = [(5,), (5, 3), (5, 3, 2), (5, 3, 2, 7)]
FIRST = [(FEATURES, *places) for places in PLACES]


def last(layer: nn.Module, features: int = 13) -> list[tuple[nn.Module, Tensor]]:
    return [(layer, torch.randn(*places, features)) for places in PLACES]


CASES: dict[str, Callable[[], list[tuple[nn.Module, Tensor]]]] = {
    "linear": lambda: last(nn.Linear(13, FEATURES)),
    "Conv1D of transformers": lambda: last(Conv1D(FEATURES, 13)),
    "embedding": lambda: [(nn.Embedding(4, FEATURES), torch.ones(places, dtype=torch.long)) for places in PLACES],
    "bag": lambda: [(nn.EmbeddingBag(4, FEATURES), torch.ones(5, 3, dtype=torch.long))],
    "layer norm": lambda: last(nn.LayerNorm(FEATURES), FEATURES),
    "norm of squares": lambda: last(nn.RMSNorm(FEATURES), FEATURES),
    "attention": lambda: [
        (Itself(nn.MultiheadAttention(FEATURES, 1)), torch.randn(*batch, FEATURES)) for batch in ((5,), (5, 3))
    ],
    "recurrence": lambda: [(nn.LSTM(13, FEATURES), torch.randn(shape)) for shape in [(5, 13), (5, 3, 13)]],
    "cell": lambda: [(nn.GRUCell(13, FEATURES), torch.randn(5, 13))],
    "convolutions": lambda: [
        (make(13, FEATURES, 1), torch.randn(*batch, 13, *(5, 3, 2)[: i + 1]))
        for i, make in enumerate([nn.Conv1d, nn.Conv2d, nn.Conv3d])
        for batch in ((), (4,))
    ],
    "transposed convolutions": lambda: [
        (make(13, FEATURES, 1), torch.randn(4, 13, *(5, 3, 2)[: i + 1]))
        for i, make in enumerate([nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
    ],
    "pools": lambda: [
        (layer, torch.randn(*batch, FEATURES, 6, 4))
        for layer in (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
        for batch in ((), (4,))
    ],
    "drops of channels": lambda: [(nn.Dropout2d(), torch.randn(5, FEATURES, 6, 4))],
    "norms of batches": lambda: [
        (nn.BatchNorm1d(FEATURES), torch.randn(5, FEATURES)),
        (nn.BatchNorm1d(FEATURES), torch.randn(5, FEATURES, 3)),
        (nn.BatchNorm2d(FEATURES), torch.randn(5, FEATURES, 3, 2)),
        (nn.BatchNorm3d(FEATURES), torch.randn(5, FEATURES, 3, 2, 7)),
    ],
    "norms of groups and instances": lambda: [
        *((nn.GroupNorm(1, FEATURES), torch.randn(5, *shape)) for shape in FIRST),
        *((nn.InstanceNorm2d(FEATURES), torch.randn(*batch, FEATURES, 3, 2)) for batch in ((), (4,))),
    ],
    "blocks of convolutions": lambda: [
        (nn.Sequential(nn.Conv2d(13, FEATURES, 1), nn.ReLU()), torch.randn(5, 13, 3, 2)),
        (nn.Sequential(nn.Conv1d(13, FEATURES, 1), nn.ReLU()), torch.randn(5, 13, 3)),
    ],
    "blocks of linear layers": lambda: last(nn.Sequential(nn.Linear(13, FEATURES), nn.GELU())),
    "a norm over channels first": lambda: [
        (ConvNextLayerNorm(FEATURES, data_format="channels_first"), torch.randn(5, FEATURES, 3, 2))
    ],
}


class Itself(nn.Module):
    """Attention of a tensor to itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_features_are_where_the_layer_puts_them(case: str) -> None:
    for layer, inputs in CASES[case]():
        output = layer(inputs)
        output = output[0] if isinstance(output, tuple) else output

        assert output.shape[feature_axis(layer, output.shape)] == FEATURES, (layer, output.shape)


def test_an_activation_has_the_features_of_the_layers_beside_it() -> None:
    images = nn.Sequential(nn.Conv2d(3, FEATURES, 1), nn.ReLU())
    channels_last = nn.Sequential(nn.Linear(3, FEATURES), nn.GELU())

    assert feature_axis(images[1], (5, FEATURES, 4, 3), images) == -3
    assert feature_axis(channels_last[1], (5, 4, 3, FEATURES), channels_last) == -1


@pytest.mark.parametrize("shape", [(5, FEATURES, 4, FEATURES), (5, 4, 3, 2)])
def test_what_may_be_either_axis_or_none_is_refused(shape: tuple[int, ...]) -> None:
    block = nn.Sequential(nn.Conv2d(FEATURES, FEATURES, 1), nn.Linear(FEATURES, FEATURES))

    with pytest.raises(
        ValueError,
        match=r"cannot tell which axis has the features in an output of shape .* of a Sequential; match linear layers",
    ):
        feature_axis(block, shape)


def test_three_axes_of_a_layer_without_a_say_have_their_features_last() -> None:
    assert feature_axis(nn.Identity(), (5, 4, 3)) == -1
