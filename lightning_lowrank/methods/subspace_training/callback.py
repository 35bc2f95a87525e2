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
    """Trains the coefficients of a shared basis, and nothing else: `W = W0 + mean + sum_i c_i V_i`.

    The basis is a file of `lightning-lowrank subspace fit`; W0 is what the module has at the start, which should be
    what the models of the basis began from. Each tensor has coefficients of its own, at most `k`; all else is frozen.
    The coefficients begin at 0, so that the model begins at the mean of the others. Directions have unit length:
    coefficients need a learning rate far above that of weights, such as 0.1 in Adam.

    With `basis="random"` directions are drawn for each tensor, and there is no mean: what any subspace of the same size
    does (Li et al. 2018), beside which a fitted one is to be read.

    Coefficients are made in `setup`, before `configure_optimizers`; in a loop of your own call `prepare(model)` before
    its optimizer is made. `net.0.weight` becomes `net.0.parametrizations.weight.original`, frozen, and
    `...weight.0.coefficients`. They stay until `merge(module)`, which gives keys and classes back. A checkpoint has no
    directions: to resume, the file of the basis has to be there.

    Writes, per weight, `subspace_update_norm`, the norm of what the coefficients add over that of the weight, and
    `subspace_num_directions_used`, the participation ratio of their squares, from 1 to k; and
    `subspace_num_coefficients`.

    Cost: k + 1 times the memory of the weights, for the directions; each forward pass forms each weight, k
    multiply-adds per number.

    Args:
        basis: A file of `subspace fit`, or "random".
        k: Directions of each tensor, or as many as the basis has of it.
        include_mean: Begin at W0 and the mean of the basis.
        match: Only weights whose name fits one of these globs, `re:REGEX` or `type:LAYERCLASS`.
        exclude: Not these.
        train_also: Patterns of parameters that train whole and have no directions, such as a new head; "*" means all
            that have none. What you froze before (`requires_grad=False`) stays as it is unless it is named here.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single weights: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.

    Raises:
        ValueError: There is no such file, or an option is out of its range. Before training: the basis is of another
            architecture, a pattern fits nothing, nothing is left that moves, coefficients are in no optimizer, or
            the run that is resumed had another basis.

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
            raise ValueError(f"k={k!r}: a whole number of directions from 1 on")
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
        """Make the coefficients, before `configure_optimizers`; refuse callbacks that would unfreeze the weights."""
        refuse_finetuning(trainer, "SubspaceTraining", "name what trains beside the coefficients by train_also")
        super().setup(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        """Without the module's `log`, which Lightning hangs on: torch pickles no module with parametrizations."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @staticmethod
    def merge(module: nn.Module) -> nn.Module:
        """Put what the coefficients add into the weights; keys, classes and what trains are those of before.

        Returns:
            The module.

        Raises:
            ValueError: It has no directions.
        """
        return merge(module)


def _several(patterns: Patterns) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
