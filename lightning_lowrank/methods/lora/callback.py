"""`LoRA`: fine-tuning in few directions."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import nn

from lightning_lowrank.measuring.number_source import Detail, refuse_seed
from lightning_lowrank.methods.lora.adapters import Adapters
from lightning_lowrank.methods.lora.choice import Ranks, Settings
from lightning_lowrank.methods.lora.curves import LoRANumbers
from lightning_lowrank.methods.lora.exchange import export, fill
from lightning_lowrank.methods.lora.inits import refuse_init
from lightning_lowrank.methods.lora.prepared import frozen_keys, merge, merged_state, prepared
from lightning_lowrank.methods.method import Method, refuse_finetuning
from lightning_lowrank.monitors.curvature.monitor import CurvatureMonitor
from lightning_lowrank.watching.trainer import beside

Patterns = str | Sequence[str] | None


class LoRA(Method):
    """Fine-tune a module in few directions: each adapted weight gets a pair of narrow factors, `W + s B A`.

    Everything else is frozen, except parameters in `train_also` and the head. The head is the last linear layer, unless
    it outputs tokens or was frozen before. The table at the start shows what is adapted, trained in full and frozen, in
    parameters and bytes.

    Pairs are created in `setup`, before `configure_optimizers`, so that optimizers get them. In your own loop, call
    `prepare(model)` before you create its optimizer. Classes and keys of the layers stay. The factors of `net.0.weight`
    are `net.0.lora_A` `[r, inputs]` and `net.0.lora_B` `[outputs, r]`. Layers that are called compute the branch next
    to their weight and form no gradient of it. Weights that are used without calling their layer, such as those of
    `nn.MultiheadAttention`, are parametrized. In a fused projection, queries, keys and values get one pair each.

    Pairs stay until `merge(module)`, which adds them to the weights and restores everything else. A second `fit`
    continues with existing pairs.

    Curves of each pair: `lora_stable_rank`, `lora_effective_rank` and `lora_utilisation` (stable rank over r) of the
    product, and `lora_schatten_gap` of its factors. Also `lora_update_rank` and `lora_update_norm` of the change of the
    pretrained weight, and `lora_intruders` on request.

    With `hessian=True`, `lora_product_in_top` is the share of a product's energy along the changes that top
    eigenvectors of the Hessian cause. It uses the eigenvectors that `CurvatureMonitor` found last for the factors.
    `..._chance` is the same for a random direction.

    Cost: each step takes two narrow products per layer, forward and backward, instead of the gradient of the weight.
    For each pair, a report takes two QR decompositions of narrow factors and an SVD of r x r. Intruders take two SVDs
    of the weight.

    Args:
        r: Rank of all pairs. A mapping from patterns to ranks chooses the weights, too.
        alpha: The scaling `s` is alpha over r. Default: r.
        init: "default": B is zero. "pissa" and "pissa_niter_N" (randomised, N iterations): the top of the weight's SVD,
            "olora": of its QR decomposition; both are subtracted from the weight. "orthogonal": two nonzero factors
            whose product is zero. "eva": A has the top directions of the first batch's inputs, and B is zero. "corda",
            only with `backend="peft"`: the top of the weight's SVD weighted by those inputs, subtracted from the
            weight.
        match: Weights to adapt: globs, `re:REGEX` or `type:LAYERCLASS`. Default: all weights of linear layers,
            transformers' `Conv1D`, convolutions and `nn.MultiheadAttention`, except embeddings and the last linear
            layer.
        exclude: Patterns of weights to leave out.
        train_also: Patterns of parameters to train in full.
        rslora: Use alpha over the square root of r as the scaling.
        dropout: Share of the inputs that the branches drop in training.
        learning_rate_ratio: Learning rate of B divided by that of A (LoRA+).
        merge_on_save: Save merged weights under the module's own keys; such checkpoints load without this callback.
        adapter_only: Save only trained parameters and buffers of the module; such checkpoints load onto the same base.
        backend: "parametrize": this package creates the pairs. "peft": peft creates them, for linear layers and
            embeddings. Its layers wrap yours and add `base_layer.` to their keys until `merge`.
        intruders: Number of top directions of each weight to compare with the base weight; 0 for none.
        hessian: Report which part of each product is along top eigenvectors of the Hessian. This needs a
            `CurvatureMonitor("standard")` in the same Trainer.
        seed: Seed for random factors.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single pairs: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of range. Before training: a pattern matches nothing or a weight that cannot be
            adapted, or a rank is larger than that of a matrix. Also if a pair is frozen, in no optimizer, or zero in
            both factors; if the base is not frozen; or if an optimizer has nothing to train. Also if a layer is
            quantised, if the module has other adapters, or if the checkpoint has another base.

    Examples:
        >>> LoRA(r=16, init="pissa", train_also="*norm*")
        LoRA(r=16, init='pissa', train_also='*norm*')

    References:
        Hu et al. (2021), LoRA, arXiv:2106.09685; Kalajdzievski (2023), rsLoRA, arXiv:2312.03732; Hayou et al. (2024),
        LoRA+, arXiv:2402.12354; Meng et al. (2024), PiSSA, arXiv:2404.02948; Buyukakyuz (2024), OLoRA,
        arXiv:2406.01775; Paischer et al. (2024), EVA, arXiv:2410.07170; Yang et al. (2024), CorDA, arXiv:2406.05223.
    """

    word = "lora"
    _needs_curvature = False

    def __init__(
        self,
        r: int | Mapping[str, int] = 8,
        alpha: int | float | None = None,
        init: str = "default",
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        train_also: str | Sequence[str] = (),
        rslora: bool = False,
        dropout: float = 0.0,
        learning_rate_ratio: int | float | None = None,
        merge_on_save: bool = False,
        adapter_only: bool = False,
        backend: str = "parametrize",
        *,
        intruders: int = 0,
        hessian: bool = False,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        settings = settings_of(r, alpha, init, match, exclude, train_also, rslora, dropout, seed, backend)
        if learning_rate_ratio is not None and not 0 < learning_rate_ratio < float("inf"):
            raise ValueError(f"learning_rate_ratio={learning_rate_ratio} must be a number above 0, or None")
        if merge_on_save and adapter_only:
            raise ValueError(
                "LoRA(merge_on_save=True, adapter_only=True): give only one; merged weights are no adapter"
            )
        if type(intruders) is not int or intruders < 0:
            raise ValueError(f"intruders={intruders!r} must be a number of directions, 0 for none")
        saved = "merged" if merge_on_save else "adapters" if adapter_only else "whole"
        act = Adapters(settings, learning_rate_ratio, saved)
        self._numbers = LoRANumbers(act, intruders, hessian)
        self._needs_curvature = hessian
        super().__init__(act, self._numbers, every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the pairs before `configure_optimizers`; refuse callbacks that would unfreeze the base."""
        refuse_finetuning(trainer, type(self).__name__, "name other parameters to train with train_also")
        if stage == "fit" and self._needs_curvature:
            self._numbers.curvature = _curvature(trainer)
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Also remove pairs that no checkpoint has filled, after a stage without training."""
        super().teardown(trainer, pl_module, stage)
        state = prepared(pl_module)
        if stage != "fit" and state is not None and not state.settled:
            merge(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the requested part of the module."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        assert isinstance(self._act, Adapters)
        if self._act.saved == "adapters":
            for key in frozen_keys(pl_module):
                checkpoint["state_dict"].pop(key, None)
        elif self._act.saved == "merged":
            checkpoint["state_dict"] = merged_state(pl_module, checkpoint["state_dict"])

    @staticmethod
    def merge(module: nn.Module) -> nn.Module:
        """Add the pairs to the weights, and remove everything else of LoRA from a module.

        Keys, classes and trainable parameters are then those of before.

        Returns:
            The module.

        Raises:
            ValueError: The module has no pairs.
        """
        return merge(module)

    @staticmethod
    def export_adapter(module: nn.Module, folder: str | Path, within: str = "", base: str | None = None) -> None:
        """Write pairs and other trained parameters as peft's `adapter_config.json` and `adapter_model.safetensors`.

        Pairs that were subtracted from the weight ("pissa", "olora") become plain ones of twice the rank, for the
        original weight. Pairs of a fused projection become one of three times the rank.

        Args:
            module: The module with the pairs.
            folder: The folder to write to.
            within: The part of the module that users of peft load, such as "model". Default: the whole module.
            base: Name of the base model, for peft.

        Raises:
            ValueError: There are no pairs, or one belongs to a weight that is used without calling its layer.
        """
        export(module, folder, within, base)

    def import_adapter(self, module: nn.Module, folder: str | Path, within: str = "") -> None:
        """Start from an adapter of peft: create the pairs if there are none, and load the values of a folder.

        A pair of larger rank is accepted if the rank of its product is small enough. Weights that the folder does not
        adapt begin with B = 0.

        Args:
            module: The module to adapt.
            folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
            within: The part of the module that the folder is for.

        Raises:
            ValueError: The folder has another kind of adapter, adapts layers without pairs, or has a larger rank.
        """
        self.prepare(module)
        fill(module, folder, within)

    @staticmethod
    def merged_state_dict(module: nn.Module) -> dict[str, Any]:
        """The state dict that a module would have after `merge`; the module does not change."""
        return merged_state(module, module.state_dict())


def _curvature(trainer: L.Trainer) -> CurvatureMonitor:
    """The monitor that follows directions of the Hessian."""
    for callback in beside(trainer):
        if isinstance(callback, CurvatureMonitor):
            callback.top_directions()  # refused where none are followed
            return callback
    raise ValueError("LoRA(hessian=True) needs a CurvatureMonitor('standard') in the same Trainer")


def settings_of(
    r: Ranks,
    alpha: int | float | None,
    init: str,
    match: Patterns,
    exclude: Patterns,
    train_also: str | Sequence[str],
    rslora: bool,
    dropout: float,
    seed: int,
    backend: str = "parametrize",
) -> Settings:
    """The options as checked settings.

    Raises:
        ValueError: An option is out of range.
    """
    ranks = tuple(r.items()) if isinstance(r, Mapping) else ((None, r),)
    for _, rank in ranks:
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"r={rank!r} must be a whole number of at least 1, or a mapping of patterns to such numbers"
            )
    if isinstance(r, Mapping) and (not r or match is not None):
        raise ValueError(
            f"LoRA(r={r!r}, match={match!r}): a mapping of patterns to ranks chooses the weights; it must not "
            "be empty, and match must not be given"
        )
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be a number above 0, or None for the value of r")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    refuse_seed(seed)
    if backend not in ("parametrize", "peft"):
        raise ValueError(f"backend={backend!r} must be 'parametrize' or 'peft'")
    if backend == "peft" and find_spec("peft") is None:
        raise ValueError(
            "backend='peft' needs peft; run pip install 'lightning-lowrank[peft]', or use backend='parametrize'"
        )
    refuse_init(init, [rank for _, rank in ranks], backend)
    patterns = _several(match), _several(exclude), _several(train_also) or ()
    return Settings(ranks, alpha, init, *patterns, rslora, dropout, seed, backend)


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
