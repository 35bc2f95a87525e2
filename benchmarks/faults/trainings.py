"""The trainings: what goes wrong in each, from which step on, and which healthy one it is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, AdamW
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.budget import digits
from benchmarks.faults.nets import Convolutions, Experts, Norm, Rounded, Twin, gpt, gpt_of_experts, mlp, writer
from examples.char_transformer import standard_library

# Steps of a training of the GPT, the step at which its fault begins, and of the trainings that fail by themselves.
STEPS, BEGIN, LONG = 500, 200, 1400
HELD_OUT, JUDGED_EVERY = 96, 25
Optimizer = Callable[..., torch.optim.Optimizer]


class Examples(Dataset[list[Tensor]]):
    """Some of the examples; from a moment on a few of them, again and again."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.shard = tensors, len(tensors[0])

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, i: int) -> list[Tensor]:
        return [tensor[i % self.shard] for tensor in self.tensors]


@cache
def text() -> tuple[Tensor, Tensor]:
    """Windows to train on, and those held out."""
    windows = standard_library()
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    return windows[HELD_OUT:], windows[:HELD_OUT]


class Run(L.LightningModule):
    """A network in training; notes what is seen from outside: losses, the norm of the gradient, the spread of features.

    Args:
        net: What is trained.
        objective: On what.
        optimizer: By what.
        rate: Of learning.
        growth: What the rate is multiplied by at every step.
        fault: What goes wrong: called before each step from `BEGIN` on, with the number of steps since then.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: "Objective",
        optimizer: Optimizer = AdamW,
        rate: float = 1e-3,
        growth: float = 1.0,
        fault: "Fault | None" = None,
    ) -> None:
        super().__init__()
        self.net, self.objective, self.fault = net, objective, fault
        self.optimizer, self.rate, self.growth = optimizer, rate, growth
        self.loss, self.norm, self.spread = list[float](), list[float](), list[float]()
        self.held_out: dict[int, float] = {}
        self.label_noise = 0.0
        self.data, held_out = examples(objective)
        self.unseen: tuple[Tensor, ...] = held_out

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let go wrong what is to."""
        if self.fault is not None and self.global_step >= BEGIN:
            with torch.no_grad():
                self.fault(self, self.global_step - BEGIN)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss."""
        return self.objective(self, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm of the gradient."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norm.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss, and now and then that of examples that are not trained on."""
        self.loss.append(outputs["loss"].item())
        if self.unseen and self.global_step % JUDGED_EVERY == 0:
            noise, self.label_noise = self.label_noise, 0.0
            self.eval()
            with torch.no_grad():
                self.held_out[self.global_step] = self.objective(self, list(self.unseen)).item()
            self.train()
            self.label_noise = noise

    def configure_optimizers(self) -> Any:
        """The rate is multiplied by the same at every step."""
        optimizer = self.optimizer(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.growth)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Objective = Callable[[Run, list[Tensor]], Tensor]
Fault = Callable[[Run, int], None]


def examples(objective: Objective) -> tuple[Examples, tuple[Tensor, ...]]:
    """Of an objective, to train on and held out."""
    if objective is characters:
        shown, unseen = text()
        return Examples(shown), (unseen,)
    images, labels = digits().tensors
    shown_digits = Examples(images[:1500], labels[:1500])
    return shown_digits, (images[1500:], labels[1500:]) if objective is classes else ()


def classes(run: Run, batch: list[Tensor]) -> Tensor:
    """Which digit it is."""
    return F.cross_entropy(run.net(batch[0]), batch[1])


def characters(run: Run, batch: list[Tensor]) -> Tensor:
    """Which character is next; some of those asked for may be wrong."""
    asked = batch[0][:, 1:].flatten()
    if run.label_noise:
        draw = torch.Generator().manual_seed(run.global_step)
        is_wrong = torch.rand(asked.shape, generator=draw) < run.label_noise
        asked = torch.where(is_wrong, torch.randint(100, asked.shape, generator=draw), asked)
    return F.cross_entropy(run.net(batch[0][:, :-1]).flatten(0, 1), asked)


def likeness(run: Run, batch: list[Tensor], *, stop: bool = True) -> Tensor:
    """Two noisy views of a digit are to have the same features (SimSiam); without stop-gradient all digits end up the
    same.

    Chen & He (2021), arXiv 2011.10566.
    """
    draw = torch.Generator().manual_seed(run.global_step)
    views = [batch[0] + 0.2 * torch.randn(batch[0].shape, generator=draw) for _ in range(2)]
    (a, p), (b, q) = (run.net(view) for view in views)
    if len(run.spread) == run.global_step:  # a monitor may run a batch again
        run.spread.append(F.normalize(a.detach(), dim=-1).std(0).mean().item() * math.sqrt(a.shape[-1]))
    a, b = (a.detach(), b.detach()) if stop else (a, b)
    return -(F.cosine_similarity(p, b).mean() + F.cosine_similarity(q, a).mean()) / 2


