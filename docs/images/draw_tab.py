"""Photograph the tab of TensorBoard: real runs, served and opened in headless Chromium.

    python -m docs.images.draw_tab                # the pictures of the docs
    python -m docs.images.draw_tab --looks looks  # every view of five kinds of runs, at three sizes, light and dark

Trains for some minutes, unless the runs are there already. It takes chromium and chromedriver.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select
from torch.utils.data import DataLoader, TensorDataset

from examples.char_transformer import CharTransformer, standard_library
from lightning_lowrank import LossMonitor, RankMonitor, watch_all
from tests.tab import chromium, open_tab, resize, settled, tensorboard, wait, wait_for_runs

RATES = (1e-3, 1e-2, 3e-2)
SIZES = ((1400, 900), (800, 600), (390, 844))
# In one go: the bar is made anew when the tab reloads itself.
CLICK = "document.getElementById(arguments[0]).click();"
TICK = "const box = document.getElementById(arguments[0]); if (box.checked !== arguments[1]) box.click();"
VIEWS = ("diagnosis", "map", "overview", "alerts", "cost")


class Transformer(CharTransformer):
    """The demo's, with a learning rate of one's choice; its loss is NaN from a step on."""

    def __init__(self, learning_rate: float, nan_from: int | None = None) -> None:
        super().__init__(vocabulary=100)
        self.learning_rate, self.nan_from = learning_rate, nan_from

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = super().training_step(batch)
        return loss if self.nan_from is None or self.global_step < self.nan_from else loss * float("nan")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Deep(L.LightningModule):
    """A residual network of 100 blocks with four layers each, which tells vowels from other characters."""

    def __init__(self) -> None:
        super().__init__()
        width = 16
        self.embed = torch.nn.Embedding(100, width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(width, width) for name in ("query", "key", "up", "down")})
            for _ in range(100)
        )

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        text = batch[0][:, :33]
        x = self.embed(text[:, :-1])
        for block in self.blocks:
            assert isinstance(block, torch.nn.ModuleDict)
            x = x + block["query"](x) * block["key"](x).tanh() / 10
            x = x + block["down"](torch.relu(block["up"](x))) / 10
        loss = torch.nn.functional.cross_entropy((x @ self.embed.weight.T).flatten(0, 1), text[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def dense() -> list[L.Callback]:
    """Few quantities at many steps, as the pictures of the docs have them."""
    statistics = ["effective_rank", "stable_rank", "participation_ratio", "spectral_norm"]
    return [RankMonitor(["gradients", "weights", "updates", "features"], statistics, every_n_steps=5), LossMonitor(5)]


# Run -> model, callbacks, steps.
Training = tuple[Callable[[], L.LightningModule], Callable[[], list[L.Callback]], int]
DOCS: dict[str, Training] = {f"lr {rate:g}": (lambda rate=rate: Transformer(rate), dense, 200) for rate in RATES}
LOOKS: dict[str, Training] = {
    "healthy": (lambda: Transformer(3e-3), lambda: [*watch_all()], 300),
    "diverged": (lambda: Transformer(1.0), lambda: [*watch_all()], 300),
    "nan": (lambda: Transformer(3e-3, nan_from=160), lambda: [*watch_all()], 300),
    "three-samples": (lambda: Transformer(3e-3), lambda: [RankMonitor(every_n_steps=50)], 120),
    "400-layers": (Deep, lambda: [RankMonitor(every_n_steps=10)], 200),
}


def train(folder: Path, trainings: dict[str, Training]) -> None:
    """Those runs that are not there yet."""
    batches = DataLoader(TensorDataset(standard_library()), 8, shuffle=True, drop_last=True)
    for name, (model, callbacks, max_steps) in trainings.items():
        if not (folder / name).exists():
            L.seed_everything(0, verbose=False)
            logger = TensorBoardLogger(folder, name, version="")
            options = {"max_steps": max_steps, "logger": logger, "enable_checkpointing": False}
            L.Trainer(accelerator="cpu", callbacks=callbacks(), **options).fit(model(), batches)


def go(page: WebDriver, view: str) -> None:
    page.execute_script(CLICK, f"view-{view}")
    settled(page)


def photograph(page: WebDriver, folder: Path) -> None:
    """The first view; and the map of one quantity, with the curve and the spectra of one layer below."""
    page.set_window_size(1400, 900)
    page.save_screenshot(str(folder / "diagnosis.png"))
    page.set_window_size(1400, 1330)
    go(page, "map")
    Select(page.find_element(By.ID, "quantity")).select_by_value("weight_effective_rank")
    settled(page)
    page.find_element(By.CSS_SELECTOR, "canvas").send_keys(Keys.END, *[Keys.ARROW_DOWN] * 16, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.ID, "spectrum"))
    page.execute_script("window.scrollTo(0, 0)")
    settled(page)
    page.save_screenshot(str(folder / "tab.png"))


def look(page: WebDriver, folder: Path) -> None:
    """Every view, one run after the other; of the map also what is below it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [label.text for label in page.find_elements(By.CSS_SELECTOR, ".runs label")]
    for (width, height), dark in product(SIZES, (False, True)):
        resize(page, width, height)
        page.execute_script(f"top.document.body.classList.toggle('dark-mode', {str(dark).lower()})")
        for name, view in product(names, VIEWS):
            for i, other in enumerate(names):
                page.execute_script(TICK, f"run-{i}", other == name)
                settled(page)
            go(page, view)
            picture = f"{width}_{'dark' if dark else 'light'}_{name}_{view}"
            page.save_screenshot(str(folder / f"{picture}.png"))
            if view == "map":
                page.find_element(By.CSS_SELECTOR, "canvas").send_keys(Keys.END, *[Keys.ARROW_DOWN] * 3, Keys.ENTER)
                settled(page)
                page.save_screenshot(str(folder / f"{picture}_picked.png"))


def shown(runs: Path, count: int, act: Callable[[WebDriver, Path], None], output: Path) -> None:
    """Do something with the tab that shows some runs."""
    with TemporaryDirectory() as profile, tensorboard(runs) as address, chromium(Path(profile)) as page:
        page.set_window_size(1400, 1330)
        wait_for_runs(address, count)
        open_tab(page, address)
        act(page, output)


def main(runs: Path = Path("runs"), output: Path = Path("docs/images"), looks: Path | None = None) -> None:
    """Train where there is no run yet, then open the tab.

    Args:
        runs: Where the runs are, in `tab` and `looks`.
        output: Where `tab.png` and `diagnosis.png` of the docs are written.
        looks: Where the pictures of everything are written, instead of those.
    """
    if looks is None:
        train(runs / "tab", DOCS)
        shown(runs / "tab", len(DOCS), photograph, output)
    else:
        train(runs / "looks", LOOKS)
        shown(runs / "looks", len(LOOKS), look, looks)


if __name__ == "__main__":
    auto_cli(main)
