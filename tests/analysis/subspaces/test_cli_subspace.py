"""`lightning-lowrank subspace` on real files.

Oracles: numpy's SVD of the dense matrix of updates, torch's own state dicts, one process for two.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank.analysis.cli import main
from lightning_lowrank.models.adapter_folders import AdapterFolder, Pair, write_adapter

KS = (1, 2, 4)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(11, 8),
        nn.Flatten(0),
        nn.Linear(8, 12),
        nn.Unflatten(0, (1, 12)),
        nn.Conv1d(1, 5, 3),
        nn.Linear(10, 4),
    )


def saved(folder: Path, count: int = 7, seed: int = 0) -> tuple[list[str], str]:
    """Models that moved away from one start along two shared directions, and a little anywhere."""
    torch.manual_seed(seed)
    start = network().state_dict()
    shared = [{name: torch.randn_like(value) for name, value in start.items()} for _ in range(2)]
    paths = []
    for i in range(count):
        strengths = torch.randn(2)
        moved = {
            name: value
            + 0.05 * (strengths[0] * shared[0][name] + strengths[1] * shared[1][name])
            + 0.005 * torch.randn_like(value)
            for name, value in start.items()
        }
        paths.append(str(folder / f"task{i}_{seed}.pt"))
        torch.save(moved, paths[-1])
    torch.save(start, folder / f"base_{seed}.pt")
    return paths, str(folder / f"base_{seed}.pt")


def updates(paths: list[str], base: str, name: str | None = None) -> np.ndarray:
    """Dense, one row for each model."""
    start = torch.load(base, weights_only=True)
    rows = [torch.load(path, weights_only=True) for path in paths]
    names = [name] if name else list(start)
    return np.stack([torch.cat([(row[n] - start[n]).double().flatten() for n in names]).numpy() for row in rows])


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    main(["subspace", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def shares(rows: np.ndarray) -> list[float]:
    energies = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    return [energies[:k].sum() / energies.sum() for k in KS]


def left_out(paths: list[str], base: str) -> list[list[float]]:
    """What the mean of others, their components, and both hold of a model, in the mean over models."""
    rows = updates(paths, base)
    found = []
    for i, x in enumerate(rows):
        others = np.delete(rows, i, 0)
        away, energy = x - others.mean(0), x @ x
        right = np.linalg.svd(others - others.mean(0), full_matrices=False)[2]
        alone, about = (np.cumsum((right @ one) ** 2)[[k - 1 for k in KS]] for one in (x, away))
        mean = np.full(len(KS), energy - away @ away)
        found.append(np.stack([mean, alone, mean + about]) / energy)
    return np.mean(found, 0).tolist()


def test_what_is_explained_is_that_of_the_dense_matrix_whole_and_by_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, base = saved(tmp_path)

    found = told(capsys, "fit", *paths, "--base", base, "--modes")

    by_name = {name: list(numbers["explained"].values()) for name, numbers in found["layers"].items()}
    assert_allclose(list(found["whole"]["explained"].values()), shares(updates(paths, base)), rtol=1e-6)
    for name, values in by_name.items():
        assert_allclose(values, shares(updates(paths, base, name)), rtol=1e-6)
    left = found["whole"]["left_out"]
    assert_allclose([list(left[key].values()) for key in ("mean", "basis", "mean_and_basis")], left_out(paths, base))
    assert found["dropped_k"] == [8, 16] and "k=8,16 left out" in found["warnings"][0]
    assert set(found["layers"]["4.weight"]["modes"]) == {"0", "2", "all"}
    assert found["whole"]["left_out"]["mean_and_basis"]["2"] > 0.8 > 0.01 > found["whole"]["left_out"]["random"]["2"]


def test_models_of_another_start_are_held_by_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, base = saved(tmp_path)
    others, other_base = saved(tmp_path, seed=1)

    found = told(capsys, "fit", *paths, "--base", base, "--control", *others, "--control-base", other_base)

    control, left = found["whole"]["control"], found["whole"]["left_out"]
    assert control["explained"]["2"] > 0.8 and left["mean_and_basis"]["2"] > 0.8
    assert control["held_by_basis"]["2"] < 10 * control["random"]["2"]
    assert_allclose(control["grassmann"]["2"]["distance"], control["grassmann"]["2"]["distance_chance"], atol=0.1)
    assert found["whole"]["halves"]["2"]["distance"] < 0.5


def test_nulls_are_those_of_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator, paths = np.random.default_rng(0), []
    for i in range(7):
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save({"weight": torch.tensor(generator.standard_normal((20, 50)))}, paths[-1])

    found = told(capsys, "fit", *paths)["whole"]

    drawn = [shares(generator.standard_normal((7, 1000))) for _ in range(40)]
    assert_allclose(list(found["null"].values()), np.mean(drawn, 0), rtol=0.02)
    assert_allclose(list(found["left_out"]["random"].values()), [k / 1000 for k in KS])
    assert_allclose(found["left_out"]["mean"]["1"], found["left_out"]["mean_null"]["1"], atol=0.03)
    assert_allclose(list(found["left_out"]["mean_null"].values()), -1 / 6)


def test_a_basis_has_nothing_of_its_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, base = saved(tmp_path)
    others, other_base = saved(tmp_path, seed=1)
    alone, beside = (str(tmp_path / f"{name}.safetensors") for name in ("alone", "beside"))
    fit = ["fit", *paths, "--base", base, "-o"]

    told(capsys, *fit, alone)
    told(capsys, *fit, beside, "--control", *others, "--control-base", other_base)

    assert_close(load_file(beside), load_file(alone))


def test_models_are_told_to_share_a_start_only_where_they_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = saved(tmp_path)
    strangers = []
    for seed in range(4):
        torch.manual_seed(seed)
        strangers.append(str(tmp_path / f"stranger{seed}.pt"))
        torch.save(network().state_dict(), strangers[-1])

    same = told(capsys, "fit", *paths[:4], "--match", "*weight")
    other = told(capsys, "fit", *strangers, "--match", "*weight")

    assert any("share an initialisation" in warning for warning in same["warnings"])
    assert not any("share an initialisation" in warning for warning in other["warnings"])


# Adapters


def adapters(folder: Path, gauged: bool, base: dict[str, Tensor]) -> list[str]:
    """LoRA adapters; gauged ones have other factors of the same products."""
    paths = []
    for i in range(6):
        torch.manual_seed(i)
        pairs = {}
        for path, (m, n) in {"a": (9, 7), "b": (5, 9)}.items():
            a, b = torch.randn(2, n), torch.randn(m, 2)
            gauge = torch.randn(2, 2) + 2 * torch.eye(2) if gauged else torch.eye(2)
            pairs[path] = Pair(torch.linalg.inv(gauge) @ a, b @ gauge, 0.5 + i)
        table = Pair(torch.randn(2, 13), torch.randn(4, 2), of_embedding=True)
        paths.append(str(folder / f"{'gauged' if gauged else 'plain'}{i}"))
        write_adapter(paths[-1], AdapterFolder(pairs | {"embed": table}))
    return paths


def test_adapters_are_looked_at_through_products_whatever_the_gauge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, gauged = (adapters(tmp_path, gauge, {}) for gauge in (False, True))
    first = told(capsys, "fit", *plain)
    second = told(capsys, "fit", *gauged)

    dense = []
    for i, path in enumerate(plain):
        w = {
            k.removeprefix("base_model.model."): v.double()
            for k, v in load_file(f"{path}/adapter_model.safetensors").items()
        }
        dense.append((0.5 + i) * (w["a.lora_B.weight"] @ w["a.lora_A.weight"]).flatten().numpy())
    assert_allclose(list(first["layers"]["a.weight"]["explained"].values()), shares(np.stack(dense)), rtol=1e-6)
    for key in ("explained", "left_out"):
        assert_close(second["layers"]["a.weight"][key], first["layers"]["a.weight"][key], rtol=1e-5, atol=1e-6)


def test_a_basis_of_adapters_holds_their_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"a.weight": torch.randn(9, 7), "b.weight": torch.randn(5, 9), "embed.weight": torch.randn(13, 4)}
    save_file(base, tmp_path / "base.safetensors")
    paths = adapters(tmp_path, False, base)
    main(["subspace", "fit", *paths, "--k", "4", "-o", str(tmp_path / "basis.safetensors")])
    options = ["--base", str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "rebuilt")]
    main(["subspace", "reconstruct", str(tmp_path / "basis.safetensors"), *options])
    capsys.readouterr()
    found = told(capsys, "project", str(tmp_path / "basis.safetensors"), paths[2], *options[:2])

    rebuilt = load_file(tmp_path / "rebuilt" / "plain2.safetensors")
    main(["merge", paths[2], str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "merged.safetensors")])
    whole = load_file(tmp_path / "merged.safetensors")
    energy = sum(float((whole[n] - base[n]).double().square().sum()) for n in base)
    lost = sum(float((whole[n] - rebuilt[n]).double().square().sum()) for n in base)
    assert_allclose(found["models"][paths[2]]["mean_and_basis"], 1 - lost / energy, rtol=1e-4)


def test_adapters_need_no_base_where_nothing_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, basis = adapters(tmp_path, False, {}), str(tmp_path / "basis.safetensors")
    for i, path in enumerate(paths):  # as on a hub: a name, and no folder
        config = Path(path) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": f"hub/{i // 5}"}))
    fitted = told(capsys, "fit", *paths, "--k", "3")
    main(["subspace", "fit", *paths[:5], "--k", "3", "-o", basis])
    capsys.readouterr()

    rows = told(capsys, "project", basis, *paths[:5])["models"]
    sizes = told(capsys, "compress", basis, *paths[:5], "-o", str(tmp_path / "c.safetensors"))["bytes"]
    more = told(capsys, "extend", basis, paths[5], "--k", "4", "-o", str(tmp_path / "more.safetensors"))

    assert any("for different bases, ['hub/0', 'hub/1']" in warning for warning in fitted["warnings"])
    controlled = told(capsys, "fit", *paths[3:], "--k", "1", "--control", *paths[:3])["warnings"]
    assert any("for different bases, ['hub/0', 'hub/1']" in warning for warning in controlled)
    controlled = told(capsys, "fit", *paths[:3], "--k", "1", "--control", *paths[3:])["warnings"]
    assert not any("for different bases" in warning for warning in controlled)
    assert all(0.3 < row["mean_and_basis"] < 1 for row in rows.values())
    assert sizes["models"] == sum((Path(path) / "adapter_model.safetensors").stat().st_size for path in paths[:5])
    assert more["from_files"] and more["models"][paths[5]]["held after"] > more["models"][paths[5]]["held before"]
    with pytest.raises(SystemExit, match="give the base with --base"):
        main(["subspace", "merge", basis, "-o", str(tmp_path / "merged.safetensors")])


def test_adapters_of_weights_with_inputs_as_rows_are_rebuilt_as_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, paths = {"square.weight": torch.zeros(4, 4), "wide.weight": torch.zeros(3, 6)}, []
    save_file(base, tmp_path / "base.safetensors")
    for i in range(4):
        torch.manual_seed(i)
        square, wide = (Pair(torch.randn(2, n), torch.randn(m, 2)) for m, n in ((4, 4), (6, 3)))
        paths.append(str(tmp_path / f"{i}"))
        write_adapter(paths[-1], AdapterFolder({"square": square, "wide": wide}, inputs_as_rows=True))
    path, options = str(tmp_path / "basis.safetensors"), ["--base", str(tmp_path / "base.safetensors")]

    main(["subspace", "fit", *paths, "--k", "2", "-o", path])
    main(["subspace", "merge", path, *options, "-o", str(tmp_path / "mean.safetensors")])

    merged = load_file(tmp_path / "mean.safetensors")
    for name, mean in merged.items():
        factors = [load_file(f"{one}/adapter_model.safetensors") for one in paths]
        keys = [f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight" for letter in "BA"]
        assert_close(mean, torch.stack([(one[keys[0]] @ one[keys[1]]).T for one in factors]).mean(0))


def test_adapters_are_compared_in_what_all_of_them_adapt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = adapters(tmp_path, False, {})
    torch.manual_seed(9)
    pairs = {path: Pair(torch.randn(3, n), torch.randn(m, 3)) for path, (m, n) in {"a": (9, 7), "c": (4, 4)}.items()}
    write_adapter(tmp_path / "other", AdapterFolder(pairs))
    words = ["fit", *paths, str(tmp_path / "other"), "--match", "[ac].weight"]

    found = told(capsys, *words, "--exclude", "c.weight")

    assert set(found["layers"]) == {"a.weight"} and found["num_models"] == 7
    with pytest.raises(SystemExit, match=r"other has \['c.weight'\], which .*plain0 lacks"):
        main(["subspace", *words])


def spoilt(folder: Path, how: str) -> None:
    """One mistake in an adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if how == "no alpha":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "lora_alpha"}))
    elif how == "half a pair":
        save_file({k: v for k, v in load_file(weights).items() if "a.lora_B" not in k}, weights)
    elif how == "no tensors":
        weights.write_bytes(b"")
    else:
        config.write_text(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no alpha", r"adapter_config.json lacks \['lora_alpha'\]"),
        ("half a pair", r"one factor without the other for \['a'\]"),
        ("no tensors", "adapter_model.safetensors cannot be read"),
        ("", "adapter_config.json cannot be read as JSON"),
        ("[]", "contains a list"),
    ],
)
def test_adapters_that_are_spoilt_are_refused_by_name(how: str, message: str, tmp_path: Path) -> None:
    paths = adapters(tmp_path, False, {})
    spoilt(Path(paths[3]), how)

    with pytest.raises(SystemExit, match=f"plain3.*{message}"):
        main(["subspace", "fit", *paths])


