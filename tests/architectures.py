"""All attention of the installed transformers with queries, keys and values in one layer, small, and how it is called.

`python -m tests.architectures` writes the table of docs/evidence/architectures.md.
"""

import ast
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lowrank.models.fused import KNOWN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

HEADS, HEAD, SIDE = 4, 4, 2
INNER, PLACES = HEADS * HEAD, SIDE * SIDE

# What constructors read of a config.
CONFIG: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim"), INNER),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads"), HEADS),
    **dict.fromkeys(("num_kv_heads",), HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels"), HEAD),
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "attn_pdrop"), 0.0),
    **dict.fromkeys(("resid_pdrop", "attn_drop_rate", "drop_rate", "dropout", "resid_dropout"), 0.0),
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "slow_but_exact"), False
    ),
    **dict.fromkeys(("qkv_bias", "attention_bias", "use_bias", "bias"), True),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "max_pos_emb"), 16),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), 1e-6),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "block_size", "pretraining_tp"), 2),
    **dict.fromkeys(("image_size", "window_size"), SIDE),
    **dict.fromkeys(("use_rel_pos", "use_relative_position_embeddings", "qk_layernorm", "alibi"), False),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "rotary", "multi_query"), False),
    **dict.fromkeys(("new_decoder_architecture", "relative_attention", "talking_head"), False),
    **dict.fromkeys(("has_relative_attention_bias", "has_spatial_attention_bias", "is_decoder"), False),
    **dict.fromkeys(("scale_attn_weights", "fast_qkv", "is_causal"), True),
    "_attn_implementation": "eager",
    "patch_size": 1,
    "hidden_dim": INNER,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"partial_rotary_factor": 1.0, "rope_type": "default", "rope_theta": 1e4},
    "rotary_dim": 2,
    "context_size": PLACES,
    "local_attention": 128,
    "sliding_window": None,
    "deterministic_flash_attn": False,
    "pos_att_type": [],
    "position_buckets": -1,
    "attn_config": SimpleNamespace(attn_pdrop=0.0, clip_qkv=1e6, softmax_scale=None, kv_n_heads=HEADS, rope_theta=1e4),
    "clip_qkv": None,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "attention_multiplier": 1.0,
}


def config(**changed: Any) -> Any:
    return SimpleNamespace(**CONFIG | changed)


def found(output: Any) -> Tensor:
    """The first tensor, with a row for each position."""
    while isinstance(output, tuple | list):
        output = output[0]
    return output.reshape(-1, output.shape[-1])  # type: ignore[no-any-return]


