"""The server side of the tab: what it answers, what it refuses, and that TensorBoard does without it where it must."""

import argparse
import base64
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client, TestResponse

from lightning_lowrank import GaLore, RankMonitor
from lightning_lowrank.tensorboard.answers import MODULES, script
from lightning_lowrank.tensorboard.loader import LowRankLoader
from lightning_lowrank.tensorboard.plugin import LowRankPlugin
from lightning_lowrank.tensorboard.series import GAP, thinned
from tests.tab import ask, forge, tensorboard, train, wait_for_runs, write, written

ROOT = Path(__file__).parents[2]
Q = {"kind": "vector", "name": "q"}


def served(logs: Path, **flags: Any) -> LowRankPlugin:
    """The tab's server over a folder."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"lowrank": 0})
    multiplexer.AddRunsFromDirectory(str(logs))
    multiplexer.Reload()
    known = argparse.Namespace(**({"samples_per_plugin": {"lowrank": 0}} | flags))
    return LowRankPlugin(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logs)), flags=known))


def get(plugin: LowRankPlugin, route: str, method: str = "GET", **arguments: Any) -> TestResponse:
    client = Client(plugin.get_plugin_apps()[f"/{route}"])
    return client.open(f"/{route}", method=method, query_string=arguments)


def values(response: TestResponse) -> np.ndarray[Any, Any]:
    """Samples x sites of an answer."""
    answer = json.loads(response.data)
    return np.frombuffer(base64.b64decode(answer["values"]), "<f4").reshape(
        len(answer["steps"]), len(answer["sites"]), -1
    )


def test_a_matrix_is_what_the_event_file_has(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", RankMonitor(every_n_steps=2, detail="all"))

    answer = get(served(tmp_path / "logs"), "matrix", run="run", kind="vector", name="gradient_stable_rank")

    vectors = written(tmp_path / "logs" / "run")[0]["lowrank_vector/gradient_stable_rank"]
    assert json.loads(answer.data)["steps"] == list(vectors)
    np.testing.assert_array_equal(values(answer)[..., 0], np.stack(list(vectors.values())))


def test_spectra_of_a_site_come_with_what_noise_has(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", RankMonitor(every_n_steps=2, detail="all"))

    answer = get(served(tmp_path / "logs"), "spectra", run="run", name="weight", site="net.2.weight")

    known = json.loads(answer.data)
    spectra = written(tmp_path / "logs" / "run")[0]["lowrank_spectrum/weight"]
    np.testing.assert_array_equal(values(answer)[:, 0], np.stack([spectrum[1] for spectrum in spectra.values()]))
    assert known["noise"][0]["ranks"] == list(range(10)) and known["sites"] == ["net.2.weight"]
    assert math.isclose(sum(value**2 for value in known["noise"][0]["null"]), 1, rel_tol=1e-6)


def test_runs_are_listed_with_what_they_have(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", RankMonitor(every_n_steps=8, detail="all"))

    (run,) = json.loads(get(served(tmp_path / "logs"), "runs").data)["runs"]

    assert run["run"] == "run" and {entry["kind"] for entry in run["entries"]} == {
        "vector",
        "spectrum",
        "cost",
        "alert",
    }


def test_runs_have_the_places_that_tensorboard_gives_them(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write(tmp_path / "logs" / name, (0, {"x": 1.0}))
        time.sleep(0.01)  # TensorBoard goes by the time of the first event
    SummaryWriter(tmp_path / "logs" / "not ours").close()

    with tensorboard(tmp_path / "logs") as address:
        wait_for_runs(address, 3)
        places = {run["run"]: run["place"] for run in ask(address, "runs")["runs"]}
        with urlopen(f"{address}/data/runs", timeout=60) as response:
            listed = json.load(response)

    assert set(places) == {"a", "b", "c"} and "not ours" in listed
    assert all(listed[place] == run for run, place in places.items())


def test_ranks_come_with_those_of_gaussian_matrices(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", RankMonitor(["weights"], ["effective_rank"], detail="all"), max_steps=1)
    write(tmp_path / "logs" / "hand", (0, {"x": 1.0}))

    plugin = served(tmp_path / "logs")
    ranks = json.loads(get(plugin, "matrix", run="run", kind="vector", name="weight_effective_rank").data)
    hand = json.loads(get(plugin, "matrix", run="hand", **Q).data)

    assert len(ranks["null"]) == len(ranks["sites"]) == 2 and all(1 < null < 64 for null in ranks["null"])
    assert "null" not in hand


def test_curves_of_a_method_are_served_by_matrix(tmp_path: Path) -> None:
    train(tmp_path / "logs" / "run", GaLore(2, 2, match="*weight", every_n_steps=2))
    plugin = served(tmp_path / "logs")

    (run,) = json.loads(get(plugin, "runs").data)["runs"]
    answer = get(plugin, "matrix", run="run", kind="vector", name="galore_captured")

    names = {entry["name"] for entry in run["entries"] if entry["kind"] == "vector"}
    beside = {"galore_captured", "galore_captured_best", "galore_captured_random", "galore_overlap"}
    assert beside | {"galore_overlap_random", "galore_staleness", "galore_state_bytes"} <= names
    assert {"galore_refresh_time_ms", "galore_refreshes"} <= names
    assert all(site.endswith("weight") for site in json.loads(answer.data)["sites"])
    assert values(answer).min() > 0 and values(answer).max() <= 1


def test_nan_and_infinity_arrive_as_such_and_gaps_apart(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": math.nan, "b": math.inf}), (1, {"c": -math.inf}))

    found = values(get(served(tmp_path / "logs"), "matrix", run="run", **Q))[..., 0]

    np.testing.assert_array_equal(found[0, :2], [math.nan, math.inf])
    assert found[1, 2] == -math.inf
    assert (found.view(np.uint32) == GAP).tolist() == [[False, False, True], [True, True, False]]


def test_where_a_step_was_written_twice_the_later_word_holds(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}), (1, {"a": 2.0}))
    write(tmp_path / "logs" / "run", (1, {"a": 3.0}), (2, {"a": 4.0}))

    found = get(served(tmp_path / "logs"), "matrix", run="run", **Q)

    assert json.loads(found.data)["steps"] == [0, 1, 2] and values(found).ravel().tolist() == [1, 3, 4]


def test_what_a_run_wrote_beyond_the_step_at_which_it_was_resumed_is_gone(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}), (10, {"a": 2.0}), (20, {"a": 9.0}), (30, {"a": 9.0}))
    write(tmp_path / "logs" / "run", (15, {"a": 3.0}), (25, {"a": 4.0}))

    found = get(served(tmp_path / "logs"), "matrix", run="run", **Q)

    assert json.loads(found.data)["steps"] == [0, 10, 15, 25] and values(found).ravel().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [2, 7, 100, 5000])
def test_thinned_samples_are_spread_evenly_from_the_first_to_the_last(limit: int) -> None:
    chosen = thinned(np.arange(0, 6000, 3), limit)

    gaps = np.diff(chosen)
    assert chosen[0] == 0 and chosen[-1] == 1999 and len(chosen) == min(limit, 2000) and gaps.max() - gaps.min() <= 1


def test_a_range_of_steps_can_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", *((step, {"a": float(step)}) for step in range(10)))

    found = json.loads(get(served(tmp_path / "logs"), "matrix", run="run", first="3", last="6", **Q).data)

    assert found["steps"] == [3, 4, 5, 6] and found["total"] == 10


def test_a_sheet_has_every_sample_and_no_formula(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"=cmd()": 0.1, 'a,"b"': math.nan}), (5, {'a,"b"': math.inf}))

    answer = get(served(tmp_path / "logs"), "csv", run="run", **Q)

    assert answer.text.splitlines() == ['step,\'=cmd(),"a,""b"""', "0,0.1,nan", "5,,inf"]
    assert answer.headers["Content-Disposition"] == 'attachment; filename="lowrank.csv"'


