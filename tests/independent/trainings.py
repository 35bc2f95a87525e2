"""Four small models, each trained once with all monitors at work, and what a plain callback saw of the same steps."""

import inspect
import string
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import (
    ActivationMonitor,
    AttentionMonitor,
    ConcentrationMonitor,
    CoordinateCheckMonitor,
    CurvatureMonitor,
    DormantUnitsMonitor,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    NTKMonitor,
    RankMonitor,
    RouterMonitor,
    TrajectorySubspace,
)
from tests.trainings import QUIET, digits

STEPS, BATCH = 6, 8
# Of curvature and kernels, whose references are dense matrices.
SPARSE = 3
TOKENS, LENGTH = 32, 6

SOURCES = (
    *("gradients", "weights", "updates", "displacement", "optimizer_state"),
    *("features", "centred_features", "validation_features"),
)
STATISTICS = (
    *("energy_rank", "energy_rank_0.01", "stable_rank", "effective_rank", "effective_rank_energy"),
    *("participation_ratio", "numerical_rank", "nuclear_to_spectral", "schatten_quasi_norm_0.5", "spectral_norm"),
    *("frobenius_norm", "tail_exponent", "tail_exponent_fit", "marchenko_pastur_outliers"),
    *("relative_energy_rank", "relative_stable_rank", "relative_effective_rank", "relative_effective_rank_energy"),
    *("relative_participation_ratio", "relative_numerical_rank", "relative_nuclear_to_spectral"),
    *("relative_schatten_quasi_norm_0.5", "relative_spectral_norm"),
    *("weight_ratio", "spectrum_drift", "subspace_overlap", "subspace_overlap_chance"),
)


class ConvNext(nn.Module):
    """A stem, a depthwise convolution, and linear layers on four axes with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(1, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.reshape(-1, 1, 8, 8))
        y = self.norm(self.depthwise(x).movedim(1, -1))
        x = x.movedim(1, -1) + self.down(self.act(self.up(y)))
        return self.head(x.mean((1, 2)))


class Recurrent(nn.Module):
    """An LSTM over the rows of images, and a hidden layer of ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden, self.act = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 32), nn.ReLU()
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(self.lstm(x.view(-1, 8, 8))[0][:, -1])))


class Text(nn.Module):
    """A decoder of transformers, and a head that is its own."""

    def __init__(self, decoder: nn.Module, width: int) -> None:
        super().__init__()
        self.decoder, self.head = decoder, nn.Linear(width, TOKENS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(input_ids=x, use_cache=False).last_hidden_state)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": TOKENS}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"bos_token_id": 0, "eos_token_id": 0}
    return Text(GPT2Model(GPT2Config(**sizes, **still, attn_implementation="eager")), 16)


def llama() -> nn.Module:
    """Four heads of queries, two of keys and values."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    config = LlamaConfig(**sizes, **heads, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    return Text(LlamaModel(config), 16)


def text(rows: int) -> TensorDataset:
    """Characters of Python's own `string.py`, and the next one of each."""
    letters = torch.tensor([ord(letter) % TOKENS for letter in inspect.getsource(string)])
    cut = letters[: rows * (LENGTH + 1)].view(rows, LENGTH + 1)
    return TensorDataset(cut[:, :-1], cut[:, 1:])


def pictures(rows: int) -> TensorDataset:
    """Digits, some of them twice in a batch."""
    images, labels = digits(3 * rows).tensors
    return TensorDataset(images[::3], labels[::3])


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and of which of its parameters curvature and kernel are.

    Attributes:
        scalars: Whether its optimizer is gradient descent with one rate.
        curved: Patterns of parameters for curvature, so that dense matrices stay small.
        activations: Layers whose outputs are units.
        blocks: Layers between which sizes are read.
        kernel: Of `NTKMonitor`, with the number of examples.
    """

    net: Callable[[], nn.Module]
    data: Callable[[int], TensorDataset]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    curved: list[str]
    activations: list[str]
    blocks: list[str]
    level: str = "full"
    kernel: tuple[str, int] = ("class_summed", 8)


CASES = {
    "ConvNeXt": Case(
        ConvNext,
        pictures,
        lambda p: torch.optim.SGD(p, lr=0.3),
        ["*"],
        ["net.act"],
        ["net.up", "net.down"],
        "full",
        ("full", 6),
    ),
    "GPT-2": Case(
        gpt2,
        text,
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        ["*attn.c_proj*", "*ln_2*", "*attn.c_attn.bias"],
        ["net.decoder.h.0.mlp.act"],
        ["net.decoder.h.0", "net.decoder.h.0.mlp.c_fc", "net.decoder.h.0.mlp.c_proj"],
        "standard",
        ("class_summed", 2),
    ),
    "Llama": Case(
        llama,
        text,
        lambda p: torch.optim.Adam(p, lr=1e-2),
        ["*self_attn*"],
        ["net.decoder.layers.0.mlp.act_fn"],
        ["net.decoder.layers.0"],
        "standard",
        ("sum_of_logits", 8),
    ),
    "LSTM": Case(
        Recurrent,
        pictures,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        ["*lstm.weight_ih*", "*lstm.bias*"],
        ["net.act"],
        ["net.hidden", "net.head"],
        "standard",
        ("class_summed", 8),
    ),
}


class Module(L.LightningModule):
    """Cross-entropy of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.net = case, case.net()

    def loss(self, batch: list[Tensor]) -> Tensor:
        logits = self.net(batch[0])
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[1].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validation loss", self.loss(batch))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.case.data(STEPS * BATCH), batch_size=BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.case.data(2 * BATCH), batch_size=BATCH)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.case.optimizer(self.parameters())


