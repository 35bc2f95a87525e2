"""Curves of a sample in the tab, multifractal spectra and densities of eigenvalues: a real run, TensorBoard, a real
browser.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from lightning_lowrank import CurvatureMonitor, Monitor, MultifractalMonitor
from tests.tab import choose, chromium, keys, open_tab, settled, tensorboard, train, wait, wait_for_runs
from tests.trainings import Classifier, mlp

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@contextmanager
def first_site(folder: Path, monitor: Monitor, module: L.LightningModule, quantity: str) -> Iterator[WebDriver]:
    """The tab, with the first layer of a quantity at the first step."""
    train(folder / "logs" / "run", monitor, module)
    with tensorboard(folder / "logs") as address, chromium(folder / "profile") as page:
        wait_for_runs(address)
        open_tab(page, address)
        page.find_element(By.ID, "view-map").click()
        settled(page)
        choose(page, "quantity", quantity)
        keys(page, Keys.HOME, Keys.ENTER)
        wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".details figure + figure polyline"))
        yield page
        assert not [
            entry for entry in page.get_log("browser") if entry["level"] == "SEVERE" and "lowrank" in entry["message"]
        ]


def lengths(page: WebDriver, figure: str) -> list[int]:
    """Points of each line of a figure."""
    return [
        len(line.get_attribute("points").split()) for line in page.find_elements(By.CSS_SELECTOR, f"#{figure} polyline")
    ]


def legend(page: WebDriver, figure: str) -> list[str]:
    return [entry.text for entry in page.find_elements(By.CSS_SELECTOR, f"#{figure} .legend > span")]


def test_a_layer_shows_its_spectrum_at_every_sample_and_the_fits_of_the_chosen_one(tmp_path: Path) -> None:
    monitor = MultifractalMonitor(every_n_steps=8, exclude="*.4.weight", detail="all")

    with first_site(tmp_path, monitor, Classifier(mlp()), "multifractal_dispersion") as page:
        assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "net.0.weight.in at step 0"
        assert lengths(page, "f") == [31, 31, 31]
        assert legend(page, "f") == legend(page, "dimensions") == ["step 0"]
        assert lengths(page, "partition") == 4 * [24, 2]
        assert legend(page, "partition") == ["q = -2", "q = -1", "q = 1", "q = 2"]
        assert lengths(page, "dimensions") == [24, 24, 24]


def test_the_density_of_eigenvalues_is_drawn_for_every_sample(tmp_path: Path) -> None:
    monitor = CurvatureMonitor("full", ["hessian"], every_n_steps=8, detail="all")

    with first_site(tmp_path, monitor, Classifier(), "hessian_trace") as page:
        assert page.find_element(By.CSS_SELECTOR, "#density b").text == "Density of the eigenvalues"
        assert len(lengths(page, "density")) >= 3
