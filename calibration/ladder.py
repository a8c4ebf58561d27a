"""The paper's ablation as schemes: from plain rounding to the whole recipe, one step added at a time.

Source: Atom, arXiv:2310.19102, table 3. Every step but the first quantizes weights and activations to 4 bits. The
steps `groups` and `clip` have the paper's bf16 scales and constants; those behind them have our recipe's scales and its
clips, searched and measured. The last step, `distill`, is not the paper's: the whole rounded model learns what the
full-precision model predicts.
"""

from dataclasses import dataclass, replace

from atom.quant.granularity import Channel, Group, Token
from atom.quant.presets import get_scheme
from atom.quant.schemes import OutlierSpec, Scheme, TensorSpec

from .config import Clip

PAPER_WEIGHT_CLIP, PAPER_ACTIVATION_CLIP = 0.85, 0.9


@dataclass(frozen=True)
class Step:
    """One rung: its name, what runs, whether GPTQ finds the weights, where activation clips come from, and whether the
    checkpoint is trained after that."""

    name: str
    scheme: Scheme
    gptq: bool = False
    clip: Clip = "constant"
    distilled: bool = False


def ladder(outliers: int = 128) -> list[Step]:
    """fp, rtn, outliers-bf16, outliers-int8, groups, clip, gptq, kv4, distill; the full recipe last."""
    recipe = replace(get_scheme("w4a4"), outliers=OutlierSpec(outliers))
    assert recipe.weight is not None and recipe.activation is not None
    plain_weight = TensorSpec("int4", Channel())
    plain_activation = TensorSpec("int4", Token(), dynamic=True)
    grouped_weight = TensorSpec("int4", Group(128))
    grouped_activation = replace(grouped_weight, dynamic=True)
    plain = Scheme("w4a4", plain_weight, plain_activation)
    mixed = replace(plain, outliers=OutlierSpec(outliers), reorder=True)
    grouped = replace(mixed, weight=grouped_weight, activation=grouped_activation)
    clipped = replace(
        grouped,
        weight=replace(grouped_weight, clip=PAPER_WEIGHT_CLIP),
        activation=replace(grouped_activation, clip=PAPER_ACTIVATION_CLIP),
    )
    return [
        Step("fp", get_scheme("bf16")),
        Step("rtn", plain),
        Step("outliers-bf16", replace(mixed, outliers=OutlierSpec(outliers, "bf16"))),
        Step("outliers-int8", mixed),
        Step("groups", grouped),
        Step("clip", clipped),
        Step("gptq", replace(recipe, kv=None, kv_offset="bias", kv_rotation="none"), gptq=True, clip="measured"),
        Step("kv4", recipe, gptq=True, clip="measured"),
        Step("distill", recipe, gptq=True, clip="measured", distilled=True),
    ]


def scaled_outliers(hidden_size: int) -> int:
    """The share of outlier channels that 128 are of 4096, as a multiple of 16: 16 of 576."""
    return max(16, round(hidden_size * 128 / 4096 / 16) * 16)
