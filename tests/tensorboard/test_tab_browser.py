"""The tab as a person meets it: TensorBoard serves real runs, a real browser opens the tab, and what it shows is what
was written.
"""

import json
import math
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lowrank import Alert, DormantUnitsMonitor, RankMonitor
from lightning_lowrank.analysis.cli import main
from tests.tab import (
    choose,
    chromium,
    keys,
    open_tab,
    renew,
    resize,
    settled,
    tensorboard,
    train,
    value_at,
    wait,
    wait_for_runs,
    write,
    written,
)
from tests.trainings import Adversaries, Classifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning_lowrank"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SITES = ["net.0.weight", "net.2.weight"]
EVIL = "<img src=x onerror=top.owned=1>"
SCRIPT = "<script>top.owned=1</script>"


class Diverging(Classifier):
    """Its loss is NaN from the eleventh batch on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 10 else 1.0)


class Dead(Classifier):
    """Units that no digit reaches."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.net[0].bias.fill_(-50.0)  # type: ignore[operator,union-attr]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real runs, and one whose names are scripts."""
    folder = tmp_path_factory.mktemp("tab") / "logs"
    alerts = [
        Alert(
            "gradient_stable_rank",
            name="low",
            below=1e6,
            for_samples=2,
            warm_up_samples=0,
            warm_up_steps=0,
            actions=["log"],
        )
    ]
    train(
        folder / "calm", RankMonitor(["gradients", "weights", "features"], every_n_steps=1, alerts=alerts, detail="all")
    )
    train(folder / "nan", RankMonitor(["gradients"], every_n_steps=1, detail="all"), Diverging())
    train(folder / "two", RankMonitor(["gradients"], every_n_steps=3, min_size=1, detail="all"), Adversaries(every=2))
    train(folder / "dead", DormantUnitsMonitor(every_n_steps=4, alerts=None), Dead())
    write(
        folder / "zz" / EVIL.replace("/", ""),
        (0, {SCRIPT: 1.0, EVIL: 2.0}),
        (1, {SCRIPT: 1.5, EVIL: 2.5}),
        name=f"q{EVIL}",
    )
    return folder


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    """TensorBoard, with the loader that it has unless told otherwise."""
    with tensorboard(logs) as served:
        wait_for_runs(served, 5)
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """Debian's Chromium."""
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def opened(browser: WebDriver, address: str) -> WebDriver:
    """TensorBoard, with the tab in front."""
    open_tab(browser, address)
    return browser


@pytest.fixture
def page(opened: WebDriver) -> WebDriver:
    """The map as it is at first."""
    renew(opened)
    view(opened, "map")
    return opened


def view(page: WebDriver, name: str) -> str:
    # In one go: the bar is made anew when the window is resized.
    page.execute_script("document.getElementById(arguments[0]).click()", f"view-{name}")
    settled(page)
    return page.find_element(By.ID, "view").text


def only(page: WebDriver, *runs: str) -> None:
    """Some runs, the others away."""
    names = [label.text for label in page.find_elements(By.CSS_SELECTOR, ".runs label")]
    assert set(runs) <= set(names)
    for i, name in enumerate(names):
        box = page.find_element(By.ID, f"run-{i}")
        if box.is_selected() != (name in runs):
            box.click()
            settled(page)


def number(text: str) -> float:
    """The number of "site · step 3 · 1.25 directions"."""
    return float(text.split(" · ")[2].split()[0])


