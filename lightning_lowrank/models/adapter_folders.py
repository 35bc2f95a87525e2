"""Folders of peft: `adapter_config.json` and `adapter_model.safetensors`, read and written without peft.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Num
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lowrank.models.checkpoints import refuse_infinite
from lightning_lowrank.models.unreadable_files import why_unreadable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"(?P<path>.*)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?:\.weight)?")


@dataclass(frozen=True, eq=False)
class Pair:
    """Factors of the change of one layer, outputs by inputs, whatever the layout of its weight.

    Attributes:
        a: Of a convolution with the axes of its kernel behind.
        b: The second factor.
        scaling: Factor of the product.
        of_embedding: The layer is an embedding, whose inputs are the rows of its table.
    """

    a: Num[Tensor, "R N *places"]
    b: Num[Tensor, "M R"]
    scaling: float = 1.0
    of_embedding: bool = False

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """Content of a folder.

    Attributes:
        pairs: By the path of the layer.
        whole: Parameters that were trained whole, by name.
        base: Name or path of the base model, if it says so.
        inputs_as_rows: Weights have their inputs as rows, as those of `Conv1D` in transformers.
    """

    pairs: Mapping[str, Pair]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    inputs_as_rows: bool = False


def write_adapter(folder: str | Path, adapter: AdapterFolder) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(base, folder)` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, pair in adapter.pairs.items():
        middle, end = ("embedding_", "") if pair.of_embedding else ("", ".weight")
        ones = [1] * (pair.a.ndim - 2)
        tensors[f"{PREFIX}{path}.lora_{middle}A{end}"] = pair.a
        tensors[f"{PREFIX}{path}.lora_{middle}B{end}"] = pair.b.reshape(*pair.b.shape, *ones)
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    save_file({key: t.detach().contiguous().clone() for key, t in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_config(adapter), indent=2, sort_keys=True))


def read_adapter(folder: str | Path) -> AdapterFolder:
    """Read a folder that peft, or `write_adapter`, has written.

    Raises:
        ValueError: It is no folder of a LoRA adapter, a file cannot be read, or a tensor is not finite.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {CONFIG} and {WEIGHTS}")
    config, tensors = _config_in(folder / CONFIG), _tensors_in(folder / WEIGHTS)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(
            f"{folder} has an adapter of type {config.get('peft_type')}, or DoRA; only plain LoRA is supported"
        )
    found: dict[str, dict[str, Any]] = {}
    whole = {}
    refuse_infinite(folder, tensors.items())
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = KEY.fullmatch(name)
        if match is None:
            whole[name.replace(".modules_to_save.default.", ".")] = tensor
            continue
        entry = found.setdefault(match["path"].replace(".base_layer", ""), {})
        entry[match["letter"]], entry["of_embedding"] = tensor, bool(match["embedding"])
    if halves := [path for path, entry in found.items() if not {"A", "B"} <= set(entry)]:
        raise ValueError(f"{folder / WEIGHTS} has one factor without the other for {halves[:5]}")
    pairs = {path: _pair(path, entry, config) for path, entry in found.items()}
    return AdapterFolder(pairs, whole, config.get("base_model_name_or_path"), bool(config.get("fan_in_fan_out")))


def _config_in(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} contains a {type(found).__name__}; expected an object")
    if found.get("peft_type") == "LORA" and (missing := [key for key in ("lora_alpha", "r") if key not in found]):
        raise ValueError(f"{file} lacks {missing}, which give the scaling of the adapter")
    return found


def _tensors_in(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {why_unreadable(file, error)}") from error


def _pair(path: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> Pair:
    a, b = entry["A"], entry["B"]
    alpha = _by_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    rank = _by_pattern(config.get("rank_pattern") or {}, path, config["r"])
    scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return Pair(a, b.flatten(1), float(scaling), entry["of_embedding"])


def _by_pattern(patterns: Mapping[str, Any], path: str, usual: Any) -> Any:
    """Of the first pattern that fits, as peft takes it."""
    fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(fitting, usual)


def _config(adapter: AdapterFolder) -> dict[str, Any]:
    ranks = {path: pair.rank for path, pair in adapter.pairs.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {path: pair.scaling * pair.rank for path, pair in adapter.pairs.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.inputs_as_rows,
        "init_lora_weights": True,
        "use_rslora": False,
        # Not a list, whose entries would fit the ends of other names too.
        "target_modules": "|".join(re.escape(path) for path in adapter.pairs),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual},
        "alpha_pattern": {f"^{re.escape(path)}": value for path, value in alphas.items() if value != alpha},
    }
