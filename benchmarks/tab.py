"""What the tab of TensorBoard costs: writing its vectors, beside one scalar per site; and how soon a large run is on
the screen.

    python -m benchmarks.tab

The second table needs chromium and chromedriver.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from lightning_lowrank.reports.loggers import write as write_report
from lightning_lowrank.reports.vectors import Row, Vectors

QUANTITIES = 8
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *("--disable-component-update", "--disable-sync", "--window-size=1400,1100"),
)

Write = Callable[[TensorBoardLogger, int], object]


def names(num_layers: int) -> list[str]:
    """Layers as long models have them."""
    return [f"model.layers.{i // 4}.attention.{'qkvo'[i % 4]}_proj.weight" for i in range(num_layers)]


def quantities(num_layers: int, step: int) -> list[Row]:
    """A sample of every quantity."""
    draws = np.random.default_rng(step)
    sites = names(num_layers)
    return [
        Row("vector", f"gradient_quantity_{i}", dict(zip(sites, draws.uniform(1, 50, num_layers), strict=True)))
        for i in range(QUANTITIES)
    ]


def spectrum(num_layers: int, step: int) -> list[Row]:
    """A sample of spectra."""
    draws = np.random.default_rng(step)
    sites = names(num_layers)
    shapes = [(512, 512)] * num_layers
    return [
        Row("spectrum", "gradient", dict(zip(sites, draws.uniform(0, 1, (num_layers, 33)), strict=True)), shapes=shapes)
    ]


def written(write: Write, samples: int) -> tuple[float, float, float, float]:
    """Milliseconds, those of the CPU and kB of a sample, with the event file flushed; and kB that the first one has
    beyond that.
    """
    times, worked, sizes = [], [], []
    with TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder, name="", version="")
        logger.experiment.flush()
        (file,) = Path(folder).glob("events.*")
        for step in range(samples):
            before = file.stat().st_size
            begin, work = time.perf_counter(), time.process_time()
            write(logger, step)
            times.append(time.perf_counter() - begin)
            worked.append(time.process_time() - work)
            sizes.append((file.stat().st_size - before) / 1000)
        logger.experiment.close()
    usual = median(sizes[1:])
    return 1000 * median(times[1:]), 1000 * median(worked[1:]), usual, sizes[0] - usual


def writing(num_layers: int, samples: int) -> Table:
    """The first table."""
    vectors, spectra = Vectors(), Vectors()
    made = {step: (quantities(num_layers, step), spectrum(num_layers, step)) for step in range(samples)}
    scalars = {
        step: {f"{row.name}/{site}": float(v) for row in rows for site, v in row.values.items()}
        for step, (rows, _) in made.items()
    }
    cases: dict[str, Write] = {
        f"{QUANTITIES} vectors": lambda logger, step: write_report(
            [logger], {}, step, [vectors.draw(made[step][0], step)]
        ),
        f"{QUANTITIES * num_layers:,} single scalars": lambda logger, step: write_report([logger], scalars[step], step),
        "spectra of one source": lambda logger, step: (
            [write_report([logger], {}, i, [spectra.draw(made[step][1], i)]) for i in range(10)] and None
        ),
    }
    table = Table(title=f"{num_layers} layers x {QUANTITIES} quantities, medians of {samples} samples")
    for heading in ("written", "ms per sample", "of it CPU", "kB per sample", "kB once"):
        table.add_column(heading, justify="left" if heading == "written" else "right")
    for what, write in cases.items():
        table.add_row(what, *(f"{value:,.1f}" for value in written(write, samples)))
    table.caption = "A row of spectra stands for ten samples: every tenth has them."
    return table


@contextmanager
def served(folder: str) -> Iterator[str]:
    """TensorBoard at an address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", "0"]
    with (Path(folder) / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            found = None
            while found is None:
                time.sleep(0.2)
                found = re.search(r"http://127\.0\.0\.1:\d+", (Path(folder) / "said.txt").read_text())
            time.sleep(10)  # while it reads the event file
            yield found[0]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def browser(profile: str) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or ""))
    try:
        yield page
    finally:
        page.quit()


