"""What `LoRA` takes beside peft, and what it learns: steps, memory, merged inference, and accuracy by init and rate.

python -m benchmarks.lora              # time and memory
python -m benchmarks.lora --learn      # MiniLM on docstrings: each init at each rate, three seeds
"""

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import mean, median
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset, random_split

from examples.fine_tuning import Sorter, docstring_tokens
from lightning_lowrank import LoRA

RANK = 8
INITS = ("default", "pissa", "olora", "orthogonal", "eva")
RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (1e-4, 3e-4, 1e-3)
SILENT: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
    "accelerator": "cpu",
}
# All linear layers of a block of BERT.
LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


class Whole(Sorter):
    """MiniLM and a head, all of which trains."""

    def __init__(self, rate: float) -> None:
        super().__init__(partial(torch.optim.AdamW, lr=rate))
        self.minilm.requires_grad_(True)

    def accuracy(self, tokens: TensorDataset) -> float:
        """Share of docstrings that are sorted rightly."""
        self.eval()
        with torch.no_grad():
            hits = [self.logits(ids, mask).argmax(1) == labels for ids, mask, labels in DataLoader(tokens, 128)]
        return torch.cat(hits).double().mean().item()

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of each package."""
        states = self.minilm(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def made(kind: str) -> Whole:
    """MiniLM as it is adapted by each."""
    torch.manual_seed(0)
    module = Whole(1e-3)
    if kind == "LoRA":
        LoRA(RANK, match=[f"minilm.*{name}.weight" for name in LINEAR]).prepare(module)
    if kind == "peft":
        module.minilm = get_peft_model(module.minilm, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEAR))
    return module


def stepping(module: Whole, batch: list[Tensor]) -> Callable[[], None]:
    """A training step."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module.logits(batch[0], batch[1]), batch[2]).backward()
        optimizer.step()

    return step


def in_turn(works: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median milliseconds of each, all in turn, after a first that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            found[name].append(1000 * (time.perf_counter() - begun))
    return {name: median(values[1:]) for name, values in found.items()}


def peak(module: Whole, batch: list[Tensor]) -> float:
    """Most memory that a training step allocates above what was held before it, in MB, by torch's profiler."""
    step = stepping(module, batch)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) / 1e6


def costs(times: int) -> Table:
    """Time and memory of a step, and of inference."""
    batch = [t[:16] for t in docstring_tokens(4).tensors]
    modules = {kind: made(kind) for kind in ("LoRA", "peft", "full")}
    steps = in_turn({kind: stepping(copy.deepcopy(m), batch) for kind, m in modules.items()}, times)
    peaks = {kind: peak(copy.deepcopy(m), batch) for kind, m in modules.items()}
    called = {kind: copy.deepcopy(m).eval() for kind, m in modules.items() if kind != "peft"}
    called["LoRA, merged"] = merged = copy.deepcopy(modules["LoRA"]).eval()
    LoRA.merge(merged)
    with torch.no_grad():
        calls = in_turn({kind: partial(m.logits, *batch[:2]) for kind, m in called.items()}, times)
    table = Table("", "step, ms", "peak, MB", "inference, ms", title=f"MiniLM, rank {RANK}, 16 docstrings of 24 tokens")
    for kind in ("LoRA", "LoRA, merged", "peft", "full"):
        table.add_row(kind, *(f"{found[kind]:.1f}" if kind in found else "" for found in (steps, peaks, calls)))
    return table


def learned(kind: str, rate: float, seed: int, steps: int) -> float:
    """Accuracy on docstrings that were held out."""
    L.seed_everything(seed, verbose=False)
    data = docstring_tokens(100)
    held, train = random_split(data, [0.3, 0.7], torch.Generator().manual_seed(0))
    module = Whole(rate)
    lora: list[L.Callback] = [] if kind == "full" else [LoRA(RANK, init=kind, every_n_steps=10**6, seed=seed)]
    loader = DataLoader(train, 16, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, callbacks=lora, **SILENT).fit(module, loader)
    return module.accuracy(TensorDataset(*data[held.indices]))


def learning(steps: int, seeds: int, console: Console) -> None:
    """Accuracy of each init at each rate; one at which the first seed learns little is not run again."""
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(seeds):
        for kind in (*INITS, "full"):
            rates = FULL_RATES if kind == "full" else RATES
            least = max((found[kind, rate][0] for rate in rates), default=0.0) / 2 if seed else 0.0
            for rate in rates:
                some = found.setdefault((kind, rate), [])
                if seed == 0 or some[0] > least:
                    some.append(learned(kind, rate, seed, steps))
                    console.print(f"{kind} {rate:g}: {mean(some):.3f}  {', '.join(f'{x:.3f}' for x in some)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, default=30)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(width=120)
    if options.learn:
        learning(options.steps, options.seeds, console)
    else:
        console.print(costs(options.times))


if __name__ == "__main__":
    main()