def rotation(*batch: int, width: int = HEAD) -> tuple[Tensor, Tensor]:
    angles = torch.arange(PLACES)[:, None] * torch.linspace(0.1, 0.7, width // 2).repeat(2)
    return tuple(part.expand(*batch, PLACES, width).double() for part in (angles.cos(), angles.sin()))  # type: ignore[return-value]


Call = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Case:
    """An attention that can be run.

    Attributes:
        package: Folder of its model.
        cls: Its class.
        attribute: Of the fused layer.
        make: Makes it from its class.
        call: Runs it on rows, one for each position.
        values_are_linear: Whether what it puts out is linear in its values.
        mixes_places: Whether its scores compare places, not features.
        dtype: That it can be run in.
    """

    package: str
    cls: str
    attribute: str
    make: Callable[[Any], nn.Module] = lambda cls: cls(config())
    call: Call = lambda layer, x: layer(x[None])
    values_are_linear: bool = True
    mixes_places: bool = True
    dtype: torch.dtype = torch.double

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        module = import_module(f"transformers.models.{self.package}.modeling_{self.package}")
        layer = self.make(getattr(module, self.cls)).to(self.dtype).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer


def image(layer: nn.Module, x: Tensor) -> Any:
    return layer(x.reshape(1, SIDE, SIDE, -1))


def packed(layer: nn.Module, x: Tensor) -> Any:
    lengths = torch.tensor([0, len(x)], dtype=torch.int32)
    return layer(x, cu_seqlens=lengths, max_seqlen=len(x), position_embeddings=rotation())


def rotated(layer: nn.Module, x: Tensor) -> Any:
    return layer(x[None], position_embeddings=rotation(1), attention_mask=None)


def numbered(cls: Any) -> nn.Module:
    return cls(config(), layer_idx=0)  # type: ignore[no-any-return]


def everything() -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(1, 1, PLACES, PLACES)


def no_bias() -> Tensor:
    return torch.zeros(1, HEADS, PLACES, PLACES, dtype=torch.double)


VISION = {
    "cohere_compass": "CohereCompassVisionAttention",
    "dots3_note": "Dots3NoteVisionAttention",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeVisionAttention",
    "exaone4_5": "Exaone4_5_VisionAttention",
    "glm4v": "Glm4vVisionAttention",
    "glm4v_moe": "Glm4vMoeVisionAttention",
    "glm5_next": "Glm5NextVisionAttention",
    "glm_image": "GlmImageVisionAttention",
    "glm_ocr": "GlmOcrVisionAttention",
    "qwen2_5_vl": "Qwen2_5_VLVisionAttention",
    "qwen2_vl": "VisionAttention",
    "qwen3_5": "Qwen3_5VisionAttention",
    "qwen3_5_moe": "Qwen3_5MoeVisionAttention",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionAttention",
    "qwen3_vl": "Qwen3VLVisionAttention",
    "qwen3_vl_moe": "Qwen3VLMoeVisionAttention",
    "qwen4_exp": "Qwen4ExpVisionAttention",
}
SAM = {
    "deepseek_ocr2": "DeepseekOcr2SamVisionAttention",
    "got_ocr2": "GotOcr2VisionAttention",
    "pp_formulanet": "PPFormulaNetVisionAttention",
    "sam": "SamVisionAttention",
    "sam_hq": "SamHQVisionAttention",
    "slanext": "SLANeXtVisionAttention",
    "unlimited_ocr": "UnlimitedOcrSamVisionAttention",
}
BLIP = {
    "blip": "BlipAttention",
    "blip_2": "Blip2Attention",
    "instructblip": "InstructBlipAttention",
    "instructblipvideo": "InstructBlipVideoAttention",
    "mgp_str": "MgpstrAttention",
    "timesformer": "TimesformerSelfAttention",
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecAttention",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecAttention",
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecAttention",
}
STAGES = {"embed_dim": [INNER], "num_heads": [HEADS], "num_groups": [HEADS]}

CASES = [
    *(Case(package, cls, "qkv", call=packed) for package, cls in VISION.items()),
    *(Case(package, cls, "qkv", lambda cls: cls(config(), window_size=0), image) for package, cls in SAM.items()),
    *(Case(package, cls, "qkv") for package, cls in BLIP.items()),
    Case("seggpt", "SegGptAttention", "qkv", call=image),
    Case("vitdet", "VitDetAttention", "qkv", call=image),
    Case("hiera", "HieraMaskUnitAttention", "qkv", lambda cls: cls(INNER, INNER, HEADS)),
    Case("sam2", "Sam2MultiScaleAttention", "qkv", lambda cls: cls(config(), INNER, INNER, HEADS), image),
    Case("florence2", "Florence2VisionWindowAttention", "qkv", lambda cls: cls(config(**STAGES), 0), image),
    Case(
        "florence2", "Florence2VisionChannelAttention", "qkv", lambda cls: cls(config(**STAGES), 0), mixes_places=False
    ),
    Case(
        "layoutlmv2",
        "LayoutLMv2SelfAttention",
        "qkv_linear",
        call=lambda layer, x: layer(x[None], everything() * 0),
        dtype=torch.float,
    ),
    *(
        Case(package, cls, "c_attn", numbered)
        for package, cls in (("gpt2", "GPT2Attention"), ("imagegpt", "ImageGPTAttention"))
    ),
    Case("decision_transformer", "DecisionTransformerGPT2Attention", "c_attn", numbered),
    Case("openai", "Attention", "c_attn", lambda cls: cls(INNER, 16, config())),
    Case("gpt_bigcode", "GPTBigCodeAttention", "c_attn", numbered),
    Case("dbrx", "DbrxAttention", "Wqkv", numbered, rotated),
    Case("modernbert", "ModernBertAttention", "Wqkv", numbered, rotated),
    Case("mpt", "MptAttention", "Wqkv", numbered, lambda layer, x: layer(x[None], no_bias()[0])),
    Case("phi3", "Phi3Attention", "qkv_proj", numbered, rotated),
    Case("phi4_multimodal", "Phi4MultimodalAttention", "qkv_proj", numbered, rotated),
    Case(
        "codegen",
        "CodeGenAttention",
        "qkv_proj",
        numbered,
        lambda layer, x: layer(x[None], position_ids=torch.arange(PLACES)[None]),
    ),
    Case("minimax", "MiniMaxLightningAttention", "qkv_proj", numbered, rotated, values_are_linear=False),
    Case(
        "bloom",
        "BloomAttention",
        "query_key_value",
        numbered,
        lambda layer, x: layer(x[None], torch.zeros_like(x[None]), no_bias()[0, :, :1], everything() * 0),
    ),
    Case(
        "falcon",
        "FalconAttention",
        "query_key_value",
        numbered,
        lambda layer, x: layer(x[None], None, everything() * 0, position_embeddings=rotation(1)),
    ),
    Case("gpt_neox", "GPTNeoXAttention", "query_key_value", numbered, rotated),
    Case(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseAttention",
        "query_key_value",
        numbered,
        lambda layer, x: layer(x[None], None, torch.arange(PLACES)[None], position_embeddings=rotation(1)),
    ),
    Case("persimmon", "PersimmonAttention", "query_key_value", numbered, rotated),
    Case("deberta", "DisentangledSelfAttention", "in_proj", call=lambda layer, x: layer(x[None], everything())),
    Case(
        "evolla",
        "EvollaSequenceCompressorAttention",
        "to_kv",
        lambda cls: cls(INNER, HEAD, HEADS),
        lambda layer, x: layer(x[None], x[None, -1:], torch.ones(1, PLACES + 1)),
    ),
    *(
        Case(package, cls, "to_kv", call=lambda layer, x: layer(x[None], torch.zeros(PLACES, PLACES, dtype=torch.long)))
        for package, cls in (
            ("granite_speech", "GraniteSpeechConformerAttention"),
            ("granite_speech_plus", "GraniteSpeechPlusConformerAttention"),
        )
    ),
    Case("jetmoe", "JetMoeAttention", "kv_proj", numbered, rotated),
]


LAYER = re.compile(r"\w*qkv\w*|c_attn|query_key_value|in_proj\w*|to_kv|kv_proj|linear_kv", re.IGNORECASE)
PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "architectures.md"
HEAD_OF_PAGE = """# Architectures: how fused projections are split

Attention layers often compute queries, keys and values in one *fused projection*. Neither the layer's name nor its
shape tells in which order they come out: only the forward method of the class that holds the layer does. This table
lists all layers of transformers {version} whose names suggest such a projection. The last column gives the order of
their outputs, slowest axis first.

- *qkv heads d* and similar: the layer is split, and tags end in `.q`, `.k`, `.v`, or with `heads=True` in `.q.h0` and
  so on. Each order was tested by running the layer (`tests/models/test_fused.py`). The gradient of the output at one
  position has rank one in q and in no other part. The output is linear in v and in no other part. Heads do not
  influence each other. For two models the test checks less, and says so: MiniMax applies an activation to its values,
  and the channels of Florence-2 attend to each other. If queries have more heads than keys (grouped-query or
  multi-query attention), the matrix stays whole. For `Attention` and `AttentionRope` of timm, and for
  `ShiftedWindowAttention` of torchvision (`qkv`), the order was read from the source and not tested.
- *whole*: the layer stays one matrix, because it contains gates of a convolution or of a recurrence, or parts of
  unequal size. Use `views` to split it yourself.

The command `python -m tests.architectures` writes this page; a test compares it with the installed version.

| model | class | layer | what comes out |
|---|---|---|---|
"""


@cache
def layers() -> list[tuple[str, str, str]]:
    """Model, class and attribute of all layers in the installed version that may be fused projections."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        classes = ast.parse(text).body if LAYER.search(text) else []
        for cls in (node for node in classes if isinstance(node, ast.ClassDef)):
            made = [node for node in ast.walk(cls) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
            names = {
                t.attr for n in made for t in n.targets if isinstance(t, ast.Attribute) and LAYER.fullmatch(t.attr)
            }
            found += [(path.parent.name, cls.name, name) for name in sorted(names)]
    return found


def page() -> str:
    """The table, with what it means."""
    rows = [
        f"| {model} | `{cls}` | `{name}` | {KNOWN.get(('transformers', cls, name), 'whole')} |"
        for model, cls, name in layers()
    ]
    return HEAD_OF_PAGE.format(version=transformers.__version__) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
