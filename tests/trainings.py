"""What the tests train, and the trainings: modules that are small and deterministic, one feature of Lightning each, the
table of the ways to train them, and what a training leaves behind.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lowrank import Monitor

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
COSTS = ("time_ms", "overhead_percent", "bytes")
KINDS_OF_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


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
        """Step -> value of one tag, which must be among those that were logged: only the first process logs at all."""
        assert not self.rows or tag in self.tags(), f"no curve {tag!r} among {sorted(self.tags())}"
        return {step: scalars[tag] for step, scalars in self.rows if tag in scalars}

    def curves(self) -> dict[str, dict[int, float]]:
        """All of them by tag, in the order in which they began."""
        return {tag: self.curve(tag) for tag in dict.fromkeys(tag for _, scalars in self.rows for tag in scalars)}

    def tags(self) -> set[str]:
        """What was logged at all."""
        return {tag for _, scalars in self.rows for tag in scalars}

    def numbers(self) -> dict[str, dict[int, float]]:
        """Those of monitors, what they cost left out."""
        curves = self.curves()
        return {tag: curves[tag] for tag in curves if tag not in ("loss", "epoch") and not tag.endswith(COSTS)}


class Experiment:
    """Where a logger writes to."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float]] = []

    def add_scalar(self, tag: str, value: float) -> None:
        self.rows.append((tag, value))


class Experimental(MemoryLogger):
    """A logger with an experiment."""

    log_dir = "somewhere"

    def __init__(self) -> None:
        super().__init__()
        self.experiment = Experiment()


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


class Checkpointed(nn.Module):
    """Its first layer runs again in the backward pass, unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(64, 32), nn.Dropout(dropout), nn.Linear(32, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.second(x)

    def body(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.first(x)))


class Finetuned(Classifier):
    """A backbone that is frozen at first."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, 10))


class Fused(nn.Module):
    """Two transformer layers, whose attention is fused, on the rows of 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(-1, 8, 8)).flatten(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(-1, 8, 8))[0][:, -1])


class Attending(nn.Module):
    """Eight pixels a token, fused attention, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (8, 8))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).flatten(1))


class Resumable:
    """Four batches, the same in every epoch, that go on where they were stopped."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        batches = list(DataLoader(digits(32), batch_size=8))
        for i in range(self.position % len(self), len(self)):
            self.position = i + 1
            yield batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Ordered(Validated):
    """May be stopped at any step."""

    def train_dataloader(self) -> Resumable:
        return Resumable()

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(16), batch_size=16)


class InOrder(Classifier):
    """Sees 16 digits a step, on one process or on several together."""

    def __init__(self, rank: int, size: int, net: nn.Module | None = None, batch_size: int = 16) -> None:
        super().__init__(
            net or nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), optimizer="sgd", lr=0.1, momentum=0.9
        )
        self.rank, self.size, self.batch_size = rank, size, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        # The sampler that Lightning would put here shuffles.
        sampler = DistributedSampler(digits(), self.size, self.rank, shuffle=False)
        return DataLoader(digits(), batch_size=self.batch_size // self.size, sampler=sampler)


class Quiet(Classifier):
    """Without `self.log`, which Dynamo cannot trace on Python 3.11."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


def compiled(backend: str) -> nn.Module:
    """The whole module, as `torch.compile` gives it."""
    return torch.compile(Quiet(), backend=backend)  # type: ignore[return-value]


def compiled_in_place(backend: str) -> Classifier:
    """The whole module, its class unchanged."""
    module = Classifier()
    module.compile(backend=backend)
    return module


def compiled_inside(backend: str) -> Classifier:
    """One layer of the module."""
    return Classifier(
        nn.Sequential(torch.compile(nn.Sequential(nn.Linear(64, 32), nn.ReLU()), backend=backend), nn.Linear(32, 10))
    )


COMPILED: dict[str, Callable[[str], Any]] = {
    "module": compiled,
    "module in place": compiled_in_place,
    "layer": compiled_inside,
}


def adapted() -> Classifier:
    """A frozen model with LoRA pairs from peft."""
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Classifier(get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=0.1)))