def monitors(case: Case) -> list[Monitor]:
    """All of them, with everything that they log."""
    everything: dict[str, Any] = {"detail": "all", "per_site": True, "alerts": None}
    often, seldom = everything | {"every_n_steps": 1}, everything | {"every_n_steps": SPARSE}
    operators = ["hessian", "gauss_newton", "empirical_fisher", "monte_carlo_fisher"]
    kernel, examples = case.kernel
    return [
        RankMonitor(SOURCES, STATISTICS, **often),
        GradientAnatomyMonitor(**often),
        ConcentrationMonitor(["module", "head", "neuron", "direction"] if _has_heads(case) else OF_ANY, **often),
        DormantUnitsMonitor(match=case.activations, **often),
        ActivationMonitor(match=case.blocks, **often),
        RouterMonitor(match="net.head", top_k=2, capacity=1.0, **often),
        CoordinateCheckMonitor(**often),
        *([AttentionMonitor(**often)] if _has_heads(case) else []),
        MultifractalMonitor(**often),
        MultifractalMonitor("neuromfa", **often),
        TrajectorySubspace(max_snapshots=8, **often),
        CurvatureMonitor(case.level, operators, top_k=3, match=case.curved, **seldom),
        CurvatureMonitor("light", match=case.curved, name="light", **seldom),
        NTKMonitor(kernel=kernel, num_examples=examples, num_outputs=TOKENS, **seldom),
    ]


OF_ANY = ["module", "neuron", "direction"]


def _has_heads(case: Case) -> bool:
    return case.data is text


@dataclass
class Step:
    """One step as a plain callback saw it."""

    batch: list[Tensor]
    before: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Recorder(L.Callback):
    """Copies of batches, weights, gradients and optimizer state."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(Step([part.clone() for part in batch], weights(module)))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.steps[-1].gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, state = self.steps[-1], trainer.optimizers[0].state
        step.after = weights(module)
        step.moments = {
            name: {key: kept.clone() for key, kept in state[p].items() if isinstance(kept, Tensor)}
            for name, p in module.named_parameters()
        }


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@dataclass(frozen=True)
class Run:
    """What a training left behind.

    Attributes:
        logged: Tag -> numbers in the order of the samples, read from the event file.
        declared: Names of all quantities that the monitors say they measure, by label.
    """

    name: str
    case: Case
    module: Module
    steps: list[Step]
    logged: dict[str, dict[int, float]]
    declared: dict[str, list[str]]

    def at(self, values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Module:
        """The module with some weights."""
        module = deepcopy(self.module).to(dtype)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(values[name])
        return module

    def parameters(self) -> list[str]:
        """Those of curvature."""
        from fnmatch import fnmatch

        names = [name for name, _ in self.module.named_parameters()]
        return [name for name in names if any(fnmatch(name, pattern) for pattern in self.case.curved)]


@cache
def run(name: str) -> Run:
    """Train one model, once in a process."""
    case = CASES[name]
    L.seed_everything(5, verbose=False)
    module, recorder, watching = Module(case), Recorder(), monitors(case)
    with TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        options = QUIET | {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 1}
        L.Trainer(**options, logger=logger, callbacks=[recorder, *watching]).fit(module)
        declared = {
            monitor.label: [q for recorder in monitor.recorders for q in recorder.quantities] for monitor in watching
        }
        return Run(name, case, module, recorder.steps, events(Path(logger.log_dir)), declared)


def events(folder: Path) -> dict[str, dict[int, float]]:
    """All scalars of an event file, by tag and step."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    scalars = accumulator.Tags()["scalars"]
    found = {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in scalars}
    for tag in (tag for tag in accumulator.Tags()["tensors"] if not tag.startswith("lowrank")):
        for event in accumulator.Tensors(tag):
            if event.tensor_proto.float_val:
                found.setdefault(tag, {})[event.step] = float(np.float32(event.tensor_proto.float_val[0]))
    return found
