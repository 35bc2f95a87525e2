"""Real LightningModules that the tests train: small, deterministic, one feature of Lightning each."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


def digits(n: int = 64) -> TensorDataset:
    """The first handwritten digits of scikit-learn: rows of 64 pixels in 0..1, labels 0..9."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:n] / 16, dtype=torch.float32), torch.tensor(labels[:n]))


class Classifier(L.LightningModule):
    """An MLP on digits."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "adamw", **options: Any) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.optimizer, self.options = optimizer, options
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=8, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        makers = {
            "adamw": torch.optim.AdamW,
            "sgd": torch.optim.SGD,
            "lbfgs": torch.optim.LBFGS,
        }
        return makers[self.optimizer](self.parameters(), **({"lr": 1e-2} | self.options))


class Validated(Classifier):
    """The same with a validation loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(32), batch_size=16)


class ImageNet(nn.Module):
    """Convolution, batch normalisation and dropout on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.convolution(x.reshape(-1, 1, 8, 8))))
        return self.head(self.dropout(x.flatten(1)))


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Adversaries(L.LightningModule):
    """Manual optimization with two optimizers; the second steps every `every`-th batch."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(64, 64), nn.Linear(64, 1)
        self.every = every
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        real, fake = batch[0], self.generator(batch[0].roll(1, 0))
        loss = self.critic(fake.detach()).mean() - self.critic(real).mean() + self.critic.weight.square().sum()
        self.losses.append(loss.item())
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        if batch_idx % self.every == self.every - 1:
            first.zero_grad()
            self.manual_backward(-self.critic(fake).mean())
            first.step()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=8)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.generator.parameters()), torch.optim.SGD(self.critic.parameters(), lr=0.01)]


class MemoryLogger(Logger):
    """Keeps what it is handed: one pair of step and scalars per call."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are no curves."""

    def curve(self, tag: str) -> dict[int, float]:
        """Step -> value of one tag."""
        return {step: scalars[tag] for step, scalars in self.rows if tag in scalars}

    def curves(self) -> dict[str, dict[int, float]]:
        """All of them, by tag."""
        return {tag: self.curve(tag) for _, scalars in self.rows for tag in scalars}
