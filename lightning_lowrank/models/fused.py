"""Fused projections: queries, keys and values in one weight, in the order in which the class of the layer's parent
reads them.

No name tells that order. GPT-2's `c_attn` has one block for each, and GPT-NeoX's `query_key_value` alternates all three
for every head. CodeGen's `qkv_proj` has queries, values and keys in four blocks, and LFM2's `in_proj` has no queries at
all. A weight of an unknown class is not split.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

# Axes that know their length and the names of their entries.
PARTS = ("qkv", "qvk", "kv")

# By package, attribute and the order of what comes out: the classes whose forward reads it so.
_READ_AS = {
    ("transformers", "qkv", "qkv heads d"): (
        "Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention "
        "Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Exaone4_5_VisionAttention "
        "Florence2VisionChannelAttention Florence2VisionWindowAttention Glm4vMoeVisionAttention Glm4vVisionAttention "
        "Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention "
        "HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention "
        "PPFormulaNetVisionAttention PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention "
        "Qwen2_5_VLVisionAttention Qwen3OmniMoeVisionAttention Qwen3VLMoeVisionAttention Qwen3VLVisionAttention "
        "Qwen3_5MoeVisionAttention Qwen3_5VisionAttention Qwen4ExpVisionAttention SLANeXtVisionAttention "
        "Sam2MultiScaleAttention SamHQVisionAttention SamVisionAttention SegGptAttention TimesformerSelfAttention "
        "UnlimitedOcrSamVisionAttention VisionAttention VitDetAttention"
    ),
    ("transformers", "c_attn", "qkv heads d"): (
        "Attention DecisionTransformerGPT2Attention GPT2Attention ImageGPTAttention"
    ),
    ("transformers", "Wqkv", "qkv heads d"): "DbrxAttention ModernBertAttention MptAttention",
    ("transformers", "qkv_linear", "qkv heads d"): "LayoutLMv2SelfAttention",
    ("transformers", "qkv_proj", "qkv heads d"): "Phi3Attention Phi4MultimodalAttention",
    ("transformers", "query_key_value", "heads qkv d"): (
        "BloomAttention FalconAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention"
    ),
    ("transformers", "c_attn", "heads qkv d"): "GPTBigCodeAttention",
    ("transformers", "in_proj", "heads qkv d"): "DisentangledSelfAttention",
    ("transformers", "qkv_proj", "heads qkv d"): "MiniMaxLightningAttention",
    ("transformers", "qkv_proj", "blocks qvk heads d"): "CodeGenAttention",
    ("transformers", "to_kv", "kv heads d"): (
        "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention GraniteSpeechPlusConformerAttention"
    ),
    ("transformers", "kv_proj", "kv heads d"): "JetMoeAttention",
    ("timm", "qkv", "qkv heads d"): "Attention AttentionRope",
    ("torchvision", "qkv", "qkv heads d"): "ShiftedWindowAttention ShiftedWindowAttentionV2",
}
KNOWN = {
    (package, cls, attribute): order
    for (package, attribute, order), classes in _READ_AS.items()
    for cls in classes.split()
}

# CodeGen cuts by the cores of the machine that it was trained on.
NUM_BLOCKS = 4

NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
NUM_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")

# Modules that are around a layer and no part of the model.
AROUND = frozenset({"base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Fused:
    """How a fused projection is read.

    Attributes:
        order: Axes of what comes out, the slowest first.
        heads: Number of the heads of queries, 0 where it is not known.
        key_heads: Of keys and of values.
    """

    order: str
    heads: int
    key_heads: int

    @property
    def parts(self) -> str:
        """The axis of queries, keys and values."""
        return next(axis for axis in self.order.split() if axis in PARTS)

    @property
    def num_heads(self) -> int:
        """Of each part, where all have as many."""
        return self.heads if "q" in self.parts else self.key_heads

    def pattern(self, *, heads: bool) -> tuple[str, dict[str, int]] | None:
        """An einops pattern from the outputs to their parts (and heads), and lengths of axes. None if the parts are
        unknown or have several sizes.
        """
        sizes, axes = {"blocks": NUM_BLOCKS, "heads": self._heads_in_a_block}, self.order.split()
        if "q" in self.parts and self.heads != self.key_heads:
            return None
        if not heads and axes[0] == self.parts:
            return f"({self.parts} d) -> {self.parts} d", {}
        if not sizes["heads"]:
            return None
        rest = " ".join(axis for axis in axes if axis not in (self.parts, "d"))
        behind = f"({rest}) d" if heads else f"({rest} d)"
        return f"({self.order}) -> {self.parts} {behind}", {axis: sizes[axis] for axis in rest.split()}

    def width(self, rows: int) -> int:
        """How many of so many rows are queries; of a projection without queries, those of the keys."""
        if "q" not in self.parts:
            return rows // 2
        if self.heads and self.key_heads:
            return rows * self.heads // (self.heads + 2 * self.key_heads)
        return rows // 3

    @property
    def _heads_in_a_block(self) -> int:
        if "blocks" not in self.order:
            return self.num_heads
        return 0 if self.num_heads % NUM_BLOCKS else self.num_heads // NUM_BLOCKS


def fused(path: str, layers: Mapping[str, nn.Module]) -> Fused | None:
    """How the layer at a path is read, None where it is no fused projection of a class that is known.

    Args:
        path: Of the layer.
        layers: All modules by their paths.
    """
    names = path.split(".")
    while names and names[-1] in AROUND:
        names.pop()
    holder = layers.get(".".join(names[:-1]))
    order = _order(holder, names[-1]) if names else None
    if order is None:
        return None
    if getattr(holder, "is_cross_attention", False):
        order = order.replace("qkv", "kv")
    heads = number(holder, NUM_HEADS) or number(getattr(holder, "config", None), NUM_HEADS)
    return Fused(order, heads, number(holder, NUM_KEY_HEADS) or heads)


def number(holder: object, names: tuple[str, ...]) -> int:
    """The first of some attributes that is a positive whole number, 0 where none is."""
    given = (getattr(holder, name, None) for name in names)
    return next((value for value in given if type(value) is int and value > 0), 0)


def _order(holder: nn.Module | None, attribute: str) -> str | None:
    """As the nearest base class that is known reads it."""
    keys = ((cls.__module__.partition(".")[0], cls.__name__, attribute) for cls in type(holder).__mro__)
    return next((KNOWN[key] for key in keys if key in KNOWN), None)
