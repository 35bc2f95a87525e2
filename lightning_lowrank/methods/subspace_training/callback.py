"""`SubspaceTraining`: training in a subspace that other models share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import nn

from lightning_lowrank.measuring.number_source import Detail, refuse_seed
from lightning_lowrank.methods.matrices import Patterns
from lightning_lowrank.methods.method import Method, refuse_finetuning
from lightning_lowrank.methods.subspace_training.act import Settings, Subspaces, merge
from lightning_lowrank.methods.subspace_training.curves import SubspaceNumbers
from lightning_lowrank.models.basis_files import Basis


class SubspaceTraining(Method):
    """Train only the coefficients of a shared basis: `W = W0 + mean + sum_i c_i V_i`.

    The basis is a file from `lightning-lowrank subspace fit`. W0 are the module's weights at the start, which should be
    those that the models of the basis started from. Each tensor has its own coefficients, at most `k`; everything else
    is frozen. The coefficients start at 0, so the model starts at the mean of the others.
    Directions have unit length: coefficients need a far larger learning rate than weights, such as 0.1 in Adam.

    With `basis="random"`, the directions of each tensor are random and there is no mean. It shows what any subspace of
    this size achieves (Li et al. 2018); compare a fitted basis with it.

    Coefficients are created in `setup`, before `configure_optimizers`. In your own loop, call `prepare(model)` before
    you create its optimizer. `net.0.weight` becomes `net.0.parametrizations.weight.original`, which is frozen, and
    `...weight.0.coefficients`. They stay until `merge(module)`, which restores keys and classes. A checkpoint does not
    contain the directions, so resuming needs the file of the basis.

    Curves of each weight: `subspace_update_norm`, the norm of its change relative to the weight;
    `subspace_num_directions_used`, the participation ratio of the squared coefficients, from 1 to k; and
    `subspace_num_coefficients`.

    Cost: k + 1 times the memory of the weights, for the directions. Each forward pass computes each weight, with k
    multiply-adds per entry.

    Args:
        basis: A file from `subspace fit`, or "random".
        k: Largest number of directions of each tensor; the basis may have fewer.
        include_mean: Start at W0 plus the mean of the basis.
        match: Only weights whose name matches one of these globs, `re:REGEX` or `type:LAYERCLASS`.
        exclude: Patterns of weights to leave out.
        train_also: Patterns of parameters that train in full and have no directions, such as a new head. "*" means all
            parameters without directions. Parameters that you froze before (`requires_grad=False`) stay frozen unless
            they are named here.
        seed: Seed for random directions.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single weights: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.

    Raises:
        ValueError: The file does not exist, or an option is out of range. Before training: the basis is from another
            architecture, a pattern matches nothing, no weight is left to train, or no optimizer has the coefficients.
            Also if the resumed run had another basis.

    Examples:
        >>> SubspaceTraining(basis="random", k=4, train_also="head*")
        SubspaceTraining(basis='random', k=4, train_also='head*')

    References:
        Kaushik et al. (2025), The Universal Weight Subspace Hypothesis, arXiv:2512.05117. Li et al. (2018), Measuring
        the Intrinsic Dimension of Objective Landscapes, arXiv:1804.08838.
    """

    word = "subspace"

    def __init__(
        self,
        basis: str,
        k: int = 16,
        include_mean: bool = True,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        train_also: str | Sequence[str] = (),
        *,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        if type(k) is not int or k < 1:
            raise ValueError(f"k={k!r} must be a whole number of at least 1")
        refuse_seed(seed)
        if basis != "random":
            Basis(basis)
        act = Subspaces(
            Settings(
                str(Path(basis)), k, include_mean, _several(match), _several(exclude), _several(train_also) or (), seed
            )
        )
        super().__init__(
            act, SubspaceNumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the coefficients before `configure_optimizers`; refuse callbacks that would unfreeze the weights."""
        refuse_finetuning(trainer, "SubspaceTraining", "name other parameters to train with train_also")
        super().setup(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        """Without the module's `log`, which Lightning hangs on: torch pickles no module with parametrizations."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @staticmethod
    def merge(module: nn.Module) -> nn.Module:
        """Add the change to the weights; keys, classes and trainable parameters are then those of before.

        Returns:
            The module.

        Raises:
            ValueError: The module has no directions.
        """
        return merge(module)


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
