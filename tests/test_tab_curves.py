"""Curves of a sample in the tab, multifractal spectra and densities of eigenvalues: a real run, TensorBoard, a real browser."""

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from lightning_lowrank import CurvatureMonitor, MultifractalMonitor
from tests.models import Classifier
from tests.tab import chromium, open_tab, tensorboard, train, wait, wait_for_runs
from tests.test_multifractal_monitor import mlp
from tests.test_tab_browser import choose, keys

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


def test_a_layer_shows_its_spectrum_at_every_sample(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", MultifractalMonitor(every_n_steps=8, exclude="*.4.weight"), Classifier(mlp()))

    with tensorboard(tmp_path / "logs") as address, chromium(tmp_path / "profile") as page:
        wait_for_runs(address)
        open_tab(page, address)
        choose(page, "quantity", "multifractal_dispersion")
        keys(page, Keys.HOME, Keys.ENTER)
        wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#pairs polyline"))

        assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "net.0.weight.in at step 0"
        lines = page.find_elements(By.CSS_SELECTOR, "#pairs polyline")
        assert [len(line.get_attribute("points").split()) for line in lines] == [31, 31, 31]
        assert page.find_element(By.CSS_SELECTOR, "#pairs .legend").text == "step 0"
        assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE" and "lowrank" in entry["message"]]


def test_the_density_of_eigenvalues_is_drawn_for_every_sample(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", CurvatureMonitor("full", ["hessian"], every_n_steps=8), Classifier())

    with tensorboard(tmp_path / "logs") as address, chromium(tmp_path / "profile") as page:
        wait_for_runs(address)
        open_tab(page, address)
        choose(page, "quantity", "hessian_trace")
        keys(page, Keys.HOME, Keys.ENTER)
        wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#pairs polyline"))

        assert page.find_element(By.CSS_SELECTOR, "#pairs b").text == "Density of the eigenvalues"
        assert len(page.find_elements(By.CSS_SELECTOR, "#pairs polyline")) >= 3
