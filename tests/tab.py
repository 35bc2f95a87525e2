"""What the tests of the tab share: runs to show, a TensorBoard that serves them, a browser that looks at it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from lightning_lowrank import Monitor
from lightning_lowrank.reports.loggers import write as write_report
from lightning_lowrank.reports.vectors import Row, Vectors
from tests.trainings import Classifier

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

# Tag -> step -> vector, as it is in the event files.
Written = dict[str, dict[int, NDArray[np.float32]]]


def train(folder: Path, monitor: Monitor, module: L.LightningModule | None = None, **options: Any) -> None:
    """A real run, with its event file in the folder."""
    torch.manual_seed(0)
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 3,
    }
    logger = TensorBoardLogger(folder.parent, name=folder.name, version="")
    L.Trainer(logger=logger, callbacks=[monitor], **(quiet | options)).fit(module or Classifier())


def written(folder: Path) -> tuple[Written, dict[str, dict[str, Any]]]:
    """Vectors by quantity, and what belongs to each: read with TensorBoard's own reader, by nothing of ours."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("lowrank_")]
    known = {tag: json.loads(events.SummaryMetadata(tag).plugin_data.content) for tag in tags}
    vectors = {tag: {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)} for tag in tags}
    return {tag.rpartition("/")[0]: vectors[tag] for tag in tags}, {tag.rpartition("/")[0]: known[tag] for tag in tags}


def value_at(folder: Path, quantity: str, site: str, step: int) -> float:
    """One number of the event file."""
    vectors, known = written(folder)
    tag = f"lowrank_vector/{quantity}"
    return float(vectors[tag][step][known[tag]["sites"].index(site)])


@contextmanager
def tensorboard(logs: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A TensorBoard of its own process that serves a folder: where it is, as soon as it answers."""
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *options,
    ]
    said = logs.parent / f"{logs.name}.tensorboard.txt"
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {}))
        try:
            yield _address(said, process)
        finally:
            process.terminate()
            process.wait(30)


def _address(said: Path, process: "subprocess.Popen[bytes]") -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", said.read_text())
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard does not answer: {said.read_text()}")


def ask(address: str, route: str, **arguments: Any) -> Any:
    """An answer of the tab's server."""
    with urlopen(f"{address}/data/plugin/lowrank/{route}?{urlencode(arguments)}", timeout=60) as response:
        content = response.read().decode()
    return json.loads(content) if response.headers["Content-Type"].startswith("application/json") else content


def wait_for_runs(address: str, count: int = 1) -> None:
    """Until it has read the event files."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        entries = [run["entries"] for run in ask(address, "runs")["runs"]]
        if len(entries) >= count:
            return
        time.sleep(0.2)
    raise AssertionError("TensorBoard has not read the runs")


@contextmanager
def chromium(profile: Path) -> Iterator[WebDriver]:
    """Debian's browser, with a profile of its own.

    Where there is none the tests that ask for it are left out and say so, but in CI they fail.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        missing = (
            "the tab of TensorBoard was NOT TESTED: there is no chromium and chromedriver; as root, "
            "`make browser` installs Debian's"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield page
    finally:
        page.quit()


def open_tab(page: WebDriver, address: str) -> None:
    """Go to the tab, and into its frame, when it has been drawn."""
    page.switch_to.default_content()
    page.get("about:blank")
    page.get(f"{address}/#lowrank")
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "iframe"))
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe"))
    settled(page)


def renew(page: WebDriver) -> None:
    """Load the tab again, without TensorBoard around it."""
    page.switch_to.default_content()
    page.execute_script(
        "document.body.classList.remove('dark-mode'); document.querySelector('iframe').contentWindow.location.reload()"
    )
    page.switch_to.frame(page.find_element(By.CSS_SELECTOR, "iframe"))
    settled(page)


def settled(page: WebDriver) -> None:
    """Until what was asked for is drawn."""
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#view[aria-busy=false]"))


def wait(page: WebDriver, claim: Any) -> None:
    """Until something is so."""
    WebDriverWait(page, 60, poll_frequency=0.05).until(lambda _: claim())


def resize(page: WebDriver, width: int, height: int) -> None:
    """The window as large as that, phones included, which Chromium's own windows are not."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # type: ignore[attr-defined]


def choose(page: WebDriver, control: str, value: str) -> None:
    Select(page.find_element(By.ID, control)).select_by_value(value)
    settled(page)


def keys(page: WebDriver, *pressed: str) -> str:
    """Press keys on the first heat map; what it then says."""
    wait(page, page.find_element(By.CSS_SELECTOR, "canvas").is_displayed)
    page.find_element(By.CSS_SELECTOR, "canvas").send_keys(*pressed)
    return page.find_element(By.CSS_SELECTOR, ".heat .status").text


def write(folder: Path, *samples: tuple[int, dict[str, float]], name: str = "q", kind: str = "vector") -> None:
    """A run of hand-made vectors, through the writer that monitors use."""
    logger, vectors = TensorBoardLogger(folder.parent, name=folder.name, version=""), Vectors()
    for step, values in samples:
        assert write_report([logger], {}, step, [vectors.draw([Row(kind, name, values)], step)]) == []
    logger.experiment.close()


def damage(folder: Path, share: float = 0.5) -> Path:
    """Overwrite a few bytes in the middle of a run's event file, as a broken disk does."""
    (file,) = folder.glob("*tfevents*")
    content = bytearray(file.read_bytes())
    place = int(share * len(content))
    content[place : place + 64] = bytes(64)
    file.write_bytes(content)
    return file


def forge(folder: Path, content: bytes, *tensors: np.ndarray[Any, Any]) -> None:
    """A run of somebody else under our name."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = SummaryWriter(folder)
    for step, tensor in enumerate(tensors):
        value = Summary.Value(tag="t", tensor=make_tensor_proto(tensor))
        value.metadata.plugin_data.plugin_name, value.metadata.plugin_data.content = "lowrank", content
        value.metadata.data_class = 2
        writer._get_file_writer().add_summary(Summary(value=[value]), step)
    writer.close()
