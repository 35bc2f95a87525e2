"""Linear layers with a weight of their own: what multiplies its input by one matrix.

Shape letters:  M outputs, N inputs of a layer
"""

from jaxtyping import Num
from torch import Tensor, nn

from lightning_lowrank.models.axes import is_transposed


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """By name the layers of a module that are called and multiply their input by a parameter: `nn.Linear` and
    transformers' `Conv1D`, without those whose weight is computed (parametrised, pruned).
    """
    layers = dict(module.named_modules())
    # The projection of an attention is never called as a layer.
    inner = {id(layer.out_proj) for layer in layers.values() if isinstance(layer, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in layers.items()
        if (isinstance(layer, nn.Linear) or is_transposed(layer)) and _own(layer) and id(layer) not in inner
    }


def matrix_of(layer: nn.Module, weight: Num[Tensor, "a b"]) -> Num[Tensor, "M N"]:
    """A tensor of the shape of a linear layer's weight as the matrix that inputs are multiplied by."""
    return weight.mT if is_transposed(layer) else weight


def _own(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.is_floating_point()
