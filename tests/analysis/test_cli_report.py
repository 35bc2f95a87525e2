"""The command line: a run as a page, and as a table."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_lowrank import LossMonitor, Monitor, Probe, RankMonitor, Weights
from lightning_lowrank.analysis.cli import main
from tests.tab import forge, train, write, written
from tests.trainings import QUIET, Classifier

SCRIPT = "</script><script>owned=1</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    train(folder, RankMonitor(every_n_steps=4, detail="all"))
    return folder


def answers(page: Path) -> list[dict[str, object]]:
    """What is in a report."""
    text = page.read_text()
    begin = text.index('id="answers">') + len('id="answers">')
    return json.loads(text[begin : text.index("</script>", begin)])  # type: ignore[no-any-return]


def test_the_numbers_are_those_of_the_event_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["summary", str(run), "--json"])

    told = json.loads(capsys.readouterr().out)["."]
    vectors, known = written(run)
    for end, step in (("first", 0), ("latest", 20)):
        assert told[end]["step"] == step
        for quantity, values in told[end]["values"].items():
            assert list(values) == known[f"lowrank_vector/{quantity}"]["sites"]
            np.testing.assert_array_equal(
                np.float32(list(values.values())), vectors[f"lowrank_vector/{quantity}"][step]
            )
    assert set(told["alerts"].values()) == {0.0} and told["overhead_percent"] > 0


def test_what_a_monitor_took_that_has_long_stopped_is_no_share_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = Monitor([Probe("weight", Weights(), ("effective_rank",), lambda step: step < 10)], name="early")
    late = LossMonitor(every_n_steps=20)
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    L.Trainer(**QUIET, logger=logger, callbacks=[early, late], max_steps=301).fit(Classifier())
    main(["summary", str(tmp_path / "run"), "--json"])

    told = json.loads(capsys.readouterr().out)["."]["overhead_percent"]
    vectors, known = written(tmp_path / "run")
    costs = [(known[tag]["sites"], list(rows.values())[-1]) for tag, rows in vectors.items() if "_cost/" in tag]
    own, total = sum(one.watch.journal.clock.own for one in (early, late)), late.watch.journal.clock.total
    assert told == pytest.approx(100 * own / (total - own), rel=0.3)
    assert len(costs) == 2 and told < 0.5 * sum(row[sites.index("overhead_percent")] for sites, row in costs)


def test_what_monitors_took_that_have_all_stopped_is_a_share_of_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = Monitor([Probe("weight", Weights(), ("effective_rank",), lambda step: step < 10)], name="early")
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    L.Trainer(**QUIET, logger=logger, callbacks=[early], max_steps=301, log_every_n_steps=20).fit(Classifier())
    main(["summary", str(tmp_path / "run"), "--json"])

    told = json.loads(capsys.readouterr().out)["."]["overhead_percent"]
    vectors, known = written(tmp_path / "run")
    (said,) = (
        rows[max(rows)][known[tag]["sites"].index("overhead_percent")]
        for tag, rows in vectors.items()
        if "_cost/" in tag
    )
    # Ten of 301 steps.
    assert told == pytest.approx(said * 10 / 301, rel=0.1)


def test_the_table_has_the_medians_of_all_quantities(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    main(["summary", str(run.parent), "--all"])

    printed = capsys.readouterr().out
    median = np.median(written(run)[0]["lowrank_vector/weight_stable_rank"][20])
    assert f"{median:.3g}" in next(line for line in printed.splitlines() if "weight_stable_rank" in line)
    assert "run: " in printed and "training takes" in printed


def test_names_are_whole_in_a_narrow_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rich._console", None)
    site, name = "model.layers.31.self_attn.q_proj.weight", "layers_feature_participation_ratio"
    write(tmp_path / "run", (0, {site: 0.012345}), (12_000, {site: 0.00012345}), name=name)

    main(["summary", str(tmp_path), "--all"])

    lines = capsys.readouterr().out.splitlines()
    assert any(name in line and "0.0123" in line and "0.000123" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_quantities_that_began_at_other_steps_are_told_as_the_first_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", (0, {"a": 1.0}), (5, {"a": 2.0}), name="one")
    write(tmp_path / "run", (3, {"a": 1.0}), (5, {"a": 2.0}), name="two")

    main(["summary", str(tmp_path)])
    heading = capsys.readouterr().out.splitlines()[1].split()
    main(["summary", str(tmp_path), "--json"])

    told = json.loads(capsys.readouterr().out)["run"]
    assert heading[-4:] == ["step", "5", "lowest", "at"] and heading[-5] == "first"
    assert (told["first"]["step"], told["latest"]["step"]) == (None, 5)


def test_what_is_no_number_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", (0, {"a": math.nan, "b": math.inf, "c": 0.5}))

    main(["summary", str(tmp_path), "--json"])

    assert json.loads(capsys.readouterr().out)["run"]["latest"]["values"] == {"q": {"a": None, "b": None, "c": 0.5}}


def test_names_with_brackets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "[bold]run[", (0, {"[/red]": 1.0}), name="[i]q")

    main(["summary", str(tmp_path)])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[bold]run[", "[/red]", "[i]q"))


def test_a_summary_fits_a_terminal_and_says_what_it_leaves_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a run whose name is longer than what is left of a line of eighty characters, all of it told"
    for i in range(40):
        write(tmp_path / f"{name} {i:02}", (0, {"a.very.long.site.of.a.deep.network.weight": 1.0}))

    main(["summary", str(run)])
    one = capsys.readouterr().out.splitlines()
    main(["summary", str(tmp_path)])
    many = capsys.readouterr().out.splitlines()

    assert len(one) <= 25 and max(map(len, one)) <= 80
    assert {"gradient", "weight", "update"} <= {line.split("_")[0] for line in one}
    assert len(many) <= 25 and all(many[i].startswith(f"{name} {i:02}") for i in range(24))
    assert "16 more runs: --all" in many[-1]


def test_a_summary_of_one_run_is_headed_by_the_name_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "one", (0, {"a": 1.0}), (5, {"a": 2.0}))

    main(["summary", str(tmp_path / "one")])
    brief = capsys.readouterr().out
    main(["summary", str(tmp_path / "one"), "--all"])

    assert brief.startswith("one") and capsys.readouterr().out.strip().startswith("one")


def test_a_run_that_has_become_nan_says_since_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", (0, {"a": 1.0}), (5, {"a": math.nan}), (10, {"a": math.nan}))

    main(["summary", str(tmp_path)])

    assert "run; no number since step 5" in capsys.readouterr().out


def test_a_report_has_the_answer_to_every_question(run: Path, tmp_path: Path) -> None:
    main(["report", str(run), "-o", str(tmp_path / "report.html")])

    found = answers(tmp_path / "report.html")
    assert {answer["route"] for answer in found} == {"runs", "diagnosis", "texts", "matrix", "spectra"}
    entries = found[0]["answer"]["runs"][0]["entries"]  # type: ignore[index]
    assert len(entries) == len(found) - 3


def test_a_report_is_thinned_as_asked(tmp_path: Path) -> None:
    write(tmp_path / "run", *((step, {"a": float(step)}) for step in range(100)))

    main(["report", str(tmp_path), "-o", str(tmp_path / "report.html"), "--samples", "12"])

    (matrix,) = (answer["answer"] for answer in answers(tmp_path / "report.html") if answer["route"] == "matrix")
    assert len(matrix["steps"]) == 12 and matrix["total"] == 100  # type: ignore[index]


def test_a_report_asks_for_nothing_and_no_name_breaks_out_of_it(tmp_path: Path) -> None:
    write(tmp_path / SCRIPT.replace("/", "") / "run", (0, {SCRIPT: 1.0}), name=SCRIPT)

    main(["report", str(tmp_path / SCRIPT.replace("/", "")), "-o", str(tmp_path / "report.html")])

    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "owned" in text
    assert "default-src 'none'" in text and "src=" not in text.split("</head>")[0]
    assert answers(tmp_path / "report.html")[0]["answer"]["runs"][0]["entries"][0]["name"] == SCRIPT  # type: ignore[index]


@pytest.mark.parametrize("command", ["report", "summary"])
def test_a_folder_without_a_run_is_refused_in_words(command: str, tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "has no event files"), (tmp_path / "nothing", "is not a folder")):
        with pytest.raises(SystemExit, match=words):
            main([command, str(folder)])


@pytest.mark.parametrize("command", ["report", "summary"])
def test_what_is_no_run_beside_a_run_is_no_hindrance(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "logs" / "run", (0, {"a": 1.0}))
    forge(tmp_path / "logs" / "forged", b'{"kind":"vector","name":"q","sites":["a"]}', np.array([b"x"]))
    (written,) = (tmp_path / "logs" / "run").glob("events.*")
    for name, content in (("empty", b""), ("rubbish", b"no event"), ("cut", written.read_bytes()[:-7])):
        (tmp_path / "logs" / name).mkdir()
        (tmp_path / "logs" / name / "events.out.tfevents.1.host").write_bytes(content)

    main([command, "logs"])

    assert (tmp_path / "report.html").exists() == (command == "report")


@pytest.mark.parametrize("output", [".", "missing/report.html"])
def test_a_report_that_cannot_be_written_says_so(
    output: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="cannot be written"):
        main(["report", str(run), "-o", output])


def test_a_report_does_not_write_over_the_run_that_it_reads(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    (events,) = folder.glob("**/*tfevents*")
    before = events.read_bytes()

    with pytest.raises(SystemExit, match="would be lost"):
        main(["report", str(folder), "-o", str(events)])
    assert events.read_bytes() == before
    for _ in range(2):  # a page in the run's folder may be written again
        main(["report", str(folder), "-o", str(folder / "report.html")])


@pytest.mark.slow
def test_it_is_a_command_of_its_own(run: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lightning-lowrank")), "report", str(run), "-o", "page.html"]

    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)

    assert done.returncode == 0 and done.stdout.startswith("page.html: 1 run, "), done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_it_needs_no_torch() -> None:
    code = "import sys, lightning_lowrank.analysis.cli; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