# Used


@pytest.fixture
def basis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str], str]:
    paths, base = saved(tmp_path)
    main(["subspace", "fit", *paths, "--base", base, "--k", "5", "-o", str(tmp_path / "basis.safetensors")])
    capsys.readouterr()
    return str(tmp_path / "basis.safetensors"), paths, base


def test_components_are_orthonormal_and_the_files_own(basis: tuple[str, list[str], str]) -> None:
    path, paths, base = basis

    found = load_file(path)

    name = "2.weight"
    rows = updates(paths, base, name)
    own = found[f"components/{name}"].double().flatten(1).numpy()
    right = np.linalg.svd(rows - rows.mean(0))[2][:5]
    assert_allclose(own @ own.T, np.eye(5), atol=1e-5)
    assert_allclose(np.abs(own @ right.T), np.eye(5), atol=1e-4)
    assert_allclose(found[f"mean/{name}"].flatten(), rows.mean(0), atol=1e-6)


def test_models_are_rebuilt_from_coefficients_as_projections(basis: tuple[str, list[str], str], tmp_path: Path) -> None:
    path, paths, base = basis
    main(["subspace", "compress", path, *paths[:2], "--k", "3", "-o", str(tmp_path / "c.safetensors")])
    main(
        [
            "subspace",
            "reconstruct",
            path,
            "--coefficients",
            str(tmp_path / "c.safetensors"),
            "-o",
            str(tmp_path / "out"),
        ]
    )

    rebuilt = load_file(tmp_path / "out" / "task1_0.safetensors")
    start = torch.load(base, weights_only=True)
    for name in start:
        rows = updates(paths, base, name)
        right = np.linalg.svd(rows - rows.mean(0))[2][:3]
        expected = rows.mean(0) + (rows[1] - rows.mean(0)) @ right.T @ right
        assert_allclose((rebuilt[name] - start[name]).flatten(), expected, atol=2e-6)


