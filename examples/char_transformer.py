"""Watch a small transformer learn to write Python from the text of the standard library.

    python examples/char_transformer.py --max_steps 400

The model knows nothing of lightning_lowrank: the callback in `main` is all that watching takes.
"""

import os
import sys
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import rich
import torch
from einops import rearrange
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lowrank import summary_table, watch_all
from lightning_lowrank.analysis.diagnosing import diagnose

CONTEXT = 64


class Block(nn.Module):
    """Attention, then an MLP, each on top of what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "batch time (qkv head d) -> qkv batch head time d", qkv=3, head=self.heads)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(heads, "batch head time d -> batch time (head d)"))
        return x + self.mlp(self.mlp_norm(x))


class CharTransformer(L.LightningModule):
    """Predicts the next character."""

    def __init__(self, vocabulary: int, *, depth: int = 4, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (text,) = batch
        logits = self(text[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def source_code() -> str:
    """Python's own modules, one behind the other."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


def frequent_characters(vocabulary: int = 100) -> dict[str, int]:
    """The most frequent characters of Python's own modules, numbered."""
    return {character: i for i, (character, _) in enumerate(Counter(source_code()).most_common(vocabulary))}


def standard_library(vocabulary: int = 100) -> Tensor:
    """Windows of `CONTEXT + 1` characters from Python's own modules; what is not among the most frequent characters is
    left out.
    """
    index = frequent_characters(vocabulary)
    tokens = torch.tensor([index[character] for character in source_code() if character in index])
    return tokens.unfold(0, CONTEXT + 1, CONTEXT)


def main(max_steps: int = 400, batch_size: int = 32, log_dir: Path = Path("runs")) -> None:
    """Train, then say what was seen.

    Args:
        max_steps: How long; the default takes about a minute on two cores.
        batch_size: Windows of text in a batch.
        log_dir: Where TensorBoard will find the curves.
    """
    L.seed_everything(0, verbose=False)
    # The text is in memory: worker processes would only copy it.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    windows = TensorDataset(standard_library())
    batches = DataLoader(windows, batch_size, shuffle=True, drop_last=True)

    monitors = watch_all(detail="standard")
    logger = TensorBoardLogger(log_dir, "char_transformer")
    trainer = L.Trainer(max_steps=max_steps, callbacks=[*monitors], logger=logger)
    trainer.fit(CharTransformer(vocabulary=100), batches)

    logger.finalize("success")
    rich.print(summary_table(monitors[0]))
    diagnose([logger.log_dir])
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    print(f"Open the curves with:\n\n    {tensorboard} --logdir {log_dir}\n")


if __name__ == "__main__":
    auto_cli(main)
