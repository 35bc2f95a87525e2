"""Mistakes that are planted into a copy of the package one at a time, each with the tests that must fail for it.

python -m tests.planted            # all of them: a table, and an exit status of 1 if one is not caught
python -m tests.planted scale      # those with the word in their names
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("lightning_lowrank", "tests", "benchmarks", "examples", "conftest.py", "pyproject.toml", "README.md")


# No test is known to fail: go on after the first that does.
ANY: list[str] = []


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    Attributes:
        file: Of the package.
        old: Regular expression of what it takes the place of; white space stands for any.
        new: What is there instead.
        tests: What must fail.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str | None:
        """The text with the mistake in it; None where there is nothing to take the place of."""
        pattern = re.compile(re.sub(r"\s+", r"\\s+", self.old.strip()))
        return pattern.sub(lambda match: match.expand(self.new), text, count=1) if pattern.search(text) else None


PROMISES, MATHS, GALORE = "tests/promises/", "tests/maths/", "tests/methods/galore/test_"
LORA = "tests/methods/lora/test_"
SHARED, SUBSPACE = MATHS + "shared_subspaces/", "tests/analysis/subspaces/test_cli_subspace.py::test_"
SUBSPACE_TRAINING = "tests/methods/subspace_training/test_subspace_training.py::test_"
NEUTRAL, PAIRS, RESUME = PROMISES + "test_neutrality.py", PROMISES + "test_pairs.py", PROMISES + "test_resume.py"
ALL_AT_ONCE = NEUTRAL + "::test_training_is_the_same_with_all_monitors_at_once"
NUMBERS = PROMISES + "test_fault_matrix.py::test_a_number_is_that_of_what_was_there_or_is_missing"

MISTAKES: dict[str, Mistake] = {
    # What training looks like from outside
    "a hook of the optimizer is left": Mistake(
        "watching/watch.py", r"for hook in self\._hooks: hook\.remove\(\)", "pass", (f"{ALL_AT_ONCE}[plain]",)
    ),
    "random numbers are not put back": Mistake(
        "loss/replay.py",
        r"with torch\.random\.fork_rng\(range\([^:]*:",
        "if True:",
        (f"{ALL_AT_ONCE}[dropout and batch norm]",),
    ),
    "Python's generator is not put back": Mistake(
        "loss/replay.py",
        r"random\.setstate\(states\[0\]\)",
        "pass",
        (f"{NEUTRAL}::test_random_numbers_of_python_are_the_same",),
    ),
    "a replay moves the buffers of batch normalisation": Mistake(
        "loss/snapshot.py",
        r"self\._undo\.callback\(buffer\.data\.copy_, buffer\.detach\(\)\.clone\(\)\)",
        "pass",
        (f"{ALL_AT_ONCE}[dropout and batch norm]",),
    ),
    "a replay leaves its gradients": Mistake(
        "loss/snapshot.py", r"tensor\.grad = gradient", "pass", ("tests/loss/test_snapshot.py",)
    ),
    "what fails in a monitor ends the run": Mistake(
        "watching/watch.py",
        r"except Exception as error: self\._lose\(error, loses=loses\)",
        "except ZeroDivisionError as error:\n                self._lose(error, loses=loses)",
        (PROMISES + "test_faults.py::test_whatever_fails_in_taking_a_sample_training_goes_on",),
    ),
    # When things are read
    "gradients keep the factor of a GradScaler": Mistake(
        "measuring/sources/gradients.py",
        r"matrices\.to\((torch\.promote_types\(matrices\.dtype, scale\.dtype\))\) / scale",
        r"matrices.to(\1)",
        ("tests/measuring/test_sources.py::test_gradients_under_a_scaler_are_unscaled",),
    ),
    "a gradient that is none is read as zero": Mistake(
        "measuring/sources/gradients.py",
        r"if all\(p\.grad is None for p in site\.parameters\):",
        "if False:",
        (f"{NUMBERS}[gradients-none]",),
    ),
    "the update is taken the wrong way round": Mistake(
        "measuring/parameter_source.py",
        r"promote_types\(now\.dtype, torch\.float32\)\) - before",
        "promote_types(now.dtype, torch.float32)) + before",
        (f"{NUMBERS}[updates-zero]",),
    ),
    "differences of half precision are rounded again": Mistake(
        "measuring/parameter_source.py",
        r"return now\.to\(torch\.promote_types\(now\.dtype, torch\.float32\)\) - before",
        "return now - before",
        ("tests/watching/test_changing_modules.py::test_differences_of_half_precision_weights_are_not_rounded_again",),
    ),
    "the weights before the step are not copied": Mistake(
        "measuring/sources/updates.py",
        r"value\.clone\(\) for value",
        "value for value",
        (f"{NUMBERS}[updates-zero]",),
    ),
    "half of the rows are pooled": Mistake(
        "measuring/sources/features.py",
        r"add_rows\(self\._grams\[name\], rows\)",
        "add_rows(self._grams[name], rows[: len(rows) // 2])",
        (f"{NUMBERS}[features-zero]",),
    ),
    "rows that are pooled replace those before": Mistake(
        "measuring/sources/features.py",
        r"if name not in self\._grams: self\._grams",
        "if True:\n            self._grams",
        ("tests/measuring/test_features.py::test_rows_are_pooled_over_an_accumulation_window",),
    ),
    "an optimizer that has stepped is still awaited": Mistake(
        "measuring/sampling.py",
        r"self\._pending\.discard\(index\)",
        "pass",
        (f"{RESUME}::test_what_waits_is_known_after_the_run_as_in_its_last_checkpoint",),
    ),
    "a resumed run forgets the sample in the making": Mistake(
        "measuring/sampling.py",
        r"self\._pending &= \{int\(index\) for index in state\[\"optimizers\"\]\}",
        "pass",
        (f"{RESUME}::test_a_sample_that_waits_for_an_optimizer_goes_on_in_the_resumed_run",),
    ),
    # Formulas
    "the empirical Fisher is a sum and no mean": Mistake(
        "maths/operators/operators.py",
        r"gradients \* \(slopes / len\(gradients\)\)",
        "gradients * slopes",
        (MATHS + "test_operators.py",),
    ),
    "the change of the outputs along one vector is taken for that along another": Mistake(
        "maths/operators/operators.py",
        r"known is vector",
        "known is not None",
        (MATHS + "test_operators.py",),
    ),
    "what a sketch took out is found again in the rest": Mistake(
        "maths/spectra/sketch.py", r", without=atoms\.basis", "", ("tests/maths/test_sketch.py",)
    ),
    "rows of an exhausted space are made orthogonal once": Mistake(
        "maths/spectra/lanczos.py",
        r"for _ in range\(2\): found = torch",
        "for _ in range(1):\n        found = torch",
        ("tests/maths/test_sketch.py",),
    ),
    "a weak rest has what float32 leaves of the energy": Mistake(
        "maths/spectra/sketch.py", r"TELLABLE = 1e-3", "TELLABLE = 1e-5", ("tests/maths/test_sketch.py",)
    ),
    "the lower quadrature of a sketch has no zeros": Mistake(
        "maths/spectra/sketch.py",
        r"corner = across\.mT @ ratio\(across, ",
        "corner = 2 * across.mT @ ratio(across, ",
        ("tests/maths/test_sketch.py",),
    ),
    "products have as few bits as training allows": Mistake(
        "maths/spectra/spectrum.py",
        r"torch\.no_grad\(\), _products_in_full\(\)",
        "torch.no_grad()",
        ("tests/maths/test_sketch.py",),
    ),
    "a sample that is overdue waits for another cadence": Mistake(
        "measuring/allowances.py",
        r"start = given\.now \+ 1 - every",
        "start = self._last",
        ("tests/measuring/test_allowances.py",),
    ),
    "a search for the critical multiple trusts predictions for ever": Mistake(
        "monitors/curvature/critical.py",
        r"reach = max\(width - math\.log\(above / below\) / 2, 0\.0\)",
        "reach = math.inf",
        ("tests/monitors/curvature/test_critical.py",),
    ),
    "a search for the critical multiple does not look beyond what it predicts": Mistake(
        "monitors/curvature/critical.py",
        r"abs\(off\) - BEYOND",
        "abs(off)",
        ("tests/monitors/curvature/test_critical.py",),
    ),
    "the weights of rows are forgotten": Mistake(
        "loss/output_loss.py",
        r"\(self\.row_weights\(\) / self\.num_rows\)\.sqrt\(\)",
        "self.row_weights().sqrt()",
        ("tests/loss/test_output_loss.py",),
    ),
    "energies in the place of values in the effective rank": Mistake(
        "statistics/effective_rank.py",
        r"perplexity\(spectrum\.unit, ",
        "perplexity(spectrum.unit_energies, ",
        ("tests/statistics/test_effective_rank.py",),
    ),
    "the participation ratio is not squared": Mistake(
        "statistics/participation_ratio.py",
        r"energies\.sum\(-1\)\.square\(\)",
        "energies.sum(-1)",
        ("tests/statistics/test_participation_ratio.py",),
    ),
    "the Gini index counts from the other end": Mistake(
        "monitors/concentration/inequality.py",
        r"torch\.arange\(1 - n, n, 2",
        "torch.arange(2 - n, n + 1, 2",
        ("tests/monitors/concentration/test_inequality.py",),
    ),
    "a Gram matrix forgets what it was divided by": Mistake(
        "maths/spectra/spectrum.py",
        r"return short @ short\.mH, scale",
        "return short @ short.mH, torch.ones_like(scale)",
        (MATHS + "test_spectrum.py",),
    ),
    "the gradient of a loss keeps its graph": Mistake(
        "maths/operators/operators.py",
        r"_flat\(\[g\.detach\(\) for g in gradient\], dtype\)",
        "_flat(list(gradient), dtype)",
        (MATHS + "test_operators.py", f"{PAIRS}::test_numbers_beside_another_are_those_alone[curvature-rank]"),
    ),
    # Alerts
    "an alert looks on the wrong side of its threshold": Mistake(
        "reports/alerts/states.py",
        r"subject - threshold if upper else threshold - subject",
        "threshold - subject if upper else subject - threshold",
        ("tests/reports/test_alerts.py",),
    ),
    "an alert fires on what is within its error": Mistake(
        "reports/alerts/states.py",
        r"doubt = error if self\.state == \"firing\" else -error",
        "doubt = error",
        ("tests/reports/test_alerts.py",),
    ),
    "an alert fires one sample late": Mistake(
        "reports/alerts/states.py",
        r"self\.in_a_row >= rule\.for_samples",
        "self.in_a_row > rule.for_samples",
        ("tests/reports/test_alerts.py",),
    ),
    # Methods
    "GaLore keeps its subspaces for ever": Mistake(
        "methods/galore/matrix.py",
        r"self\.is_due or \(self\.num_steps - self\.offset\) % self\.policy\.update_every == 0",
        "self.is_due",
        (f"{GALORE}steps.py::test_steps_are_those_of_galore_by_hand[AdamW-auto-svd-keep]",),
    ),
    "GaLore forgets its scale": Mistake(
        "methods/galore/steps.py",
        r"alpha=self\.scale",
        "alpha=1.0",
        (f"{GALORE}steps.py::test_steps_are_those_of_galore_by_hand[SGD-auto-svd-keep]",),
    ),
    "GaLore decays the step and not the weight": Mistake(
        "methods/galore/steps.py",
        r"decay_\(parameter, entry\.group, skipped\)",
        "decay_(wide, entry.group, skipped)",
        (f"{GALORE}steps.py::test_steps_are_those_of_galore_by_hand[AdamW-auto-svd-keep]",),
    ),
    "GaLore resumes without its bases": Mistake(
        "methods/galore/matrix.py",
        r"self\.bases = Bases\(\*\*state\[\"bases\"\]\)\.to\(like\) if state\[\"bases\"\] else None",
        "self.bases = None",
        (PROMISES + "test_methods.py::test_a_loop_that_is_stopped_and_resumed_is_the_same_to_the_bit",),
    ),
    "rounding is blown up by moments that are empty": Mistake(
        "methods/galore/matrix.py",
        r"two_sided and not state",
        "False",
        (f"{GALORE}trainings.py::test_moments_that_are_empty_get_no_rounding_of_both_sides",),
    ),
    # Subspaces that models share
    "models are not centred before their components": Mistake(
        "maths/shared_subspaces/components.py",
        r"torch\.linalg\.eigh\(centred\(gram\)\)",
        "torch.linalg.eigh(gram)",
        (SHARED,),
    ),
    "a model that is left out is among the others": Mistake(
        "maths/shared_subspaces/left_out.py",
        r"\[j for j in range\(len\(gram\)\) if j != i\]",
        "list(range(len(gram)))",
        (SHARED,),
    ),
    "the mean of others counts as if it were a projection": Mistake(
        "maths/shared_subspaces/left_out.py",
        r"along\.mean\(\) \* 2 - inner\.mean\(\)",
        "along.mean()",
        (SHARED,),
    ),
    "clusters are joined by their nearest models": Mistake(
        "maths/shared_subspaces/distances.py",
        r"\(sizes\[a\] \* near\[a\] \+ sizes\[b\] \* near\[b\]\) / \(sizes\[a\] \+ sizes\[b\]\)",
        "torch.minimum(near[a], near[b])",
        (SHARED,),
    ),
    "an axis keeps the model that is left out": Mistake(
        "maths/shared_subspaces/modes.py", r"sums\[axis\] - _scatter\(x, axis\) - rest", "sums[axis] - rest", (SHARED,)
    ),
    "a later model weighs as much as all before it": Mistake(
        "maths/shared_subspaces/extension.py", r"\(n / \(n \+ 1\)\) \*\* 0\.5 \*", "", (SHARED,)
    ),
    "adapters are compared without their scalings": Mistake(
        "analysis/subspaces/models.py",
        r"pair\.scaling \* pair\.b\.double\(\) for pair",
        "pair.b.double() for pair",
        (f"{SUBSPACE}adapters_are_looked_at_through_products_whatever_the_gauge",),
    ),
    "adapters are compared by their factors": Mistake(
        "analysis/subspaces/models.py",
        r"\(a @ a\[own\]\.T\) \* \(b\.T @ b\[:, own\]\)",
        "(a @ a[own].T) + (b.T @ b[:, own])",
        (f"{SUBSPACE}adapters_are_looked_at_through_products_whatever_the_gauge",),
    ),
    "weights are taken for updates": Mistake(
        "analysis/subspaces/models.py",
        r"row -= starts\[id\(base\)\]\[part\]",
        "pass",
        (f"{SUBSPACE}what_is_explained_is_that_of_the_dense_matrix_whole_and_by_tensor",),
    ),
    "the null forgets that models are centred": Mistake(
        "analysis/subspaces/fitting.py",
        r"gaussian_share\(num_members - 1,",
        "gaussian_share(num_members,",
        (f"{SUBSPACE}nulls_are_those_of_noise",),
    ),
    "controls are among the models of a basis": Mistake(
        "analysis/subspaces/fitting.py",
        r"_part\(gram\[:num_members, :num_members\],",
        "_part(gram,",
        (f"{SUBSPACE}a_basis_has_nothing_of_its_controls",),
    ),
    "as many components as models are taken for a finding": Mistake(
        "analysis/subspaces/fitting.py",
        r"most = num_models - 2",
        "most = num_models - 1",
        (f"{SUBSPACE}bad_input_is_refused_by_name[k of N - 1]",),
    ),
    "processes do not add up what they share": Mistake(
        "analysis/subspaces/fitting.py",
        r"team\.all_reduce\(total\)",
        "pass",
        (f"{SUBSPACE}torchrun_finds_and_writes_with_two_processes_what_one_does",),
    ),
    "components are written over one another": Mistake(
        "analysis/subspaces/fitting.py",
        r"sums\[1 \+ i\], i \* length \+ at",
        "sums[1 + i], at",
        (f"{SUBSPACE}components_are_orthonormal_and_the_files_own",),
    ),
    "models are rebuilt without the mean": Mistake(
        "models/basis_files.py",
        r"return self\.mean\.double\(\) \+ update\.reshape\(self\.mean\.shape\)",
        "return update.reshape(self.mean.shape)",
        (f"{SUBSPACE}models_are_rebuilt_from_coefficients_as_projections",),
    ),
    "the merge of coefficients is that of the mean": Mistake(
        "analysis/subspaces/storing.py",
        r"means if of == \"coefficients\" else nothing",
        "nothing",
        (f"{SUBSPACE}merging_by_coefficients_of_all_is_the_mean",),
    ),
    "the basis counts for nothing among bytes": Mistake(
        "analysis/subspaces/storing.py",
        r"whole / \(shared \+ part\)",
        "whole / part",
        (f"{SUBSPACE}bytes_are_those_of_the_files",),
    ),
    "coefficients of another basis are taken": Mistake(
        "analysis/subspaces/storing.py",
        r"if known\[\"basis\"\] != _mark\(basis\):",
        "if False:",
        (f"{SUBSPACE}bad_input_is_refused_by_name[coefficients in another basis]",),
    ),
    "a model that did not change is left out": Mistake(
        "maths/shared_subspaces/left_out.py",
        r"if float\(gram\[i, i\]\) > 0\]",
        "]",
        (f"{SUBSPACE}models_that_did_not_change_are_named_and_not_left_out",),
    ),
    "weights with inputs as rows are rebuilt with outputs as rows": Mistake(
        "analysis/subspaces/models.py",
        r"pair\.of_embedding or \(folder\.inputs_as_rows and pair\.a\.ndim == 2\)",
        "pair.of_embedding",
        (f"{SUBSPACE}adapters_of_weights_with_inputs_as_rows_are_rebuilt_as_they_lie",),
    ),
    "a run begins at the mean though it is not to": Mistake(
        "methods/subspace_training/act.py",
        r"share\.mean if settings\.include_mean else torch\.zeros_like\(share\.mean\)",
        "share.mean",
        (f"{SUBSPACE_TRAINING}the_model_begins_at_the_mean_of_the_others",),
    ),
    "a run goes on along other directions": Mistake(
        "methods/subspace_training/act.py",
        r"if other:",
        "if False:",
        (f"{SUBSPACE_TRAINING}a_run_goes_on_with_the_same_basis_and_with_no_other",),
    ),
    "the weights themselves train beside their coefficients": Mistake(
        "methods/subspace_training/act.py",
        r"parameter\.requires_grad_\(id\(parameter\) in trained\)",
        "pass",
        (f"{SUBSPACE_TRAINING}weights_stay_in_the_span_and_only_coefficients_train",),
    ),
    # Training of pairs
    "LoRA does not scale its branch": Mistake(
        "methods/lora/pairs.py",
        r"return inner if recipe\.scaling == 1 else inner \* recipe\.scaling",
        "return inner",
        (f"{LORA}pairs.py::test_outputs_and_gradients_are_those_of_peft[False-0.0]",),
    ),
    "LoRA leaves in the weight what its pairs begin as": Mistake(
        "methods/lora/inits.py",
        r"place\.add\(-1\)",
        "pass",
        (f"{LORA}pairs.py::test_a_model_begins_as_it_was[pissa-mlp]",),
    ),
    "LoRA saves the base as merged weights": Mistake(
        "methods/lora/prepared.py",
        r"copy\.add\(\)",
        "pass",
        (f"{LORA}exchange.py::test_a_merged_checkpoint_is_loaded_without_the_callback[default]",),
    ),
    "ReLoRA begins new pairs and drops the old": Mistake(
        "methods/lora/restarts.py",
        r"place\.add\(\)",
        "pass",
        (f"{LORA}relora.py::test_the_function_is_the_same_after_a_restart",),
    ),
    "CorDA by peft forgets what it took out of the weight": Mistake(
        "methods/lora/by_peft.py",
        r"layer\.lora_state\.initial\[layer\.lora_name\] = copied\(layer\)",
        "pass",
        (f"{LORA}by_peft.py::test_peft_loads_what_is_exported[corda]",),
    ),
    "LoRA with EVA waits for a training mode that pretrained models never have": Mistake(
        "methods/lora/pairs.py",
        r"layer\.training or torch\.is_grad_enabled\(\)",
        "layer.training",
        (f"{LORA}pairs.py::test_eva_takes_the_top_directions_of_the_first_inputs[False]",),
    ),
    "AdaLoRA, a kind of LoRA, forgets its penalty": Mistake(
        "methods/lora/adalora.py",
        r"alpha=self\.orthogonality",
        "alpha=0.0",
        (f"{LORA}adalora.py::test_a_training_is_that_of_pefts_own_model",),
    ),
    "the norm of a residual grows as it likes": Mistake(
        "methods/galore/residual.py",
        r"norm\.minimum\(GROWTH \* last\)",
        "norm",
        (f"{GALORE}trainings.py::test_the_norm_of_a_residual_grows_by_a_hundredth_at_most_and_outlives_what_has_none",),
    ),
    "the least energy rank in the place of the largest": Mistake(
        "methods/galore/ranks.py",
        r"ceil\(max\(known\)",
        "ceil(min(known)",
        (f"{GALORE}trainings.py::test_the_measured_rank_is_that_of_the_first_samples_of_a_monitor",),
    ),
    # Several processes
    "a mean over processes in the place of a sum": Mistake(
        "distributed/team.py",
        r"dist\.all_reduce\(tensor\) return tensor",
        "dist.all_reduce(tensor)\n            return tensor / self.size\n        return tensor",
        (
            PROMISES
            + "test_data_parallel.py::test_two_processes_log_with_any_monitor_what_one_does_and_train_as_unwatched",
        ),
    ),
}


def copy_of_the_tree(folder: Path) -> None:
    """What the tests need, without version control."""
    for name in COPIED:
        source = ROOT / name
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=skip) if source.is_dir() else shutil.copy(source, folder / name)


def failing(folder: Path, tests: tuple[str, ...], known: Sequence[str]) -> list[str]:
    """The tests that fail, besides those that are known to."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-n0", "-q", "-p", "no:cacheprovider", *(f"--deselect={test}" for test in known)]
    command = [sys.executable, "-m", "pytest", *options, *(["-x"] if known is not ANY else []), *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-500:] + done.stderr[-500:])
    return re.findall(r"^(?:FAILED|ERROR) (tests/\S+?::.+?)(?: - .*)?$", done.stdout, re.M)


