"""What the tab shows of curves that were made by hand: bands, nulls, what is no number, alerts, nothing at all."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from lightning_lowrank.reports.loggers import write as write_report
from lightning_lowrank.reports.vectors import Row, Vectors
from tests.tab import choose, chromium, keys, open_tab, renew, settled, tensorboard, wait, wait_for_runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

KNOWN = {"source": "s", "level": "functions", "statistic": "rank", "unit": "directions"}
PIXELS = """
const canvas = document.querySelector("canvas"), [x, y, w, h] = arguments;
const box = canvas.getBoundingClientRect(), left = Math.min(230, Math.max(90, box.width * 0.3)), top = 11;
const [across, down] = [box.width - left - 8, box.height - 20 - top];
const [begin, high] = y < 0 ? [0, h] : [top + y * down, h * down];
const { data } = canvas.getContext("2d").getImageData(left + x * across, begin, w * across, high);
const found = new Set();
for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) found.add(String(data.slice(i, i + 3)));
return [...found].map((colour) => colour.split(",").map(Number));
"""
LATE = """
const real = window.fetch;
window.fetch = (...all) => new Promise((go) => setTimeout(() => go(real(...all)), 1500));
"""
HATCHED, FIRING = [150, 150, 150], [212, 33, 61]


def rows(step: int) -> list[Row]:
    """A sample: a rank with an error and a chance level, one far below its chance, one that is lost, a spectrum."""
    numbers = {
        "near_rank": {"a": 4.0 + step, "b": 1.0},
        "near_rank_error": {"a": 0.5, "b": 0.1},
        "near_rank_chance": {"a": 6.0, "b": 6.0},
        "far_rank": {"a": 1.0 + step / 10, "b": 1.0},
        "far_rank_floor": {"a": 900.0, "b": 900.0},
        "lost": {"a": 1.0 if step < 10 else math.nan, "b": 1.0},
        "whole": {"whole model": 1.0 + step},
    }
    spectra = {"a": np.array([9.0, 8.0, 3.0 - step / 10]), "b": np.array([2.0, 1.0, 1.0])}
    return [
        *(Row("vector", name, values, KNOWN) for name, values in numbers.items()),
        Row("spectrum", "s", spectra, KNOWN, [(2, 2), (2, 2)]),
        Row("alert", "m", {"rule": 2.0 if step > 17 else 0.0}),
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, browser: WebDriver) -> Iterator[WebDriver]:
    folder = tmp_path_factory.mktemp("states") / "logs"
    logger, vectors = TensorBoardLogger(folder, name="run", version=""), Vectors()
    for step in range(20):
        assert write_report([logger], {}, step, [vectors.draw(rows(step), step)]) == []
    logger.experiment.close()
    with tensorboard(folder) as served:
        wait_for_runs(served)
        open_tab(browser, served)
        yield browser


@pytest.fixture
def page(opened: WebDriver) -> WebDriver:
    """The map as it is at first."""
    renew(opened)
    opened.find_element(By.ID, "view-map").click()
    settled(opened)
    return opened


def picked(page: WebDriver, quantity: str, *pressed: str) -> WebDriver:
    """The curve of a layer."""
    choose(page, "quantity", quantity)
    keys(page, *pressed, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#curve polyline"))
    return page


def pixels(page: WebDriver, x: float, y: float, width: float, height: float) -> list[list[int]]:
    """Colours of a part of the heat map, in shares of the cells; above them where y is negative, in pixels."""
    return list(page.execute_script(PIXELS, x, y, width, height))


def test_errors_are_bands_and_chance_is_dashed_and_neither_is_a_quantity(page: WebDriver) -> None:
    picked(page, "near_rank", Keys.HOME)

    names = [option.get_attribute("value") for option in page.find_elements(By.CSS_SELECTOR, "#quantity option")]
    dashed = page.find_elements(By.CSS_SELECTOR, "#curve polyline[stroke-dasharray]")
    assert set(names) == {"near_rank", "far_rank", "lost", "whole"}
    assert len(page.find_elements(By.CSS_SELECTOR, "#curve polygon.band")) == 1 and len(dashed) == 1
    assert "run: chance" in page.find_element(By.CSS_SELECTOR, "#curve .legend").text


def test_a_null_that_is_far_away_is_told_and_does_not_flatten_the_curve(page: WebDriver) -> None:
    picked(page, "far_rank", Keys.HOME)

    points = page.find_element(By.CSS_SELECTOR, "#curve polyline").get_attribute("points") or ""
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert max(heights) - min(heights) > 100
    assert "run: floor: 900, off this axis" in page.find_element(By.CSS_SELECTOR, "#curve .legend").text


def test_a_number_of_the_whole_model_shows_its_curve_at_once(page: WebDriver) -> None:
    choose(page, "quantity", "whole")

    assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "whole model at step 19"
    assert len((page.find_element(By.CSS_SELECTOR, "#curve polyline").get_attribute("points") or "").split()) == 20


def test_a_sample_shows_the_nearest_spectrum_and_says_its_step(page: WebDriver) -> None:
    picked(page, "near_rank", Keys.HOME, *[Keys.ARROW_RIGHT] * 7)

    assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "a at step 7"
    assert "step 10" in page.find_element(By.CSS_SELECTOR, "#spectrum .legend").text


def test_what_is_no_number_is_hatched_grey_and_alerts_are_red(page: WebDriver) -> None:
    choose(page, "quantity", "lost")

    known, lost = pixels(page, 0.1, 0.1, 0.3, 0.3), pixels(page, 0.6, 0.1, 0.3, 0.3)
    assert HATCHED not in known and HATCHED in lost and min(map(max, lost)) < 90 < min(map(max, known))
    assert pixels(page, 0.95, -1, 0.01, 3) == [FIRING] and FIRING not in pixels(page, 0.5, -1, 0.01, 3)


def test_four_levels_draw_each_median_beside_its_null(page: WebDriver) -> None:
    page.find_element(By.ID, "view-overview").click()
    settled(page)

    rows = {row.find_element(By.TAG_NAME, "th").text: row for row in page.find_elements(By.CSS_SELECTOR, "tbody tr")}
    numbers = [cell.text for cell in rows["near rank"].find_elements(By.CSS_SELECTOR, "td.number")]
    assert set(rows) == {"near rank", "far rank"} and numbers == ["2.5", "12", "6"]
    assert (
        rows["far rank"].find_element(By.CSS_SELECTOR, "svg").get_attribute("aria-label")
        == "1.95, at first 1, null 900"
    )


def test_a_view_that_is_late_is_a_word_and_no_data(page: WebDriver) -> None:
    page.execute_script(LATE)

    page.find_element(By.ID, "view-cost").click()
    page.find_element(By.ID, "view-alerts").click()

    wait(page, lambda: page.find_element(By.ID, "view").text == "Loading …")
    assert page.find_elements(By.CSS_SELECTOR, "#view canvas, #view svg") == []
    settled(page)
    assert "rule" in page.find_element(By.ID, "view").text


def test_an_empty_folder_shows_the_three_lines_of_a_first_curve(browser: WebDriver, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()

    with tensorboard(tmp_path / "logs") as served:
        open_tab(browser, served)
        text = browser.find_element(By.ID, "first-lines").text

    assert len(text.splitlines()) == 3 and "callbacks=[RankMonitor()]" in text
