"""LoRA pairs from peft: its layers around those of the module, and its initialisations.

Shape letters:  N inputs of a layer
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_lowrank.methods.lora.inits import takes_from_weight
from lightning_lowrank.methods.lora.pairs import ADAPTER, Place, as_weight, change, gains, in_training, learned, wide
from lightning_lowrank.methods.lora.prepared import Prepared, copied


@torch.no_grad()
def inject(module: nn.Module, state: Prepared) -> None:
    """Let peft wrap the chosen layers. Factors are zero, and the state of random number generators does not change."""
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    chosen = {one.owners[0].path: one.recipe for one in state.choice.adapted}
    ranks = {re.escape(path): chosen[path].rank for path in sorted(chosen, key=len, reverse=True)}
    settings = state.settings
    alphas = {path: rank if settings.alpha is None else settings.alpha for path, rank in ranks.items()}
    usual: dict[str, Any] = {"target_modules": "|".join(ranks), "lora_dropout": settings.dropout}
    if settings.is_allocated:  # of one rank at the start; the schedule is the allocator's
        usual |= {"init_r": max(ranks.values()), "lora_alpha": max(alphas.values()), "total_step": 1}
        config: Any = AdaLoraConfig(**usual)
    else:
        config = LoraConfig(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=settings.rslora, **usual)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out")
        inject_adapter_in_model(config, module, ADAPTER)
    cast_adapter_dtype(module, ADAPTER)
    for one in state.choice.adapted:
        layer = module.get_submodule(one.owners[0].path)
        layer.lora, layer.lora_waits = one.recipe, False  # type: ignore[assignment]
        for factor in learned(layer):
            factor.zero_()
        if settings.init == "corda":
            layer.lora_name, layer.lora_state = one.name, state  # type: ignore[assignment]
            layer.register_forward_pre_hook(look_at_inputs, with_kwargs=True)


@torch.no_grad()
def initialise_by_peft(place: Place, init: str, generator: torch.Generator) -> None:
    """Let peft initialise the factors of a weight; for CorDA they stay plain until there are inputs."""
    layer: Any = place.holder
    before = layer.weight.detach().clone()
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        if init.startswith("pissa"):
            layer.pissa_init(ADAPTER, init)
        elif init == "olora":
            layer.olora_init(ADAPTER)
        elif init == "orthogonal":
            layer.orthogonal_init(ADAPTER)
        else:
            layer.reset_lora_parameters(ADAPTER, *([] if gains(layer) else [True]))
    layer.lora_waits = init == "corda"
    if takes_from_weight(init) and not layer.lora_waits:
        take_out_of(layer, before)


def take_out_of(layer: Any, before: Tensor) -> None:
    """Subtract the product from the weight, with the same rounding as in a resumed run."""
    delta = as_weight(change(layer), layer.lora, before.shape)
    layer.weight.copy_(wide(before).sub(delta))


def look_at_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A hook of the layer: the first inputs in training determine the initial pairs of CorDA."""
    if layer.lora_waits and in_training(layer):
        begin_as_corda(layer, args[0] if args else next(iter(kwargs.values())))


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def begin_as_corda(layer: Any, x: Tensor) -> None:
    """Initialise CorDA by peft, from the covariance of the first inputs of all processes. peft would scale it to 1 at
    most.

    The weight changes before the layer first uses it, and the function stays the same.
    """
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

    with torch.autocast(x.device.type, enabled=False):
        rows = wide(x.detach()).flatten(0, -2)
        largest, covariance = rows.max(), rows.mT @ rows
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(covariance)
        base = layer.get_base_layer()
        config = LoraConfig(target_modules="base", init_lora_weights="corda", corda_config=CordaConfig())
        base.covariance_matrix, base.corda_method = covariance / largest.square(), "ipm"
        base.rank = config.r = layer.lora.rank
        holder = nn.ModuleDict({"base": base})
        collect_eigens(holder, config, verbose=False)
        crop_corda_eigens(holder, config)
        before = base.weight.detach().clone()
        layer.corda_init(ADAPTER, "corda")
        take_out_of(layer, before)
        del base.covariance_matrix, base.corda_method, base.rank
    layer.lora_waits = False
    layer.lora_state.initial[layer.lora_name] = copied(layer)