@pytest.mark.parametrize("route", ["runs", "matrix", "spectra", "texts", "csv", "index.js", "page.js"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_every_answer_says_what_it_is_and_is_never_guessed_at(route: str, method: str, tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))

    answer = get(served(tmp_path / "logs"), route, method, run="run", **Q)

    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    types = {
        "csv": "text/csv; charset=utf-8",
        **dict.fromkeys(("index.js", "page.js"), "application/javascript; charset=utf-8"),
    }
    assert answer.headers["Content-Type"] == (
        types.get(route, "application/json") if answer.status_code == 200 else "application/json"
    )
    assert answer.status_code == (405 if method == "POST" else 404 if route == "spectra" else 200)


@pytest.mark.parametrize(
    "evil",
    ["../../etc/passwd", "/etc/passwd", "..%2f..", "run/../run", "<script>alert(1)</script>", "run\r\nSet-Cookie: a=b"],
)
@pytest.mark.parametrize("key", ["run", "name", "site", "kind"])
def test_what_is_not_there_is_not_found_whatever_it_is_called(key: str, evil: str, tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))

    answer = get(served(tmp_path / "logs"), "matrix", **({"run": "run", **Q} | {key: evil}))

    assert answer.status_code == 404 and "error" in json.loads(answer.data)
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "asked", [{}, {"run": "run"}, {"run": "run", **Q, "limit": "many"}, {"run": "run", "kind": "spectrum", "name": "q"}]
)
def test_a_question_that_makes_no_sense_is_refused_in_words(asked: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))

    answer = get(served(tmp_path / "logs"), "matrix", **asked)

    assert answer.status_code == 400 and json.loads(answer.data)["error"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff", b"[]", b"[" * 100_000, b'{"kind":"vector"}', b'{"kind":"vector","name":"q","sites":[1]}'),
        *(b'{"kind":"x","name":"q","sites":[]}', b'{"kind":"vector","name":"\\ud800","sites":["a"]}'),
        b'{"kind":"spectrum","name":"s","sites":["a"],"shape_of":[0],"shapes":[{"ranks":[0],"null":[NaN]}]}',
        b'{"kind":"spectrum","name":"s","sites":["a"],"shape_of":[0],"shapes":[{"ranks":["x"],"null":[1]}]}',
    ],
)
def test_event_files_of_others_are_passed_over(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "logs" / "good", (0, {"a": 1.0}))
    forge(tmp_path / "logs" / "bad", content, np.ones(1))

    found = json.loads(get(served(tmp_path / "logs"), "runs").data)["runs"]

    assert [run["run"] for run in found] == ["good"]


