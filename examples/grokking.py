"""Watch a small network grok modular addition, and be told when its weights change phase.

    python examples/grokking.py
    python examples/grokking.py --weight_decay 0    # memorises just as fast, and never generalises

Power et al. (2022), arXiv 2201.02177: the training examples are known by heart within some twenty steps; what they have
in common is found hundreds of steps later. By then the embedding has become a few waves around the circle of numbers,
and its rank falls.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lowrank import AlertEvent, ChangePointAlert, MultifractalMonitor, RankMonitor

STATISTICS = ("participation_ratio", "effective_rank")
# Whose change points are told, with what the picture draws them as.
QUANTITIES = {"weight_participation_ratio": "--", "weight_effective_rank": ":", "multifractal_dispersion": "-."}


class Adder(L.LightningModule):
    """Says what two numbers add up to, modulo a prime.

    Attributes:
        train_accuracy: By step.
        val_accuracy: The same of sums that were never shown.
    """

    def __init__(self, prime: int, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self.embedding = nn.Embedding(prime, 128)
        self.hidden, self.output = nn.Linear(128, 256, bias=False), nn.Linear(256, prime, bias=False)
        self.train_accuracy: dict[int, float] = {}
        self.val_accuracy: dict[int, float] = {}

    def forward(self, pairs: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(self.embedding(pairs).sum(1))))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pairs, sums = batch
        logits = self(pairs)
        self.train_accuracy[self.global_step] = accuracy(logits, sums)
        self.log("train_accuracy", self.train_accuracy[self.global_step])
        return F.cross_entropy(logits, sums)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pairs, sums = batch
        self.val_accuracy[self.global_step] = accuracy(self(pairs), sums)
        self.log("val_accuracy", self.val_accuracy[self.global_step])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=self.weight_decay)


def accuracy(logits: Tensor, sums: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(-1) == sums).float().mean().item()


def additions(prime: int, share: float, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sums to learn from and sums to be asked: no pair is in both, not even the other way round."""
    pairs = torch.combinations(torch.arange(prime), with_replacement=True)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    known = int(share * len(pairs))
    return (pairs[:known], pairs[:known].sum(1) % prime), (pairs[known:], pairs[known:].sum(1) % prime)


def whole(data: tuple[Tensor, Tensor], times: int = 1) -> DataLoader[Any]:
    """All of it as one batch, so many times."""
    batches: Any = [data] * times
    return DataLoader(batches, batch_size=None)


def first(curve: dict[int, float], level: float) -> str:
    """Step at which an accuracy is reached."""
    return next((str(step) for step, value in curve.items() if value >= level), "never")


def told(events: list[AlertEvent], quantity: str) -> list[int]:
    """Steps at which a change point was told."""
    return [event.step for event in events if event.state == "firing" and event.quantity == quantity]


def draw(model: Adder, events: list[AlertEvent], output: Path) -> None:
    """Both accuracies, and when change points were told."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.4))
    for name, curve in (("training", model.train_accuracy), ("validation", model.val_accuracy)):
        panel.plot(list(curve), list(curve.values()), label=f"{name} accuracy")
    for quantity, style in QUANTITIES.items():
        for i, step in enumerate(told(events, quantity)):
            panel.axvline(
                step,
                color="black",
                linestyle=style,
                label=None if i else f"change point: {quantity.replace('_', ' ')}",
            )
    panel.set(xlabel="optimizer step", ylabel="accuracy")
    panel.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"Drawn in {output}")


def main(
    seed: int = 0,
    weight_decay: float = 1.0,
    max_steps: int = 1000,
    prime: int = 97,
    share: float = 0.4,
    log_dir: Path = Path("runs"),
) -> None:
    """Train on all known sums at once, then say when what was known and when change points were told.

    Args:
        seed: Of the weights, and of which sums are shown.
        weight_decay: What makes it grok; without any it does not.
        max_steps: How long; the default takes about half a minute on two cores.
        prime: Modulus.
        share: Of all sums, shown in training.
        log_dir: Where TensorBoard will find the curves, and the picture is saved.
    """
    L.seed_everything(seed, verbose=False)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*`IterableDataset`")
    model = Adder(prime, weight_decay)
    shown, asked = additions(prime, share, seed)

    ranks, dispersion = (
        [ChangePointAlert(name) for name in QUANTITIES if name.startswith(of)] for of in ("weight", "multi")
    )
    monitors = [
        RankMonitor(["weights"], STATISTICS, every_n_steps=10, alerts=ranks),
        MultifractalMonitor(every_n_steps=10, alerts=dispersion),
    ]
    trainer = L.Trainer(
        max_steps=max_steps,
        val_check_interval=10,
        num_sanity_val_steps=0,
        callbacks=[*monitors],
        logger=TensorBoardLogger(log_dir, "grokking"),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, whole(shown, max_steps), whole(asked))

    print(f"training sums known to 99 % at step {first(model.train_accuracy, 0.99)}")
    print(
        f"other sums known to 50 % at step {first(model.val_accuracy, 0.5)}, to 99 % at step "
        f"{first(model.val_accuracy, 0.99)}"
    )
    events = [event for monitor in monitors for event in monitor.events]
    for quantity in QUANTITIES:
        steps = told(events, quantity)
        words = ", ".join(f"{step} (other sums known to {100 * model.val_accuracy[step]:.0f} %)" for step in steps)
        print(f"change points of {quantity} told at steps: {words or 'none'}")
    if find_spec("matplotlib"):
        draw(model, events, Path(trainer.log_dir or log_dir) / "grokking.png")


if __name__ == "__main__":
    auto_cli(main)