def unfreezing() -> dict[str, Any]:
    """The backbone joins the optimizer in the second epoch."""
    return {"callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)]}


def half() -> MixedPrecision:
    """16-mixed on CPU; the string alone would become bf16."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))


def critic_loss(module: Any, batch: Any) -> Tensor:
    fake = module.generator(batch[0].roll(1, 0))
    return (module.critic(fake) - module.critic(batch[0])).square().mean()


CASES: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], dict[str, Any]]]] = {
    "plain": (Classifier, dict),
    "dropout and batch norm": (lambda: Classifier(ImageNet()), dict),
    "validation": (lambda: Validated(ImageNet()), dict),
    "accumulation": (Classifier, lambda: {"accumulate_grad_batches": 3}),
    "clipping by norm": (Classifier, lambda: {"gradient_clip_val": 0.01}),
    "clipping by value": (Classifier, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "16-mixed": (Classifier, lambda: {"plugins": half()}),
    "16-mixed, fused AdamW": (lambda: Classifier(fused=True), lambda: {"plugins": half()}),
    "bf16-mixed": (Classifier, lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (Classifier, lambda: {"precision": "bf16-true"}),
    "fused AdamW": (lambda: Classifier(fused=True), dict),
    "momentum": (lambda: Classifier(optimizer="sgd", momentum=0.9), dict),
    "two optimizers by hand": (Adversaries, dict),
    "two optimizers in turn": (lambda: Adversaries(every=3), dict),
    "LBFGS": (lambda: Classifier(optimizer="lbfgs", max_iter=4), dict),
    "tied weights": (lambda: Classifier(Tied()), dict),
    "spectral norm": (lambda: Classifier(nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10))), dict),
    "activation checkpointing": (lambda: Classifier(Checkpointed(dropout=0.2)), dict),
    "reentrant checkpoint": (lambda: Classifier(Checkpointed(True)), dict),
    "fused attention": (lambda: Classifier(Fused()), dict),
    "LSTM": (lambda: Classifier(Recurrent()), dict),
    "backbone unfrozen": (Finetuned, unfreezing),
    "LoRA": (adapted, dict),
    "weight averaging": (Validated, lambda: {"callbacks": [WeightAveraging()]}),
}


# Of steps that cannot be run again: what takes their place.
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {case: critic_loss for case in CASES if "optimizers" in case}


def settings_of_torch() -> tuple[Any, ...]:
    """What is global and could be left changed."""
    mkldnn: Any = torch.backends.mkldnn
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        mkldnn.matmul.fp32_precision,
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
    )


def trained(
    make: Callable[[], Any],
    options: dict[str, Any],
    callbacks: Sequence[L.Callback],
    root: Path,
    *,
    resume: Path | None = None,
) -> dict[str, Any]:
    """All that a run leaves behind."""
    L.seed_everything(3, verbose=False)
    before = settings_of_torch()
    module = make()
    logger = CSVLogger(root, flush_logs_every_n_steps=1)
    settings = {
        "max_epochs": 2,
        "logger": logger,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    extra = options.pop("callbacks", [])
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in extra)
    trainer = L.Trainer(**settings | options, enable_checkpointing=keeps, callbacks=[*callbacks, *extra])
    trainer.fit(module, ckpt_path=resume)
    assert settings_of_torch() == before
    return {
        "state": module.state_dict(),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "losses": module.losses,
        "logged": {k: v for k, v in trainer.logged_metrics.items() if "/" not in k},
        "rng": (torch.get_rng_state(), np.random.get_state()[1]),
        "hooks": [sum(len(getattr(m, kind)) for kind in KINDS_OF_HOOKS) for m in module.modules()],
        "hooks of optimizers": [
            len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers
        ],
    }


@cache
def unwatched(case: str) -> dict[str, Any]:
    """What a run of a case leaves behind that nobody watches: trained once in a process."""
    make, options = CASES[case]
    with TemporaryDirectory() as root:
        return trained(make, options(), [], Path(root))


def logged(
    callbacks: Sequence[L.Callback], make: Callable[[], Any] | None = None, **options: Any
) -> tuple[MemoryLogger, L.LightningModule]:
    """What is logged in four steps, and the module after them."""
    L.seed_everything(3, verbose=False)
    module, logger = make() if make else Classifier(Attending()), MemoryLogger()
    settings = QUIET | {"max_steps": 4, "logger": logger, "accelerator": "cpu"}
    L.Trainer(**settings | options, callbacks=list(callbacks)).fit(module)
    return logger, module


def fitted(
    module: L.LightningModule, callbacks: list[L.Callback], logger: Any, size: int, **options: Any
) -> dict[str, Tensor]:
    """Final weights."""
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": size,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings |= {
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "strategy": "ddp" if size > 1 else "auto",
    }
    options = {key: value() if callable(value) else value for key, value in options.items()}
    L.Trainer(**settings | options, logger=logger, callbacks=callbacks).fit(module)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Keep(L.Callback):
    """The samples of a monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.samples: list[Any] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if self.monitor.latest is not None:
            self.samples.append((self.monitor.latest.step, {k: dict(v) for k, v in self.monitor.latest.values.items()}))


class Images(nn.Module):
    """A network of transformers on images of 8 x 8, whose linear layers put out channels last."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(pixel_values=x.reshape(-1, 1, 8, 8)).pooler_output)


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(
        num_channels=1, image_size=8, patch_size=2, num_stages=2, hidden_sizes=[6, 11], depths=[1, 1]
    )
    return Images(ConvNextModel(config), 11)


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        num_channels=1, image_size=8, patch_size=2, embed_dim=6, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return Images(SwinModel(config), 12)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    class Text(nn.Module):
        """The first 12 pixels as tokens."""

        def __init__(self) -> None:
            super().__init__()
            config = GPT2Config(
                n_embd=12, n_layer=1, n_head=3, n_positions=16, vocab_size=17, bos_token_id=0, eos_token_id=0
            )
            self.network, self.head = GPT2Model(config), nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.network((16 * x[:, 20:32]).long()).last_hidden_state.mean(1))

    return Text()
