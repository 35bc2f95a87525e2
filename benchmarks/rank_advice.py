"""Are advised ranks better than uniform ones? LoRA under a budget, at ranks advised, uniform, or drawn at random.

python -m benchmarks.rank_advice minilm    # MiniLM sorts docstrings by package: 25 minutes on one core
python -m benchmarks.rank_advice char      # a char transformer of Python's sources goes on with its manual: 5 minutes

A short run of full fine-tuning advises; then LoRA of the same number of parameters learns at each of five rates.
"""

import argparse
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any, Protocol

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from benchmarks.galore_losses import Text
from benchmarks.lora import SILENT, Whole
from examples.char_transformer import CONTEXT, frequent_characters, standard_library
from examples.fine_tuning import docstring_tokens
from lightning_lowrank import LoRA, RankAdvice, RankAdvisor

WAYS = ("updates", "uniform", "random", "gradients")
ADVISING_STEPS = 30


class Judged(Protocol):
    """A module that can be judged."""

    def accuracy(self, data: TensorDataset) -> float:
        """Share of what was held out that it has right."""


@dataclass(frozen=True)
class Task:
    """What is fine-tuned.

    Attributes:
        title: Of the table.
        module: As it is before, with a learning rate.
        data: What it is fine-tuned on, and what is held out.
        batch_size: Of a step.
        steps: Of each run.
        match: Weights that may get ranks.
        exclude: The same, taken away.
        rates: Of LoRA.
        advising_rate: Of the run that advises.
        budgets: Numbers of uniform rank 1 and 4.
    """

    title: str
    module: Callable[[float], L.LightningModule]
    data: tuple[Dataset[Any], TensorDataset]
    batch_size: int
    steps: int
    match: str
    exclude: str | None
    rates: Sequence[float]
    advising_rate: float
    budgets: tuple[int, int]

    def fit(self, module: L.LightningModule, callback: L.Callback, steps: int) -> None:
        """Train."""
        loader = DataLoader(self.data[0], self.batch_size, shuffle=True, drop_last=True)
        L.Trainer(max_steps=steps, callbacks=[callback], **SILENT).fit(module, loader)

    def advisor(self) -> RankAdvisor:
        """That has seen a short run of full fine-tuning."""
        L.seed_everything(0, verbose=False)
        found = RankAdvisor(max(self.budgets), least=0, match=self.match, exclude=self.exclude)
        self.fit(self.module(self.advising_rate), found, ADVISING_STEPS)
        return found

    def learned(self, ranks: Mapping[str, int], rate: float, seed: int) -> float:
        """Accuracy on what was held out."""
        L.seed_everything(seed, verbose=False)
        module: Any = self.module(rate)
        self.fit(module, LoRA(ranks, every_n_steps=10**6, seed=seed), self.steps)
        return float(module.accuracy(self.data[1]))


class Continued(Text):
    """The char transformer, which has learnt Python's sources."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.load_state_dict(pretrained())

    @torch.no_grad()
    def accuracy(self, data: TensorDataset) -> float:
        """Share of next characters that are the likeliest."""
        self.eval()
        hits = [self(text[:, :-1]).argmax(-1) == text[:, 1:] for (text,) in DataLoader(data, 64)]
        return torch.cat(hits).double().mean().item()


@cache
def pretrained(steps: int = 600) -> dict[str, Tensor]:
    """Weights of a char transformer after some steps on Python's sources."""
    L.seed_everything(0, verbose=False)
    module = Text(3e-3)
    loader = DataLoader(TensorDataset(standard_library()), 32, shuffle=True, drop_last=True)
    L.Trainer(max_steps=steps, **SILENT).fit(module, loader)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def manual() -> Tensor:
    """Windows of Python's own manual, which is English."""
    from pydoc_data.topics import topics

    index = frequent_characters()
    tokens = torch.tensor([index[character] for text in topics.values() for character in text if character in index])
    return tokens.unfold(0, CONTEXT + 1, CONTEXT)


