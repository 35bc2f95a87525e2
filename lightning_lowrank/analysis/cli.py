"""The command line.

lightning-lowrank report RUN_DIR
lightning-lowrank spectra model.safetensors
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

from lightning_lowrank.analysis.overwriting import is_read, writable

# Where each command is and what it does, the most used first. Only the one that was asked for is imported: some take
# torch.
COMMANDS = {
    "diagnose": ("diagnosing", "print what is wrong in runs, worst first, and what to try"),
    "report": ("runs", "write the logged curves of a run as one HTML file"),
    "summary": ("runs", "print the logged numbers of a run as a table"),
    "spectra": ("checkpoints", "print ranks, tails and outliers of the matrices in checkpoints"),
    "diff": ("checkpoints", "print what training changed from one checkpoint to another"),
    "plan": ("planning.command", "print what RankMonitor will cost for a model, without training it"),
    "advise-ranks": ("adapters", "print which LoRA or GaLore rank each matrix should get under a budget"),
    "extract-lora": ("adapters", "write what training changed as a LoRA adapter that peft loads"),
    "merge": ("adapters", "merge a LoRA adapter into the weights of its base"),
    "merge-models": ("merges", "merge fine-tuned models into one, and print which of them conflict"),
    "coordinate-check": (
        "widths",
        "print how the changes of each layer depend on the width of a network (a check of muP)",
    ),
    "connect": ("networks", "print loss and accuracy along the line between two checkpoints"),
    "masks": ("networks", "print how alike the largest weights of two checkpoints are"),
    "importance": ("networks", "print how important attention heads and neurons are"),
    "flat-directions": ("landscape", "print where the loss of a small network has no curvature, and why"),
    "subspace fit": (
        "subspaces.command",
        "print which subspace many models share, compared with noise, and write it as a basis",
    ),
    "subspace extend": ("subspaces.extension", "extend a basis to hold later models"),
    "subspace project": (
        "subspaces.storing",
        "print the coefficients of models in a basis, and the part that it does not capture",
    ),
    "subspace compress": (
        "subspaces.storing",
        "write models as coefficients in a basis, and print how much smaller they are",
    ),
    "subspace reconstruct": ("subspaces.storing", "write models from coefficients back as checkpoints"),
    "subspace merge": ("subspaces.storing", "merge models by their mean, or by their coefficients"),
}
GROUPS = {"subspace": "subspaces that many models share: fit, extend, project, compress, reconstruct, merge"}


# The beginning of an option is none: --rank is not --ranks.
Parser = partial(ArgumentParser, allow_abbrev=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `lightning-lowrank`: each command is a function with the same arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = next((name for name in COMMANDS if name.split() == words[: len(name.split())]), None)
    whole = Parser(prog="lightning-lowrank", description="Measure low rank in runs and checkpoints.")
    commands = whole.add_subcommands()
    within = {"": commands}
    for name, does in GROUPS.items():  # before its own commands: jsonargparse wants levels in order
        group = Parser(description=does)
        commands.add_subcommand(name, group, help=does)
        within[name] = group.add_subcommands()
    for name, (_, does) in COMMANDS.items():
        group_name, _, local = name.rpartition(" ")
        within[group_name].add_subcommand(local, _parser(name) if name == asked else Parser(), help=does)
    found, name = whole.parse_args(words), ""
    while "subcommand" in found:
        name, found = f"{name} {found.subcommand}".strip(), found[found.subcommand]
    given = {key: value for key, value in vars(found).items() if key != "config"}
    try:
        refuse_overwriting(given)
        if given.get("page") is not None:
            writable(given["page"], option="page")
        _command(name)(**given)
    except ValueError as error:
        sys.exit(f"lightning-lowrank: {error}")


def refuse_overwriting(given: Mapping[str, Any]) -> None:
    """Refuse to write over a file that is to be read: it is mapped, and would be lost.

    Raises:
        ValueError: An output is one of the inputs.
    """
    outputs = {key: Path(given[key]) for key in ("output", "page") if given.get(key)}
    for key, output in outputs.items():
        for other, values in given.items():
            several = values if isinstance(values, list) else [values]
            if other not in outputs and is_read(output, [Path(one) for one in several if isinstance(one, str)]):
                raise ValueError(
                    f"--{key}={output} is one of {other} or part of it, and would be lost: write to another file"
                )


def _command(name: str) -> Callable[..., None]:
    """The function behind a command."""
    command: Callable[..., None] = getattr(
        import_module(f"lightning_lowrank.analysis.{COMMANDS[name][0]}"), re.sub("[ -]", "_", name)
    )
    return command


def _parser(name: str) -> ArgumentParser:
    """Arguments as the function has them: those without a default by their place, switches without a value."""
    command = _command(name)
    parser = Parser(description=COMMANDS[name][1])
    words = {one.arg_name: one.description for one in docstring_parser.parse(command.__doc__ or "").params}
    for key, one in inspect.signature(command, eval_str=True).parameters.items():
        known: dict[str, Any] = {"help": words[key]}
        if one.annotation is bool:
            known |= {"action": "store_true"}
        elif "list[str]" in str(one.annotation):
            known |= {"type": str, "nargs": "+"}
        else:
            known |= {"type": one.annotation}
        if one.default is not inspect.Parameter.empty:
            known["default"] = one.default
        if one.kind is not inspect.Parameter.KEYWORD_ONLY and "default" not in known:
            parser.add_argument(key, **known)
        else:
            short = ["-o"] if key == "output" else []
            required = {} if "default" in known else {"required": True}
            parser.add_argument(*short, f"--{key.replace('_', '-')}", **known, **required)
    return parser


if __name__ == "__main__":
    main()