@cache
def failing_without(folder: Path, tests: tuple[str, ...]) -> list[str]:
    """What fails in the sound tree."""
    return failing(folder, tests, ANY)


def verdict(folder: Path, mistake: Mistake) -> tuple[bool, str]:
    """Whether it is caught, and by what."""
    path = folder / "lightning_lowrank" / mistake.file
    sound = path.read_text() if path.exists() else ""
    text = mistake.planted(sound)
    if text is None:
        return False, f"its place in {mistake.file} is gone"
    before: list[str] = []
    try:
        before = failing_without(folder, mistake.tests)
        path.write_text(text)
        found = failing(folder, mistake.tests, before)
    except RuntimeError as error:
        return False, f"no test is left: {' '.join(str(error).split())}; failing without it: {before}"
    finally:
        path.write_text(sound)
    also = f" ({len(before)} fail without it)" if before else ""
    return bool(found), (found[0] if found else "not caught") + also


def main() -> None:
    """Plant each mistake in turn."""
    wanted = {name: m for name, m in MISTAKES.items() if all(word in name for word in sys.argv[1:])}
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        for title, mistake in wanted.items():
            is_caught, by = verdict(folder, mistake)
            missed += not is_caught
            sys.stdout.write(f"{'caught' if is_caught else 'MISSED'}  {title:55}  {by}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(wanted) - missed} of {len(wanted)} caught\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
