"""Photograph the tab of TensorBoard: real runs of the demo's transformer, served and opened in headless Chromium.

    python -m docs.images.draw_tab

Trains for some minutes, unless the runs are there already. It takes chromium and chromedriver.
"""

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
from lightning_lowrank import LossMonitor, RankMonitor
from tests.tab import chromium, open_tab, settled, tensorboard, wait, wait_for_runs


class Transformer(CharTransformer):
    """The demo's, with a learning rate of one's choice."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__(vocabulary=100)
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def train(folder: Path, learning_rate: float, max_steps: int) -> None:
    """One run, watched."""
    L.seed_everything(0, verbose=False)
    batches = DataLoader(TensorDataset(standard_library()), 32, shuffle=True, drop_last=True)
    statistics = ["effective_rank", "stable_rank", "participation_ratio", "spectral_norm"]
    monitor = RankMonitor(["gradients", "weights", "updates", "features"], statistics, every_n_steps=5)
    logger = TensorBoardLogger(folder.parent, folder.name, version="")
    L.Trainer(max_steps=max_steps, callbacks=[monitor, LossMonitor(5)], logger=logger, enable_checkpointing=False).fit(
        Transformer(learning_rate), batches
    )


def photograph(page: WebDriver, picture: Path) -> None:
    """The first view; and the map of one quantity, with the curve and the spectra of one layer below."""
    page.save_screenshot(str(picture.with_name("diagnosis.png")))
    page.find_element(By.ID, "view-map").click()
    settled(page)
    Select(page.find_element(By.ID, "quantity")).select_by_value("weight_effective_rank")
    settled(page)
    page.find_element(By.CSS_SELECTOR, "canvas").send_keys(Keys.END, *[Keys.ARROW_DOWN] * 16, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.ID, "spectrum"))
    page.execute_script("window.scrollTo(0, 0)")
    settled(page)
    page.save_screenshot(str(picture))


def main(runs: Path = Path("runs/tab"), output: Path = Path("docs/images/tab.png"), max_steps: int = 200) -> None:
    """Train where there is no run yet, then open the tab.

    Args:
        runs: Where the runs are.
        output: The picture of the map; that of the first view lies beside it.
        max_steps: Of each run.
    """
    for learning_rate in (1e-3, 1e-2, 3e-2):
        folder = runs / f"lr {learning_rate:g}"
        if not folder.exists():
            train(folder, learning_rate, max_steps)
    with TemporaryDirectory() as profile, tensorboard(runs) as address, chromium(Path(profile)) as page:
        page.set_window_size(1400, 1330)
        wait_for_runs(address, 3)
        open_tab(page, address)
        photograph(page, output)


if __name__ == "__main__":
    auto_cli(main)