def cell(page: WebDriver, row: int, column: int, rows: int, columns: int) -> ActionChains:
    """A move of the mouse to the middle of a cell of the first heat map."""
    geometry = page.execute_script(
        "const c = document.querySelector('canvas').getBoundingClientRect(); return [c.width, c.height]"
    )
    width, height = geometry
    left = min(230, max(90, width * 0.3))
    top = height - 20 - rows * max(2, min(22, 520 // rows))
    x = left + (column + 0.5) / columns * (width - left - 8)
    y = top + (row + 0.5) * max(2, min(22, 520 // rows))
    canvas = page.find_element(By.CSS_SELECTOR, "canvas")
    return ActionChains(page).move_to_element_with_offset(canvas, round(x - width / 2), round(y - height / 2))


def test_pointing_at_a_cell_gives_the_number_of_the_event_file(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_stable_rank")

    cell(page, 1, 7, rows=2, columns=24).perform()

    text = page.find_element(By.CSS_SELECTOR, ".heat .status").text
    assert text.startswith("net.2.weight · step 7 · ") and page.find_element(By.CSS_SELECTOR, ".tip").text == text
    assert torch.tensor(number(text)) == value_at(logs / "calm", "gradient_stable_rank", "net.2.weight", 7)


def test_clicking_a_cell_shows_the_layers_curve_and_its_spectrum(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "weight_effective_rank")

    cell(page, 0, 13, rows=2, columns=24).click().perform()

    wait(page, lambda: page.find_elements(By.ID, "spectrum"))
    said = page.find_element(By.CSS_SELECTOR, "#curve .status").text
    assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "net.0.weight at step 13"
    assert torch.tensor(float(said.split("calm: ")[1])) == value_at(
        logs / "calm", "weight_effective_rank", "net.0.weight", 13
    )
    assert len(page.find_element(By.CSS_SELECTOR, "#curve polyline").get_attribute("points").split()) == 24
    spectra, known = written(logs / "calm")
    largest = spectra["lowrank_spectrum/weight"][10][known["lowrank_spectrum/weight"]["sites"].index("net.0.weight")][1]
    said = page.find_element(By.CSS_SELECTOR, "#spectrum .status").text
    assert said.startswith("calm, step 10: largest ") and torch.tensor(float(said.split()[-1])) == float(largest)
    assert "Gaussian" in page.find_element(By.CSS_SELECTOR, "#spectrum .legend").text


def test_a_slider_walks_through_the_spectra(page: WebDriver) -> None:
    only(page, "calm")
    choose(page, "quantity", "weight_effective_rank")
    keys(page, Keys.HOME, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.ID, "spectrum-step"))

    page.find_element(By.ID, "spectrum-step").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)

    slider = page.find_element(By.ID, "spectrum-step")
    assert slider.get_attribute("aria-valuetext") == "step 20"
    assert page.find_element(By.CSS_SELECTOR, "#spectrum .status").text.startswith("calm, step 20: largest")


def test_the_keyboard_reaches_every_cell(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_energy_rank")

    said = [
        keys(page, Keys.END, Keys.ARROW_DOWN),
        keys(page, Keys.ARROW_LEFT),
        keys(page, Keys.PAGE_UP),
        keys(page, Keys.HOME),
    ]

    at = [("net.2.weight", 23), ("net.2.weight", 22), ("net.0.weight", 22), ("net.0.weight", 0)]
    assert [text.split(" · ")[:2] for text in said] == [[site, f"step {step}"] for site, step in at]
    assert [number(text) for text in said] == [value_at(logs / "calm", "gradient_energy_rank", *where) for where in at]


def test_what_is_no_number_is_called_so(page: WebDriver) -> None:
    only(page, "nan")
    choose(page, "quantity", "gradient_stable_rank")

    assert " · NaN" in keys(page, Keys.END) and math.isfinite(number(keys(page, Keys.HOME)))


def test_what_was_not_read_is_told_apart_from_nan(page: WebDriver) -> None:
    only(page, "two")
    choose(page, "quantity", "gradient_stable_rank")

    said = [keys(page, Keys.HOME), *(keys(page, Keys.ARROW_RIGHT) for _ in range(6))]

    assert any("not read" in text for text in said) and not any("NaN" in text for text in said)


@pytest.mark.parametrize("sort", ["depth", "value", "change"])
def test_layers_are_sorted_as_asked(sort: str, page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "feature_effective_rank")

    choose(page, "sort", sort)

    shown = [keys(page, Keys.PAGE_UP, Keys.PAGE_UP).split(" · ")[0], keys(page, Keys.PAGE_DOWN).split(" · ")[0]]
    ends = {
        site: [value_at(logs / "calm", "feature_effective_rank", site, step) for step in (0, 23)]
        for site in ("net.0.out", "net.2.out")
    }
    ranks = {
        "depth": list(ends).index,
        "value": lambda s: ends[s][1],
        "change": lambda s: -abs(ends[s][1] / ends[s][0] - 1),
    }
    assert shown == sorted(ends, key=ranks[sort])  # type: ignore[arg-type]


def test_layers_are_found_by_name(page: WebDriver) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_stable_rank")

    page.find_element(By.ID, "filter").send_keys("2.WEI", Keys.TAB)
    settled(page)

    assert keys(page, Keys.PAGE_DOWN, Keys.PAGE_DOWN).startswith("net.2.weight") and "1 layers" in label(page)


def label(page: WebDriver) -> str:
    return str(page.find_element(By.CSS_SELECTOR, "canvas").get_attribute("aria-label"))


def test_a_range_of_steps_is_shown_alone(page: WebDriver) -> None:
    only(page, "calm")

    page.find_element(By.ID, "first").send_keys("5", Keys.TAB)
    settled(page)
    page.find_element(By.ID, "last").send_keys("9", Keys.TAB)
    settled(page)

    assert "5 samples" in label(page)
    assert [keys(page, key).split(" · ")[1] for key in (Keys.HOME, Keys.END)] == ["step 5", "step 9"]


def test_runs_stand_side_by_side(page: WebDriver) -> None:
    only(page, "calm", "nan", "two")
    choose(page, "quantity", "gradient_stable_rank")

    tops = [canvas.location["y"] for canvas in page.find_elements(By.CSS_SELECTOR, "canvas")]

    names = [caption.text for caption in page.find_elements(By.CSS_SELECTOR, ".heat figcaption b")]
    assert names == ["calm", "nan", "two"] and tops[0] == tops[1]


def test_alerts_are_on_the_time_line_and_in_words(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_stable_rank")
    on_map = keys(page, Keys.END)

    text = view(page, "alerts")

    events = EventAccumulator(str(logs / "calm"), size_guidance={"scalars": 0}).Reload().Scalars("lowrank/alert/low")
    firing = [event.step for event in events if event.value == 2]
    assert f"firing from step {firing[0]} to {firing[-1]}" in text and "pending from step 0 to 0" in text
    assert "alert: low firing" in on_map and "Messages of the alerts" in text


def test_the_overview_has_the_four_levels_and_leads_to_the_worst_layers(page: WebDriver, logs: Path) -> None:
    only(page, "calm")

    text = view(page, "overview")

    assert re.findall(r"^(Parameters|Functions|Structure|Subnetworks)$", text, re.M) == [
        "Parameters",
        "Functions",
        "Structure",
        "Subnetworks",
    ]
    assert "gradient spectral norm" not in text
    row = next(r for r in page.find_elements(By.CSS_SELECTOR, "tbody tr") if r.text.startswith("weight stable rank"))
    numbers = [float(cell.text) for cell in row.find_elements(By.CSS_SELECTOR, "td.number")]
    nulls = written(logs / "calm")[1]["lowrank_vector/weight_stable_rank"]["null"]
    assert numbers[2] == pytest.approx(np.median(nulls), rel=1e-3) and row.find_elements(By.CSS_SELECTOR, "svg .null")
    ends = {site: value_at(logs / "calm", "weight_stable_rank", site, 23) for site in SITES}
    worst = row.find_element(By.CSS_SELECTOR, "button.link")
    lowest = min(ends, key=ends.__getitem__)
    assert worst.text.startswith(lowest) and math.isclose(float(worst.text.split()[-1]), ends[lowest], rel_tol=1e-3)
    worst.click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#details h2"))
    assert page.find_element(By.CSS_SELECTOR, "#details h2").text == f"{lowest} at step 23"


def test_the_tab_opens_on_what_is_wrong_with_the_curve_beside_it(opened: WebDriver) -> None:
    renew(opened)
    only(opened, "calm", "nan", "zz/" + EVIL)

    sections = {s.find_element(By.TAG_NAME, "h2").text: s for s in opened.find_elements(By.CSS_SELECTOR, ".diagnosis")}

    assert "Nothing to report" in sections["calm"].text and "Not checked" in sections["calm"].text
    assert "diverged · whole model: no number" in sections["nan"].text and "Since step 10" in sections["nan"].text
    assert sections["zz/" + EVIL].find_elements(By.CSS_SELECTOR, ".findings li, img, script") == []


def test_a_finding_leads_to_its_layer(page: WebDriver, logs: Path) -> None:
    only(page, "dead")

    text = view(page, "diagnosis")
    curve = page.find_element(By.CSS_SELECTOR, ".findings svg polyline").get_attribute("points")
    page.find_element(By.CSS_SELECTOR, ".findings button.link").click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#details h2"))

    assert "critical" in text and "dead units · net.1: a share of 1 of its units" in text
    assert curve is not None and len(curve.split()) == 6
    assert page.find_element(By.CSS_SELECTOR, "#details h2").text == "net.1 at step 20"


def test_the_map_opens_on_effective_ranks_of_weights_as_multiples_of_the_first(page: WebDriver) -> None:
    assert page.find_element(By.ID, "quantity").get_attribute("value") == "weight_effective_rank"
    assert page.find_element(By.ID, "shade").get_attribute("value") == "change"
    assert "times the layer's first; light: 1" in page.find_element(By.CSS_SELECTOR, "main > .legend").text


def test_layers_are_folded_by_block_and_a_block_opens(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "weight_stable_rank")

    choose(page, "fold", "blocks")
    folded = keys(page, Keys.END, Keys.PAGE_DOWN)
    page.find_element(By.CSS_SELECTOR, "canvas").send_keys(Keys.ENTER)
    settled(page)
    wait(page, lambda: page.find_element(By.ID, "fold").get_attribute("value") == "layers")

    ends = [value_at(logs / "calm", "weight_stable_rank", site, 23) for site in SITES]
    assert folded.startswith("net.2 · step 23 · ") and number(folded) == pytest.approx(ends[1], rel=1e-6)
    assert keys(page, Keys.END).split(" · ")[0] == "net.2.weight" and "1 layers" in label(page)


def test_runs_have_the_colours_of_time_series(page: WebDriver, address: str) -> None:
    own = page.execute_script(
        "return [...document.querySelectorAll('.runs label')].map((e) => "
        "[e.textContent, getComputedStyle(e.querySelector('.key')).borderTopColor])"
    )

    page.switch_to.default_content()
    page.get("about:blank")
    page.get(f"{address}/#timeseries")
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".run-color-swatch")) == len(own))
    theirs = page.execute_script(
        "return [...document.querySelectorAll('.run-color-swatch')].map((e) => "
        "[e.closest('tb-data-table-content-row').innerText.trim(), getComputedStyle(e).backgroundColor])"
    )
    open_tab(page, address)

    assert dict(theirs) == dict(own) and len({colour for _, colour in own}) == 5


def test_quantities_are_found_by_a_word_and_say_what_they_are(page: WebDriver) -> None:
    page.find_element(By.ID, "search").send_keys("stable rank")

    options = [o.get_attribute("value") for o in page.find_elements(By.CSS_SELECTOR, "#quantity option")]

    assert set(options) == {f"{s}_stable_rank" for s in ("gradient", "weight", "feature")} | {"weight_effective_rank"}
    says = page.find_element(By.ID, "says")
    assert "Exponential of the entropy of the singular values" in says.text and "Rounding raises it" in says.text
    link = says.find_element(By.TAG_NAME, "a").get_attribute("href") or ""
    assert link.endswith("/monitors/rank/")


# axe-core does not look at the words of charts, this does.
CONTRAST = Path(__file__).with_name("contrast.js").read_text()
# In one go, since the tab may reload itself in between.
PICK = """
const canvas = document.querySelector("canvas");
for (const key of ["End", "Enter"]) canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
"""
# Words of charts that are larger than the page's.
LARGE = """
return [...document.querySelectorAll("svg text")].filter((e) => e.getBoundingClientRect().height > 17)
  .map((e) => e.textContent);
"""
AXE = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
WCAG = """
const done = arguments[0], tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"];
const told = ({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html} ${failureSummary}`);
axe.run(document, { runOnly: { type: "tag", values: tags } }).then(({ violations }) => done(violations.flatMap(told)));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_follows_wcag_and_fits_at_any_size(theme: str, opened: WebDriver) -> None:
    renew(opened)
    opened.execute_script(f"{AXE}; window.axe = axe")
    only(opened, "calm", "dead", "nan")
    if theme == "dark":
        opened.execute_script("top.document.body.classList.add('dark-mode')")
    broken, wide, large = {}, {}, {}

    for width, height in ((1400, 900), (800, 600), (390, 844)):
        resize(opened, width, height)
        for name in ("diagnosis", "overview", "alerts", "cost", "map"):
            view(opened, name)
            if name == "map":
                opened.execute_script(PICK)
                wait(opened, lambda: opened.find_elements(By.ID, "spectrum"))
            over = opened.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            large |= {(name, word): width for word in opened.execute_script(LARGE)}
            found = opened.execute_script(CONTRAST) + opened.execute_async_script(WCAG)
            broken |= {(name, line): width for line in found}
            wide |= {(name, width): over} if over > 0 else {}
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # type: ignore[attr-defined]

    assert broken == {} and wide == {} and large == {}


def test_what_watching_cost_is_shown(page: WebDriver, logs: Path) -> None:
    only(page, "calm")

    view(page, "cost")

    figure = page.find_element(By.ID, "cost-overhead_percent")
    vectors, known = written(logs / "calm")
    percent = vectors["lowrank_cost/rank"][23][known["lowrank_cost/rank"]["sites"].index("overhead_percent")]
    assert math.isclose(float(re.findall(r"calm: (\S+)", figure.text)[0]), percent, rel_tol=1e-3)


def sheet(page: WebDriver, button: str) -> list[list[str]]:
    """What a button would download."""
    page.execute_script(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return 'blob:null'; }"
    )
    page.execute_script(
        "document.addEventListener('click', (e) => e.target.tagName === 'A' && e.preventDefault(), true)"
    )
    page.find_element(By.CSS_SELECTOR, button).click()
    wait(page, lambda: page.execute_script("return window.saved"))
    return [
        line.split(",")
        for line in page.execute_script("const text = window.saved; delete window.saved; return text").splitlines()
    ]


def test_what_is_shown_can_be_taken_along(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_stable_rank")

    lines = sheet(page, "#csv")

    assert lines[0] == ["run", "step", *SITES] and len(lines) == 25
    assert torch.tensor(float(lines[8][2])) == value_at(logs / "calm", "gradient_stable_rank", SITES[0], 7)


def test_every_view_can_be_taken_along(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "weight_effective_rank")
    keys(page, Keys.END, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.ID, "spectrum"))

    curve, spectra = sheet(page, "#curve figcaption button"), sheet(page, "#spectrum figcaption button")
    others = {}
    for name in ("diagnosis", "overview", "alerts", "cost"):
        view(page, name)
        others[name] = sheet(page, "#csv")

    assert curve[0] == ["run", "step", SITES[0]] and curve[24][:2] == ["calm", "23"]
    assert len(curve) == 49 and {row[0] for row in curve[25:]} == {"Gaussian matrix of that shape"}
    assert torch.tensor(float(curve[24][2])) == value_at(logs / "calm", "weight_effective_rank", SITES[0], 23)
    largest = written(logs / "calm")[0]["lowrank_spectrum/weight"][20][0, 1]
    assert [row[3] for row in spectra if row[:3] == ["calm", "20", "1"]] == [str(largest)]
    assert ["parameters", "weight_effective_rank", "calm", SITES[0], curve[1][2], curve[24][2]] in others["overview"]
    assert ["calm", "low", "pending", "0", "0"] in others["alerts"]
    assert others["diagnosis"][0][:4] == ["run", "rule", "severity", "site"]
    assert [row[1] for row in others["cost"][1:25]] == ["overhead_percent"] * 24


def test_pointing_at_a_curve_reads_it_out(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "weight_stable_rank")
    keys(page, Keys.HOME, Keys.ENTER)
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#curve svg"))

    ActionChains(page).move_to_element(page.find_element(By.CSS_SELECTOR, "#curve svg")).perform()

    step, said, *_ = page.find_element(By.CSS_SELECTOR, "#curve .tip").text.splitlines()
    value = value_at(logs / "calm", "weight_stable_rank", SITES[0], int(step.removeprefix("step ")))
    assert 8 < int(step.removeprefix("step ")) < 15 and float(said.removeprefix("calm: ")) == pytest.approx(
        value, rel=1e-3
    )


def test_a_layer_that_was_picked_comes_into_sight(page: WebDriver) -> None:
    choose(page, "quantity", "weight_effective_rank")
    page.execute_script("window.scrollTo(0, 0); document.querySelector('.maps').style.minHeight = '1500px'")

    keys(page, Keys.END, Keys.ENTER)

    bottom = "return document.querySelector('#details').getBoundingClientRect().bottom - window.innerHeight"
    wait(page, lambda: page.find_elements(By.ID, "spectrum") and page.execute_script(bottom) < 1)


def test_what_fits_nothing_says_so(page: WebDriver) -> None:
    only(page, "calm")

    page.find_element(By.ID, "filter").send_keys("nothing like it")
    settled(page)
    without_layers = page.find_element(By.CSS_SELECTOR, ".heat").text
    page.find_element(By.ID, "filter").send_keys(Keys.CONTROL, "a", Keys.DELETE)
    page.find_element(By.ID, "first").send_keys("1000", Keys.TAB)
    settled(page)
    without_samples = page.find_element(By.CSS_SELECTOR, ".heat").text
    page.find_element(By.ID, "run-0").click()
    settled(page)

    assert "No layer has that in its name." in without_layers and "No sample between these steps." in without_samples
    assert page.find_element(By.ID, "view").text == "No run is chosen: tick one above."


def test_the_map_is_there_as_a_table_too(page: WebDriver, logs: Path) -> None:
    only(page, "calm")
    choose(page, "quantity", "gradient_stable_rank")

    page.find_element(By.CSS_SELECTOR, "#words summary").click()

    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#words td"))
    row = page.find_element(By.CSS_SELECTOR, "#words tbody tr").text.split()
    ends = [value_at(logs / "calm", "gradient_stable_rank", SITES[0], step) for step in (0, 23)]
    assert row[:2] == [SITES[0], "calm"] and [float(value) for value in row[2:4]] == pytest.approx(ends, rel=1e-3)


def test_every_control_has_a_name(page: WebDriver) -> None:
    controls = "[...document.querySelectorAll('button, select, input, canvas')]"
    name = "e.getAttribute('aria-label') || e.textContent || e.labels?.[0]?.textContent"

    names = page.execute_script(f"return {controls}.map((e) => {name})")

    assert len(names) > 10 and all(name and name.strip() for name in names)


def test_it_is_dark_where_tensorboard_is(page: WebDriver) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(paper)

    page.execute_script("top.document.body.classList.add('dark-mode')")

    wait(page, lambda: page.execute_script(paper) != light)
    assert light == "rgb(255, 255, 255)" and page.execute_script(paper) == "rgb(48, 48, 48)"


def test_nothing_is_fetched_from_another_host_and_nothing_goes_wrong(page: WebDriver, address: str) -> None:
    page.get_log("browser")  # what was before

    for name in ("diagnosis", "overview", "alerts", "cost", "map"):
        view(page, name)

    fetched = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert fetched and all(name.startswith(address) for name in fetched)
    assert [
        entry for entry in page.get_log("browser") if entry["level"] == "SEVERE" and "lowrank" in entry["message"]
    ] == []


def test_names_that_are_scripts_are_only_shown(page: WebDriver) -> None:
    only(page, "zz/" + EVIL)
    choose(page, "quantity", f"q{EVIL}")

    shown = keys(page, Keys.END, Keys.ENTER), view(page, "overview")
    view(page, "map")
    page.find_element(By.CSS_SELECTOR, "#words summary").click()

    assert SCRIPT in shown[0] and page.find_elements(By.CSS_SELECTOR, "img, main script") == []
    assert SCRIPT in page.find_element(By.ID, "words").text
    assert page.execute_script("return top.owned === undefined && window.owned === undefined")


@pytest.mark.parametrize("fast", ["true", "false"], ids=["RustBoard", "Python"])
def test_both_loaders_show_the_same(fast: str, browser: WebDriver, logs: Path) -> None:
    with tensorboard(logs, "--load_fast", fast) as served:
        wait_for_runs(served, 5)
        open_tab(browser, served)
        view(browser, "map")
        only(browser, "calm")
        choose(browser, "quantity", "weight_stable_rank")
        said = keys(browser, Keys.END, Keys.ARROW_DOWN)

    assert torch.tensor(number(said)) == value_at(logs / "calm", "weight_stable_rank", SITES[1], 23)


def test_the_page_of_a_coordinate_check_draws_powers_of_the_width_as_slopes(
    browser: WebDriver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["coordinate-check", "benchmarks.coordinate:mlp_standard", "--widths", "32,64,128", "--seeds", "1"]
    main([*command, "--json", "--output", str(tmp_path / "widths.html")])
    layers = json.loads(capsys.readouterr().out)
    rises = [math.log(row["own"]["means"]["128"] / row["own"]["means"]["32"]) for row in layers.values()]

    browser.switch_to.default_content()
    browser.get(f"file://{tmp_path}/widths.html")
    figure, *others = browser.find_elements(By.CSS_SELECTOR, "figure")
    lines = [line.get_attribute("points").split() for line in figure.find_elements(By.CSS_SELECTOR, "polyline")]
    pixels = [float(line[0].split(",")[1]) - float(line[-1].split(",")[1]) for line in lines]
    scale = sum(pixels) / sum(rises)

    assert pixels == pytest.approx([scale * rise for rise in rises], abs=0.5) and scale > 0
    assert len(others) == 6 and {len(line) for line in lines} == {3}
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr")]
    for row, (name, layer) in zip(rows, layers.items(), strict=True):
        assert row.startswith(f"{name} {layer['verdict']} {layer['own']['power']:.2f}")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_report_is_the_same_without_a_server(browser: WebDriver, logs: Path, tmp_path: Path) -> None:
    main(["report", str(logs), "-o", str(tmp_path / "report.html")])

    browser.switch_to.default_content()
    browser.get(f"file://{tmp_path}/report.html")
    settled(browser)
    view(browser, "map")
    only(browser, "calm")
    choose(browser, "quantity", "weight_effective_rank")
    said = keys(browser, Keys.END, Keys.ENTER)

    wait(browser, lambda: browser.find_elements(By.ID, "spectrum"))
    assert torch.tensor(number(said)) == value_at(logs / "calm", "weight_effective_rank", SITES[0], 23)
    assert "step 20: largest" in browser.find_element(By.CSS_SELECTOR, "#spectrum .status").text
    for name in ("diagnosis", "overview", "alerts", "cost"):
        assert "cannot be shown" not in view(browser, name)
    assert browser.execute_script("return performance.getEntriesByType('resource').length + (window.owned ?? 0)") == 0
    assert json.dumps(EVIL)[1:-1] not in (tmp_path / "report.html").read_text()