def test_bytes_are_those_of_the_files(
    basis: tuple[str, list[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, paths, _ = basis
    found = told(capsys, "compress", path, *paths, "-o", str(tmp_path / "c.safetensors"))["bytes"]

    sizes = [Path(one).stat().st_size for one in paths]
    assert found["models"] == sum(sizes) and found["basis"] == Path(path).stat().st_size
    assert_allclose(
        found["ratio"], sum(sizes) / (Path(path).stat().st_size + (tmp_path / "c.safetensors").stat().st_size)
    )
    assert found["ratio_at_most"] == 7 / 6


def test_merging_by_coefficients_of_all_is_the_mean(
    basis: tuple[str, list[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, paths, _ = basis
    for of in ("mean", "coefficients"):
        main(["subspace", "merge", path, "--of", of, "-o", str(tmp_path / f"{of}.safetensors")])
    said = capsys.readouterr().out
    main(["subspace", "compress", path, *paths[:3], "-o", str(tmp_path / "three.safetensors")])
    three = ["--coefficients", str(tmp_path / "three.safetensors"), "--of", "coefficients"]
    main(["subspace", "merge", path, *three, "-o", str(tmp_path / "three_merged.safetensors")])

    mean, other, some = (load_file(tmp_path / f"{n}.safetensors") for n in ("mean", "coefficients", "three_merged"))
    states = [torch.load(one, weights_only=True) for one in paths]
    assert "both merges are the same" in said
    for name, value in mean.items():
        assert_close(value, torch.stack([state[name] for state in states]).mean(0), rtol=0, atol=2e-6)
        assert_close(value, other[name], rtol=0, atol=2e-6)
    of_three = torch.stack([state["2.weight"] for state in states[:3]]).mean(0)
    assert (some["2.weight"] - of_three).norm() < 0.2 * (mean["2.weight"] - of_three).norm()


def test_a_basis_that_is_extended_is_that_of_all_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, base = saved(tmp_path)
    first, whole, later = (str(tmp_path / f"{n}.safetensors") for n in ("first", "whole", "later"))
    main(["subspace", "fit", *paths[:5], "--base", base, "--k", "3", "-o", first])
    main(["subspace", "fit", *paths, "--base", base, "--k", "3", "-o", whole])
    capsys.readouterr()
    found = told(capsys, "extend", first, *paths[5:], "-o", later, "--k", "5")

    one, other = load_file(whole), load_file(later)
    name = "2.weight"
    assert_close(other[f"mean/{name}"], one[f"mean/{name}"], rtol=0, atol=1e-6)
    ours, theirs = (t[f"components/{name}"].double().flatten(1)[:2] for t in (other, one))
    assert_allclose(np.linalg.svd((ours @ theirs.T).numpy(), compute_uv=False), 1, atol=1e-3)
    rows = found["models"]
    assert all(rows[path]["held after"] > rows[path]["held before"] for path in paths[5:])
    assert min(row["held after"] for row in rows.values()) > 0.9


def digits_like() -> tuple[nn.Module, dict[str, Any], Any]:
    """A task with data for one model by its name."""
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    batch = torch.randn(20, 6)
    return module, {"a": [batch], "all": [batch + 1]}, lambda module, x: {"output": module(x).mean()}


def test_models_are_measured_whole_and_rebuilt_on_the_data_of_their_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for i, name in enumerate("abcd"):
        torch.manual_seed(i)
        paths.append(str(tmp_path / f"{name}.pt"))
        torch.save(nn.Linear(6, 3).state_dict(), paths[-1])
    path = str(tmp_path / "basis.safetensors")
    main(["subspace", "fit", *paths, "--k", "2", "-o", path])
    capsys.readouterr()
    data = f"{__name__}:digits_like"

    found = told(capsys, "compress", path, *paths, "--data", data, "-o", str(tmp_path / "c.safetensors"))["models"]

    module, batches, measure = digits_like()
    module.load_state_dict(torch.load(paths[0], weights_only=True))
    assert_allclose(found[paths[0]]["output, whole"], measure(module, batches["a"][0])["output"].item(), rtol=1e-5)
    assert "output, rebuilt" in found[paths[0]] and "all/output, rebuilt" not in found[paths[0]]
    assert {"a/output, whole", "all/output, whole"} < set(found[paths[1]])


def broken() -> None:
    """A task that there is not."""
    raise RuntimeError("no data")


def test_nothing_is_written_where_the_data_fail(basis: tuple[str, list[str], str], tmp_path: Path) -> None:
    path, paths, _ = basis
    (tmp_path / "later.pt").write_bytes(Path(paths[0]).read_bytes())
    output = tmp_path / "out.safetensors"

    for words in (["compress", path, paths[0]], ["merge", path], ["extend", path, str(tmp_path / "later.pt")]):
        with pytest.raises(SystemExit, match="no data"):
            main(["subspace", *words, "--data", f"{__name__}:broken", "-o", str(output)])
        assert not output.exists()


def test_coefficients_are_as_many_as_components_were_asked_for(
    basis: tuple[str, list[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, paths, _ = basis

    found = told(capsys, "project", path, paths[0], "--k", "2")["models"][paths[0]]

    assert {name: len(values) for name, values in found["coefficients"].items()}["2.weight"] == 2


def test_models_as_folders_count_the_bytes_of_their_weights_and_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, base = saved(tmp_path)
    folders = [tmp_path / f"model {i}" for i in range(4)]
    for folder, file in zip(folders, files, strict=False):
        folder.mkdir()
        save_file(torch.load(file, weights_only=True), folder / "model.safetensors")
        (folder / "README.md").write_text("words" * 10000)
    paths, path = [str(folder) for folder in folders], str(tmp_path / "basis.safetensors")
    main(["subspace", "fit", *paths, "--base", base, "-o", path])
    weights = {folder: (folder / "model.safetensors").read_bytes() for folder in folders}
    capsys.readouterr()

    found = told(capsys, "compress", path, *paths, "-o", str(tmp_path / "c.safetensors"))["bytes"]

    assert found["models"] == sum(map(len, weights.values()))
    for words in (["fit", *paths], ["extend", path, paths[1]], ["merge", path]):
        with pytest.raises(SystemExit, match=r"part of it|is made of it"):
            main(["subspace", *words, "-o", str(folders[1] / "model.safetensors")])
    assert {folder: (folder / "model.safetensors").read_bytes() for folder in folders} == weights


def test_tensors_without_an_axis_and_with_equal_entries_are_as_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scales, paths = [1.0, 2.0, 4.0, 8.0, 16.0], []
    for i, scale in enumerate(scales):
        torch.manual_seed(i)
        gain = torch.ones(6) if i == 1 else torch.rand(6)
        state = {"weight": torch.randn(5, 6), "scale": torch.tensor(scale), "gain": gain, "steps": torch.tensor(i)}
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save(state, paths[-1])
    path, out = str(tmp_path / "basis.safetensors"), tmp_path / "out"
    main(["subspace", "fit", *paths[:4], "--k", "2", "--modes", "-o", path])
    main(["subspace", "reconstruct", path, "-o", str(out)])
    capsys.readouterr()

    own = told(capsys, "project", path, paths[4])["models"][paths[4]]["coefficients"]["scale"]
    rows = told(capsys, "extend", path, paths[4], "--k", "3", "-o", str(tmp_path / "more.safetensors"))["models"]
    ones = {name: torch.full((3,), 2.0) for name in ("a", "b")}
    for i in range(3):
        torch.save(ones | {"c": torch.rand(2) if i else torch.zeros(2)}, tmp_path / f"equal{i}.pt")
    equal = told(capsys, "fit", *(str(tmp_path / f"equal{i}.pt") for i in range(3)))

    assert [load_file(out / f"{i}.safetensors")["scale"].item() for i in range(4)] == pytest.approx(scales[:4])
    assert np.abs(own) == pytest.approx([16 - np.mean(scales[:4])]) and rows[paths[4]]["held after"] > 0.99
    assert not any("initialisation" in warning for warning in equal["warnings"])


def test_tied_tensors_outside_a_basis_are_written_under_both_names(tmp_path: Path) -> None:
    paths, base = [], tmp_path / "base.pt"
    for i in range(5):
        torch.manual_seed(i)
        table = torch.randn(7, 4)
        torch.save({"in.weight": table, "out.weight": table, "mid.weight": torch.randn(4, 4)}, tmp_path / f"{i}.pt")
        paths.append(str(tmp_path / f"{i}.pt"))
    base.write_bytes(Path(paths.pop()).read_bytes())
    path, out = str(tmp_path / "basis.safetensors"), tmp_path / "merged.safetensors"
    main(["subspace", "fit", *paths, "--base", str(base), "--match", "mid*", "--k", "2", "-o", path])

    main(["subspace", "merge", path, "-o", str(out)])

    start, merged = torch.load(base, weights_only=True), load_file(out)
    assert torch.equal(merged["in.weight"], start["in.weight"])
    assert torch.equal(merged["out.weight"], start["in.weight"])


def test_models_that_did_not_change_are_named_and_not_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, base = saved(tmp_path)
    same = str(tmp_path / "same.pt")
    Path(same).write_bytes(Path(base).read_bytes())
    start = torch.load(base, weights_only=True)
    torch.save(torch.load(paths[0], weights_only=True) | {"2.weight": start["2.weight"]}, paths[0])

    found = told(capsys, "fit", *paths, same, "--base", base, "--modes")

    layer = found["layers"]["2.weight"]
    assert any("same.pt" in warning and "equal to the base" in warning for warning in found["warnings"])
    assert found["whole"]["left_out"]["num_left_out"] == 7 and layer["left_out"]["num_left_out"] == 6
    assert layer["left_out"]["basis"]["2"] > 0.5 and layer["modes"]["0"]["left_out"]["2"] > 0.1


def test_what_is_not_alike_among_models_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, base = saved(tmp_path)
    others, other_base = saved(tmp_path, seed=1)
    for words, warning in (
        (["--base", base, "--control", *others], "the updates of models are compared with the weights of controls"),
        (["--control", *others, "--control-base", other_base], "the weights of models are compared with the updates"),
    ):
        found = told(capsys, "fit", *paths, *words)

        assert any(one.startswith(warning) for one in found["warnings"])
    found = told(capsys, "fit", *paths, "--base", base, "--control", *others, "--control-base", other_base)
    assert not any("are compared with" in one for one in found["warnings"])


def test_the_page_has_what_is_printed_by_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, base = saved(tmp_path)

    told(capsys, "fit", *paths, "--base", base, "--page", str(tmp_path / "page.html"))

    page = (tmp_path / "page.html").read_text()
    assert all(f"subspace_{name}" in page for name in ("explained", "null", "left_out_mean_and_basis"))
    assert '"steps": [1, 2, 4]' in page and '"whole"' in page


def test_the_tree_of_many_models_is_left_to_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for i in range(70):
        torch.manual_seed(i)
        paths.append(str(tmp_path / f"{i}.safetensors"))
        save_file({"w": torch.randn(9)}, paths[-1])

    main(["subspace", "fit", *paths])

    assert "a tree of 70 is too large" in capsys.readouterr().out
    assert told(capsys, "fit", *paths[:66])["whole"]["left_out"]["num_left_out"] == 64


# Processes


def fitted_by(processes: int, folder: Path) -> Any:
    """What `subspace fit` prints, and in `basis_of_N.safetensors` writes, as torchrun starts it."""
    paths, base = [str(folder / f"task{i}_0.pt") for i in range(7)], str(folder / "base_0.pt")
    words = ["subspace", "fit", *paths, "--base", base, "--modes", "--json"]
    words += ["-o", str(folder / f"basis_of_{processes}.safetensors")]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "lightning_lowrank.analysis", *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_torchrun_finds_and_writes_with_two_processes_what_one_does(tmp_path: Path) -> None:
    saved(tmp_path)
    both, alone = (fitted_by(size, tmp_path) for size in (2, 1))

    assert_close(both["layers"], alone["layers"])
    assert_close(both["whole"], alone["whole"])
    assert_close(load_file(tmp_path / "basis_of_2.safetensors"), load_file(tmp_path / "basis_of_1.safetensors"))


# Refused


REFUSED = {
    "one": (["fit", "0"], "three"),
    "two": (["fit", "0", "1"], "N - 1 centred components"),
    "k of 0": (["fit", "*", "--k", "0"], r"\[0\] must be from 1 to 5"),
    "k of N - 1": (["fit", "*", "--k", "2,6"], r"\[6\] must be from 1 to 5"),
    "words": (["fit", "*", "--k", "many"], "whole numbers"),
    "twice": (["fit", "*", "0"], "given twice"),
    "another architecture": (["fit", "*", "other"], "has another architecture"),
    "base of another architecture": (["fit", "*", "--base", "other"], "has another architecture"),
    "few controls": (["fit", "*", "--control", "other"], "as --control"),
    "no tensor": (["fit", "*", "--match", "nothing*"], "matches nothing"),
    "infinite": (["fit", "*", "infinite"], "not finite"),
    "no basis": (["project", "0", "1"], "is not a basis|as safetensors"),
    "gone": (["project", "nowhere", "1"], "there is no file"),
    "model of another architecture": (["project", "basis", "other"], "does not fit models such as"),
    "k of a basis": (["project", "basis", "0", "--k", "9"], "must be from 1 to 5"),
    "base of a basis": (["merge", "basis", "--base", "other", "-o", "x.safetensors"], "another architecture"),
    "in it already": (["extend", "basis", "0", "-o", "x.safetensors"], "already"),
    "in it by another path": (["extend", "basis", "./task0_0.pt", "-o", "x.safetensors"], "already"),
    "more tensors than the first": (["fit", "short", "*"], "which .*short.pt lacks"),
    "equal models": (["fit", "same", "-o", "x.safetensors"], "are equal"),
    "over a model": (["fit", "*", "-o", "0"], "is one of checkpoints"),
    "over the base": (["fit", "*", "--base", "base", "-o", "base"], "is one of base"),
    "over the basis": (["compress", "basis", "0", "-o", "basis"], "is one of basis"),
    "extended over the basis": (["extend", "basis", "short", "-o", "basis"], "is one of basis"),
    "merged over the base of the basis": (["merge", "basis", "-o", "base"], "is made of it"),
    "merged over a model of the basis": (["merge", "basis", "-o", "0"], "is made of it"),
    "the base as a model": (["fit", "*", "base", "--base", "base"], "as a model and as a base"),
    "a base that is not finite": (["fit", "*", "--base", "infinite"], r"not finite in \['[^']*infinite.pt'\];"),
    "factors": (["fit", "factors", "0", "1"], r"factors of LoRA, such as \['a.lora_A'"),
    "another ending": (["fit", "*", "-o", "x.pt"], "must end in .safetensors"),
    "no folder": (["merge", "basis", "-o", "nowhere/x.safetensors"], "there is no folder nowhere"),
    "coefficients in another basis": (
        ["reconstruct", "basis", "--coefficients", "coefficients", "-o", "x"],
        "in another basis than",
    ),
    "more components than coefficients": (
        ["merge", "narrow", "--coefficients", "coefficients", "--k", "3", "-o", "x.safetensors"],
        "from 1 to 2, the number of components in .*coefficients",
    ),
    "neither an adapter nor a model": (["fit", "adapter", "nowhere"], "there is no file or folder"),
    "no coefficients": (["reconstruct", "basis", "--coefficients", "basis", "-o", "x"], "has no coefficients"),
    "rebuilt into a file": (["reconstruct", "basis", "-o", "other"], "cannot be made a folder"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_bad_input_is_refused_by_name(
    why: str, basis: tuple[str, list[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, paths, base = basis
    words, message = REFUSED[why]
    first = torch.load(paths[0], weights_only=True)
    torch.save({"0.weight": torch.ones(3, 3)}, tmp_path / "other.pt")
    torch.save({name: value / 0 for name, value in first.items()}, tmp_path / "infinite.pt")
    torch.save({"2.weight": first["2.weight"]}, tmp_path / "short.pt")
    same = [str(tmp_path / f"same{i}.pt") for i in range(4)]
    for one in same:
        torch.save(first, one)
    known = {str(i): [one] for i, one in enumerate(paths)} | {"*": paths, "same": same, "basis": [path], "base": [base]}
    known |= {name: [str(tmp_path / f"{name}.pt")] for name in ("other", "infinite", "nowhere", "short")}
    torch.save({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2)}, tmp_path / "factors.pt")
    known["factors"], known["coefficients"] = (
        [str(tmp_path / "factors.pt")],
        [str(tmp_path / "coefficients.safetensors")],
    )
    known["narrow"], known["adapter"] = [str(tmp_path / "narrow.safetensors")], adapters(tmp_path, False, {})
    if "coefficients" in words:
        main(["subspace", "fit", *paths[:5], "--base", base, "--k", "3", "-o", *known["narrow"]])
        main(["subspace", "compress", *known["narrow"], *paths, "--k", "2", "-o", *known["coefficients"]])
    before = {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
    monkeypatch.chdir(tmp_path)

    given = [one for word, before in zip(words, ["", *words], strict=False) for one in _given(word, before, known)]
    with pytest.raises(SystemExit) as refused:
        main(["subspace", *given])
    assert re.search(message, str(refused.value))
    assert {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()} == before


def test_models_are_not_rebuilt_over_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = saved(tmp_path, 4)
    files = [str(tmp_path / f"{i}.safetensors") for i in range(4)]
    for path, file in zip(paths, files, strict=True):
        save_file(torch.load(path, weights_only=True), file)
    main(["subspace", "fit", *files, "-o", str(tmp_path / "basis.safetensors")])
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="is made of it"):
        main(["subspace", "reconstruct", "basis.safetensors", "-o", "."])


def test_equal_models_and_equal_tensors_of_models_share_no_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, base = saved(tmp_path)
    start = torch.load(base, weights_only=True)
    for path in paths:
        torch.save(torch.load(path, weights_only=True) | {"0.weight": start["0.weight"]}, path)
    same = [str(tmp_path / f"same{i}.pt") for i in range(4)]
    for one in same:
        torch.save(start, one)
    basis = str(tmp_path / "basis.safetensors")

    equal = told(capsys, "fit", *same, "--modes")["whole"]
    found = told(capsys, "fit", *paths, "--base", base, "-o", basis)
    rows = told(capsys, "project", basis, paths[0])["models"][paths[0]]

    assert set(equal["explained"].values()) == {None} and equal["halves"]["1"]["distance"] is None
    assert set(found["layers"]["0.weight"]["explained"].values()) == {None}
    assert found["whole"]["explained"]["1"] > 0.3 and rows["mean_and_basis"] > 0.9
    assert rows["coefficients"]["0.weight"] == []


def _given(word: str, before: str, known: dict[str, list[str]]) -> list[str]:
    """Files by their short names; what follows --k is a number."""
    return [word] if before == "--k" else known.get(word, [word])