def rate_ramp(run: Run, since: int) -> None:
    """The learning rate grows, 300 times in 300 steps."""
    for group in run.trainer.optimizers[0].param_groups:
        group["lr"] = run.rate * 300 ** (since / 300)


def normalisation_off(run: Run, since: int) -> None:
    """No layer is normalised any more."""
    for module in run.modules():
        if isinstance(module, Norm):
            module.off = True


def logit_growth(run: Run, since: int) -> None:
    """Queries and keys grow by 2 % a step, so attention logits by 4 %."""
    for name, parameter in run.named_parameters():
        if ".qkv." in name:
            parameter[:128] *= 1.02


def corrupted_state(run: Run, since: int) -> None:
    """The second moments of one matrix are lost before every step."""
    optimizer, matrix = run.trainer.optimizers[0], run.net.get_parameter("blocks.2.mlp.0.weight")
    optimizer.state[matrix]["exp_avg_sq"].mul_(1e-4)


def wrong_labels(run: Run, since: int) -> None:
    """More and more of the characters that are asked for are drawn at random, up to a half."""
    run.label_noise = min(0.5, since / 400)


def dead_expert(run: Run, since: int) -> None:
    """No token goes to the first expert of any layer."""
    for module in run.modules():
        if isinstance(module, Experts):
            module.router.bias[0] = -1e4


def overflow(run: Run, since: int) -> None:
    """An MLP runs in half precision, and its last matrix grows by 5 % a step."""
    layer = run.net.get_submodule("blocks.2.mlp")
    assert isinstance(layer, Rounded)
    layer.half_precision = True
    run.net.get_parameter("blocks.2.mlp.2.weight").mul_(1.05)


def stuck_shard(run: Run, since: int) -> None:
    """The loader gives the same 32 windows of text again and again."""
    run.data.shard = 32


@dataclass(frozen=True)
class Case:
    """Trainings of one kind.

    Attributes:
        what: It is.
        make: One of them.
        healthy: The kind that it is compared with; its own where it is healthy itself.
        steps: Of each.
    """

    what: str
    make: Callable[[], Run]
    healthy: str
    steps: int = STEPS

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is meant to go wrong."""
        return self.what == self.healthy


FAULTS: dict[str, Fault] = {
    "rate ramp": rate_ramp,
    "normalisation off": normalisation_off,
    "attention logits grow": logit_growth,
    "optimizer state corrupted": corrupted_state,
    "labels corrupted": wrong_labels,
    "half precision overflows": overflow,
    "data shard stuck": stuck_shard,
}
# A rate that grows of itself does so tenfold in about nine hundred steps.
CASES = [
    Case("GPT", lambda: Run(gpt(), characters), "GPT"),
    *(Case(f"GPT, {what}", lambda f=fault: Run(gpt(), characters, fault=f), "GPT") for what, fault in FAULTS.items()),  # type: ignore[misc]
    Case("experts", lambda: Run(gpt_of_experts(), characters), "experts"),
    Case("experts, one dead", lambda: Run(gpt_of_experts(), characters, fault=dead_expert), "experts"),
    Case("unnormalised", lambda: Run(writer(nn.Identity), characters), "unnormalised", LONG),
    Case(
        "unnormalised, rate grows",
        lambda: Run(writer(nn.Identity), characters, growth=1.0025),
        "unnormalised",
        LONG,
    ),
    Case("deep MLP", lambda: Run(mlp(8), classes, Adam), "deep MLP", LONG),
    Case("deep MLP, rate grows", lambda: Run(mlp(8), classes, Adam, growth=1.0026), "deep MLP", LONG),
    Case("SimSiam", lambda: Run(Twin(), likeness, rate=1e-4), "SimSiam", LONG),
    Case("SimSiam, no stop-gradient", lambda: Run(Twin(), partial(likeness, stop=False), rate=1e-4), "SimSiam", LONG),
    Case("digits MLP", lambda: Run(mlp(), classes), "digits MLP", LONG),
    Case("conv net", lambda: Run(Convolutions(), classes), "conv net", LONG),
    Case("small transformer", lambda: Run(writer(), characters), "small transformer", LONG),
]


def train(run: Run, steps: int, *monitors: L.Callback, logger: Any = False) -> None:
    """Some steps of a real Trainer."""
    size = 8 if run.objective is characters else 64
    batches = DataLoader(run.data, size, sampler=RandomSampler(run.data, num_samples=steps * size))
    silent: dict[str, Any] = dict.fromkeys(
        ("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
    )
    L.Trainer(**silent, logger=logger, max_steps=steps, callbacks=list(monitors)).fit(run, batches)