@pytest.mark.parametrize("forged", [np.array([b"x"]), np.array(1.0), np.ones((1, 4)), np.ones(2), np.array([1j])])
def test_samples_that_are_no_vector_of_ours_are_passed_over(forged: np.ndarray[Any, Any], tmp_path: Path) -> None:
    forge(tmp_path / "logs" / "run", b'{"kind":"vector","name":"q","sites":["a"]}', np.array([2.0]), forged)

    found = get(served(tmp_path / "logs"), "matrix", run="run", **Q)

    assert json.loads(found.data)["steps"] == [0] and values(found).ravel().tolist() == [2]


def test_a_limit_of_the_users_own_is_kept_and_said(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))
    flags = argparse.Namespace(samples_per_plugin={"lowrank": 5, "images": 3})

    LowRankLoader().fix_flags(flags)

    assert flags.samples_per_plugin == {"lowrank": 5, "images": 3}
    plugin = served(tmp_path / "logs", samples_per_plugin=flags.samples_per_plugin)
    assert json.loads(get(plugin, "runs").data)["kept"] == 5


def test_all_samples_are_kept_unless_the_user_says_otherwise() -> None:
    flags = argparse.Namespace(samples_per_plugin={})

    LowRankLoader().fix_flags(flags)

    assert flags.samples_per_plugin == {"lowrank": 0}


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["true", "false"])
def test_no_sample_is_dropped_by_either_loader(fast: str, tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", *((step, {"a": float(step), "b": math.nan}) for step in range(1500)))

    with tensorboard(tmp_path / "logs", "--load_fast", fast) as address:
        wait_for_runs(address)
        found = ask(address, "matrix", run="run", limit=5000, **Q)

    assert found["steps"] == list(range(1500))
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(found["values"]), "<f4")[::2], np.arange(1500))


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["lightning_lowrank.tensorboard.plugin", "lightning_lowrank.tensorboard.series"])
def test_tensorboard_starts_without_the_tab_where_it_cannot_be_imported(broken: str, tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Broken:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {broken!r}:\n"
        "            raise ImportError('broken on purpose')\nsys.meta_path.insert(0, Broken())\n"
    )

    with tensorboard(tmp_path / "logs", "--load_fast", "false", environment={"PYTHONPATH": str(tmp_path)}) as address:
        listed = json.loads(urlopen(f"{address}/data/plugins_listing", timeout=60).read())

    assert "scalars" in listed and "lowrank" not in listed
    assert "broken on purpose" in (tmp_path / "logs.tensorboard.txt").read_text()


def test_the_tab_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; import lightning_lowrank.tensorboard.loader, lightning_lowrank.tensorboard.plugin; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'rich', 'torchmetrics')))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_page_asks_no_other_host_and_makes_no_markup_of_text() -> None:
    code = script()

    addresses = set(re.findall(r"https?://[^\"'`]*|[\"'`]//[^\"'`]*", code))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, which is not fetched
    assert not any(
        word in code
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "</script",
        )
    )


def test_every_module_is_served_and_none_imports_what_stands_behind_it(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))
    plugin, before = served(tmp_path / "logs"), set[str]()

    for module in MODULES:
        code = get(plugin, module.name).text

        assert code == module.read_text() and set(re.findall(r'^import .* from "./(.*)";$', code, re.M)) <= before
        before.add(module.name)
    assert {module.name for module in MODULES} == {path.name for path in MODULES[0].parent.glob("*.js")}


def test_a_report_is_the_same_modules_as_one() -> None:
    names = re.findall(r"^(?:async )?(?:const|class|function) (\w+)", script(), re.M)

    assert len(names) == len(set(names)) and not re.search(r"^(import|export) ", script(), re.M)
