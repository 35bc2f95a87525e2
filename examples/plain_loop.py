"""Watch a training loop of your own, without Lightning's Trainer: a small GPT on the text of the standard library.

    python examples/plain_loop.py --max_steps 200

The loop is plain PyTorch, in the manner of nanoGPT: accumulation, clipping, a learning rate that is set by hand. What
watching adds to it are the lines that begin with `watch` and the two `with` statements.
"""

import math
import sysconfig
from collections import Counter
from pathlib import Path

import rich
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lowrank import CurvatureMonitor, RankMonitor, summary_table, watching

CONTEXT, VOCABULARY = 64, 100


class Block(nn.Module):
    """Attention, then an MLP, each on top of what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(-2, -4).unbind(-2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).movedim(-3, -2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Gives the loss of predicting the next character."""

    def __init__(self, depth: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text[:, :-1]) + self.positions.weight[: text.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def tokens() -> Tensor:
    """Python's own modules as numbers of their most frequent characters."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    index = {character: i for i, (character, _) in enumerate(Counter(text).most_common(VOCABULARY))}
    return torch.tensor([index[character] for character in text if character in index])


def main(max_steps: int = 200, batch_size: int = 16, accumulate: int = 2, log_dir: Path = Path("runs")) -> None:
    """Train, then say what was seen.

    Args:
        max_steps: Optimizer steps; the default takes about a minute on two cores.
        batch_size: Windows of text in a micro-batch.
        accumulate: Micro-batches of a step.
        log_dir: Where TensorBoard will find the curves.
    """
    torch.manual_seed(0)
    text, draws = tokens(), torch.Generator().manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    monitors = [RankMonitor(), CurvatureMonitor(loss_fn=lambda model, batch: model(batch))]
    loggers = [TensorBoardLogger(log_dir, "plain_loop")]

    with watching(model, optimizer, *monitors, loggers=loggers) as watch:
        for step in range(max_steps):
            optimizer.param_groups[0]["lr"] = (
                1e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / max_steps)) / 2
            )
            for micro in range(accumulate):
                starts = torch.randint(len(text) - CONTEXT, (batch_size, 1), generator=draws)
                batch = text[starts + torch.arange(CONTEXT + 1)]
                with watch.batch(batch):
                    loss = watch.loss(model(batch))
                    (loss / accumulate).backward()
                    if micro == accumulate - 1:
                        watch.gradients()  # before they are clipped
                        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
            if step % 50 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
            if watch.should_stop:  # an alert may ask for it
                break

    for monitor in monitors:
        rich.print(summary_table(monitor))
    print(f"Open the curves with: tensorboard --logdir {log_dir}")


if __name__ == "__main__":
    auto_cli(main)