def char_transformer() -> Task:
    """On Python's manual."""
    text = manual()
    held, train = random_split(TensorDataset(text), [512, len(text) - 512], torch.Generator().manual_seed(0))
    parts = train, TensorDataset(text[held.indices])
    rates = (3e-3, 1e-2, 2e-2, 3e-2, 6e-2)
    title = "Char transformer, two blocks of width 64, from Python's sources to its manual"
    return Task(title, Continued, parts, 32, 150, "blocks.*.weight", "*norm*", rates, 1e-3, (2_048, 8_192))


def minilm() -> Task:
    """On docstrings by package."""
    data = docstring_tokens(100)
    held, train = random_split(data, [0.3, 0.7], torch.Generator().manual_seed(0))
    parts = train, TensorDataset(*data[held.indices])
    rates = (1e-3, 3e-3, 5.5e-3, 1e-2, 2e-2)
    match, exclude = "minilm.encoder.*.weight", "*LayerNorm*"
    return Task("MiniLM", Whole, parts, 16, 45, match, exclude, rates, 1e-4, (41_472, 165_888))


TASKS: dict[str, Callable[[], Task]] = {"minilm": minilm, "char": char_transformer}


def at_random(advice: RankAdvice, seed: int) -> dict[str, int]:
    """Ranks of the same cost at most: one direction after the other to a weight that is drawn."""
    draw, spent = random.Random(seed), 0
    ranks = dict.fromkeys(advice.ranks, 0)
    names = list(ranks)
    while True:
        name = draw.choice(names)
        spent += advice.energies[name].cost("lora")
        if spent > advice.budget:
            return {name: rank for name, rank in ranks.items() if rank}
        ranks[name] += 1


def measured(task: Task, budgets: Sequence[int], words: Sequence[str], seeds: int, console: Console) -> Table:
    """Accuracy by budget, ranks and rate; seed by seed, so that what is broken off says something."""
    seen = task.advisor()
    by_updates = {budget: seen.advise(budget) for budget in budgets}
    by_gradients = {budget: seen.advise(budget, by="gradients") for budget in budgets}
    console.print(*by_updates.values(), *by_gradients.values())

    def ranks(way: tuple[int, str], seed: int) -> Mapping[str, int]:
        budget, word = way
        advice = by_updates[budget]
        drawn = at_random(advice, seed)
        return {"updates": advice.patterns, "gradients": by_gradients[budget].patterns, "random": drawn}.get(
            word, advice.uniform
        )

    ways = [(budget, word) for budget in budgets for word in words]
    found: dict[tuple[int, str], dict[float, list[float]]] = {way: {rate: [] for rate in task.rates} for way in ways}
    for seed in range(seeds):
        for way in ways:
            for rate in task.rates:
                found[way][rate].append(task.learned(ranks(way, seed), rate, seed))
            print(time.strftime("%X"), seed, way, found[way], file=sys.stderr, flush=True)
    title = f"{task.title}: {task.steps} steps, {seeds} seeds, {len(task.data[1])} held out: accuracy"
    rates = [f"{rate:g}" for rate in task.rates]
    table = Table("parameters", "ranks", "energy of the update", *rates, "at the best", title=title)
    for way in ways:
        advice, taken = by_updates[way[0]], ranks(way, 0)
        best = max(found[way].values(), key=mean)
        cells = [f"{mean(each):.3f}" for each in found[way].values()]
        cost, share = advice.cost_of(taken), advice.captured(taken)
        table.add_row(f"{cost}", way[1], f"{share:.2f}", *cells, ", ".join(f"{one:.3f}" for one in best))
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="char")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budgets", nargs="+", type=int, default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_lowrank").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    task, console = TASKS[options.task](), Console(width=120)
    console.print(measured(task, options.budgets or task.budgets, options.ways, options.seeds, console))


if __name__ == "__main__":
    main()