def seconds_to_paint(page: webdriver.Chrome) -> float:
    """From the beginning of loading the tab to its first view, drawn."""
    WebDriverWait(page, 60).until(
        lambda p: p.execute_script("return performance.getEntriesByName('lowrank-painted').length")
    )
    return float(page.execute_script("return performance.getEntriesByName('lowrank-painted')[0].startTime")) / 1000


def seconds_of(page: webdriver.Chrome, act: str, claim: str) -> float:
    """From a deed of the user to the frame after that in which it shows."""
    shown = f"requestAnimationFrame(({claim}) ? () => done(performance.now() - begin) : wait)"
    script = f"const begin = performance.now(), done = arguments[0], wait = () => {shown}; {act}; wait();"
    return float(page.execute_async_script(script)) / 1000


def deeds(page: webdriver.Chrome) -> list[float]:
    """The map, another quantity, another order, one letter of a filter, a layer picked."""
    change = (
        "const e = document.getElementById('{0}'); e.value = '{1}'; e.dispatchEvent(new "
        "Event('{2}', {{bubbles: true}}))"
    )
    drawn = "document.querySelector('#view').getAttribute('aria-busy') === 'false'"
    enter = "document.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))"
    return [
        seconds_of(page, "document.getElementById('view-map').click()", drawn),
        seconds_of(page, change.format("quantity", "gradient_quantity_5", "change"), drawn),
        seconds_of(page, change.format("sort", "change", "change"), drawn),
        seconds_of(page, change.format("filter", "v", "input"), drawn),
        seconds_of(page, enter, "document.querySelector('#curve')"),
    ]


def showing(num_layers: int, samples: int, repeats: int) -> Table:
    """The second table."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as profile:
        logger, vectors = TensorBoardLogger(folder, name="run", version=""), Vectors()
        for step in range(samples):
            write_report([logger], {}, step, [vectors.draw(quantities(num_layers, step), step)])
        logger.experiment.close()
        with served(folder) as address, browser(profile) as page:
            page.get(f"{address}/#lowrank")
            WebDriverWait(page, 60).until(lambda p: p.find_elements(By.CSS_SELECTOR, "iframe"))
            times, acted = [], []
            for _ in range(repeats):
                page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe"))
                times.append(seconds_to_paint(page))
                acted.append(deeds(page))
                page.switch_to.default_content()
                page.execute_script("document.querySelector('iframe').contentWindow.location.reload()")
                time.sleep(1)
    table = Table(title=f"{num_layers} layers x {samples:,} samples x {QUANTITIES} quantities, in headless Chromium")
    for heading in (
        "first paint",
        "again, median",
        "again, worst",
        "the map",
        "another quantity",
        "sorted",
        "filtered",
        "a layer's curve",
    ):
        table.add_column(heading, justify="right")
    taken = [median(of_deed) for of_deed in zip(*acted, strict=True)]
    table.add_row(*(f"{value:.2f} s" for value in (times[0], median(times[1:]), max(times[1:]), *taken)))
    return table


def main(
    num_layers: int = 200, samples: int = 50, shown_layers: int = 400, shown_samples: int = 2000, repeats: int = 6
) -> None:
    """Print the tables.

    Args:
        num_layers: Of the model that is written.
        samples: That are written.
        shown_layers: Of the run that is shown.
        shown_samples: That it has.
        repeats: Times that it is shown.
    """
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(writing(num_layers, samples))
    if shutil.which("chromium") and shutil.which("chromedriver"):
        console.print(showing(shown_layers, shown_samples, repeats))
    else:
        console.print("chromium and chromedriver are not here: nothing is shown")


if __name__ == "__main__":
    auto_cli(main)
