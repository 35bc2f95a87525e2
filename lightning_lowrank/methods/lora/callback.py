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
from lightning_lowrank.methods.method import Method, beside, refuse_finetuning
from lightning_lowrank.monitors.curvature.monitor import CurvatureMonitor

Patterns = str | Sequence[str] | None


class LoRA(Method):
    """Fine-tunes a module in few directions: each weight that is adapted gets a pair of narrow factors, `W + s B A`.

    All else is frozen, but for what `train_also` names and for the head: the last linear layer, unless it gives tokens
    or was frozen before. The table at the start says what is adapted, what trains whole and what is frozen, in numbers
    and bytes.

    Pairs are made in `setup`, before `configure_optimizers`, so that optimizers see them; in a loop of your own call
    `prepare(model)` before its optimizer is made. Classes and keys of the layers stay: the factors of `net.0.weight`
    are `net.0.lora_A` and `net.0.lora_B`, of `[r, inputs]` and `[outputs, r]`. Layers that are called compute their
    branch beside the weight, of which no gradient is formed. Weights that are read directly, as those of
    `nn.MultiheadAttention`, are parametrised. Queries, keys and values of a fused projection have a pair each.

    Pairs stay until `merge(module)`, which puts them into the weights and gives everything else back. A second `fit`
    goes on with those that are there.

    Writes, per pair, `lora_stable_rank`, `lora_effective_rank` and `lora_utilisation` (stable rank over r) of the
    product, `lora_schatten_gap` of its factors, `lora_update_rank` and `lora_update_norm` of what was added to the
    pretrained weight, and `lora_intruders` if it is asked for.

    With `hessian=True`, `lora_product_in_top` is the share of a product's energy that lies where the top eigenvectors
    of the Hessian, as `CurvatureMonitor` found them last in the factors, move it; `..._chance` is that of a random
    direction.

    Cost: a step costs two narrow products per layer, forward and backward, instead of the gradient of the weight. A
    report takes two QR decompositions of narrow factors and an SVD of r x r per pair; intruders take two SVDs of the
    weight.

    Args:
        r: Rank of all pairs; or one for each pattern, which then choose the weights.
        alpha: The scaling `s` is alpha over r; that of r itself unless given.
        init: "default": B is zero. "pissa", "pissa_niter_N" (randomised, N iterations): the top of the weight's SVD;
            "olora": of its QR; both are taken out of the weight. "orthogonal": a product of zero with no zero factor.
            "eva": A holds the top directions of the first batch's inputs, B is zero; "corda", of `backend="peft"`: the
            top of the weight's SVD as those inputs see it, taken out of the weight.
        match: Weights: globs, `re:REGEX`, `type:LAYERCLASS`. Unless given all of linear layers, transformers' `Conv1D`,
            convolutions and `nn.MultiheadAttention`, but embeddings and the last linear layer.
        exclude: The same, taken away.
        train_also: Parameters that train whole: patterns as for `match`.
        rslora: The scaling is alpha over the root of r.
        dropout: Share of the inputs that the branches do not see in training.
        learning_rate_ratio: Learning rate of B over that of A (LoRA+).
        merge_on_save: Checkpoints have merged weights under the module's own keys, and load without this callback.
        adapter_only: Checkpoints have of the module what trains, and buffers; they load onto the same base.
        backend: "parametrize": this package makes the pairs. "peft": peft makes them, of linear layers and embeddings;
            its layers stand around yours, whose keys get `base_layer.` in them until `merge`.
        intruders: How many top directions of each weight are compared with the base's, 0 for none.
        hessian: Also say which part of each product lies in the top directions of the Hessian, which a
            `CurvatureMonitor("standard")` follows in the same Trainer.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single pairs: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of its range. Before training: a pattern fits nothing or what cannot be adapted; a
            rank is above that of a matrix; a pair is frozen, in no optimizer, or zero in both factors; the base is not
            frozen; an optimizer has nothing to train; a layer is quantised; the module has other adapters; the base is
            not that of the checkpoint.

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
            raise ValueError(f"learning_rate_ratio={learning_rate_ratio}: a factor above 0, or None")
        if merge_on_save and adapter_only:
            raise ValueError("LoRA(merge_on_save=True, adapter_only=True): give one; merged weights are whole ones")
        if type(intruders) is not int or intruders < 0:
            raise ValueError(f"intruders={intruders!r}: how many directions, 0 for none")
        saved = "merged" if merge_on_save else "adapters" if adapter_only else "whole"
        act = Adapters(settings, learning_rate_ratio, saved)
        self._numbers = LoRANumbers(act, intruders, hessian)
        self._needs_curvature = hessian
        super().__init__(act, self._numbers, every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the pairs, before `configure_optimizers`; refuse callbacks that would unfreeze the base."""
        refuse_finetuning(trainer, type(self).__name__, "name what trains beside the pairs by train_also")
        if stage == "fit" and self._needs_curvature:
            self._numbers.curvature = _curvature(trainer)
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Also take off pairs that no checkpoint has filled, after a stage that does not train."""
        super().teardown(trainer, pl_module, stage)
        state = prepared(pl_module)
        if stage != "fit" and state is not None and not state.settled:
            merge(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep of the module what was asked for."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        assert isinstance(self._act, Adapters)
        if self._act.saved == "adapters":
            for key in frozen_keys(pl_module):
                checkpoint["state_dict"].pop(key, None)
        elif self._act.saved == "merged":
            checkpoint["state_dict"] = merged_state(pl_module, checkpoint["state_dict"])

    @staticmethod
    def merge(module: nn.Module) -> nn.Module:
        """Put what the pairs add into the weights, and take all else of LoRA out of a module.

        Keys, classes, and what trains are those of before.

        Returns:
            The module.

        Raises:
            ValueError: It has no pairs.
        """
        return merge(module)

    @staticmethod
    def export_adapter(module: nn.Module, folder: str | Path, within: str = "", base: str | None = None) -> None:
        """Write pairs, and what else trained, as peft's `adapter_config.json` and `adapter_model.safetensors`.

        Pairs that were taken out of the weight ("pissa", "olora") become plain ones of twice the rank, for the weight
        as it was. Pairs of a fused projection become one of three times the rank.

        Args:
            module: That has the pairs.
            folder: To write to.
            within: The part of the module that peft's users load, such as "model"; all of it unless given.
            base: Its name, for peft.

        Raises:
            ValueError: There are no pairs, or one of a weight that is read directly.
        """
        export(module, folder, within, base)

    def import_adapter(self, module: nn.Module, folder: str | Path, within: str = "") -> None:
        """Go on from an adapter of peft: make the pairs, if there are none, and give them the values of a folder.

        A pair of larger rank is taken if its product has the smaller one. Weights that the folder does not adapt begin
        with B = 0.

        Args:
            module: To adapt.
            folder: With `adapter_config.json` and `adapter_model.safetensors`.
            within: The part of the module that the folder is for.

        Raises:
            ValueError: The folder has another kind of adapter, one for layers that have no pairs, or of a larger rank.
        """
        self.prepare(module)
        fill(module, folder, within)

    @staticmethod
    def merged_state_dict(module: nn.Module) -> dict[str, Any]:
        """The state dict that a module would have after `merge`; the module stays as it is."""
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
    """What was asked for, as words and numbers.

    Raises:
        ValueError: Something is out of its range.
    """
    ranks = tuple(r.items()) if isinstance(r, Mapping) else ((None, r),)
    for _, rank in ranks:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"r={rank!r}: a whole number from 1 on, or a mapping from patterns to such")
    if isinstance(r, Mapping) and (not r or match is not None):
        raise ValueError(f"LoRA(r={r!r}, match={match!r}): patterns of r, one at least, choose the weights")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: a number above 0, or None for that of r")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: a share from 0 to below 1")
    refuse_seed(seed)
    if backend not in ("parametrize", "peft"):
        raise ValueError(f"backend={backend!r}: 'parametrize' or 'peft'")
    if backend == "peft" and find_spec("peft") is None:
        raise ValueError("backend='peft' needs peft: pip install 'lightning-lowrank[peft]', or backend='parametrize'")
    refuse_init(init, [rank for _, rank in ranks], backend)
    patterns = _several(match), _several(exclude), _several(train_also) or ()
    return Settings(ranks, alpha, init, *patterns, rslora, dropout, seed, backend)


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
