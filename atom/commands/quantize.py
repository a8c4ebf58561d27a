"""Make a low-bit checkpoint from a model: reorder, outliers, groups, clip, GPTQ and KV, each step a switch.

Example: atom quantize smollm2 --scheme w4a4 --calib text.txt --windows 16 --window-length 512 --output smollm2-w4a4
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..quant.granularity import Channel, Group, Token
from ..quant.presets import get_scheme
from ..quant.schemes import OutlierSpec, RotationSpec, Scheme


@dataclass(frozen=True)
class Options:
    """Options of `atom quantize`. What is left out is as the scheme has it."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, model directory, GGUF file, or the alias smollm2."""

    scheme: str = "w4a4"
    """w4a4, w4a8, w4a16, w8a8, fp8, nvfp4, mxfp4, nvint4, w3a3 or bf16; +kv4, +kv8, +kvfp8, +kv16 choose the cache."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Directory to write; default MODEL-SCHEME here."""

    calib: str = "wikitext2"
    """wikitext2, c4, pile (through `datasets`), a .txt, .jsonl or .parquet file (.gz too), or self (sampled text)."""

    windows: int = 128
    """Windows of calibration text."""

    window_length: int = 2048
    """Tokens of a window."""

    seed: int = 0
    """Draws the windows."""

    resume: bool = False
    """Continue the run that was stopped, at the layer it was in."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""

    gptq: bool = True
    """Correct each column's error in the columns after it; --no-gptq rounds to nearest."""

    damping: float = 0.01
    """GPTQ: share of the Hessian's mean diagonal that is added to the diagonal."""

    batch_tokens: int = 8192
    """Tokens that run through a layer at once: fewer take less memory."""

    offload: Literal["auto", "on", "off"] = "auto"
    """Keep hidden states in host memory; auto: on a GPU that they would fill a quarter of."""

    reorder: bool | None = None
    """Sort input channels by energy."""

    outliers: int | None = None
    """Channels kept in higher precision: a multiple of 16; needs the reordering."""

    outlier_format: Literal["int8", "fp8_e4m3", "bf16"] | None = None
    """What the outlier channels are kept in."""

    group_size: int | None = None
    """Columns under one scale, for weights and activations; 0 gives one scale a channel and token."""

    weight_clip: float | Literal["mse"] | None = None
    """Share of the maximum that the weight grid reaches, or mse to search it."""

    activation_clip: float | None = None
    """Share of the maximum that the activation grid reaches."""

    rotation: Literal["none", "block_hadamard", "hadamard"] = "none"
    """Rotate the normal columns of every linear's input and weight."""

    rotation_block: int = 128
    """Columns of a Hadamard block."""

    kv_pre_rope: bool = False
    """Round keys before RoPE instead of after."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    def __post_init__(self) -> None:
        self.build_scheme()

    def build_scheme(self) -> Scheme:
        """The scheme after the switches; ValueError if they do not fit together."""
        scheme = get_scheme(self.scheme)
        if not scheme.is_quantized and self.outliers is None:
            return scheme
        weight, activation, outliers = scheme.weight, scheme.activation, scheme.outliers
        if self.group_size is not None:
            group = Group(self.group_size) if self.group_size else None
            weight = weight and replace(weight, granularity=group or Channel())
            activation = activation and replace(activation, granularity=group or Token())
        if self.weight_clip is not None and weight is not None:
            weight = replace(weight, clip=self.weight_clip)
        if self.activation_clip is not None and activation is not None:
            activation = replace(activation, clip=self.activation_clip)
        if not self.gptq and weight is not None:
            weight = replace(weight, scale_rule="max")  # the paper's grid for rounding to nearest
        if self.outliers is not None or self.outlier_format is not None:
            count = outliers.count if self.outliers is None else self.outliers
            outliers = OutlierSpec(count, self.outlier_format or outliers.format)
        reorder = bool(outliers.count) or scheme.reorder if self.reorder is None else self.reorder
        rotation = scheme.rotation if self.rotation == "none" else RotationSpec(self.rotation, self.rotation_block)
        return replace(
            scheme,
            weight=weight,
            activation=activation,
            outliers=outliers,
            reorder=reorder,
            rotation=rotation,
            kv_pre_rope=self.kv_pre_rope,
        )

    @property
    def directory(self) -> Path:
        stem = Path(self.model).name.removesuffix(".gguf")
        return self.output or Path(f"{stem}-{self.scheme.replace('+', '-')}")


def run(options: Options) -> dict[str, Any]:
    """Quantize; print what was done; return where it lies and how large the errors are."""
    from atom.calibration.config import CalibrationConfig
    from atom.calibration.progress import Bar
    from atom.calibration.stream import quantize_model

    config = CalibrationConfig(
        data=options.calib,
        num_windows=options.windows,
        window_length=options.window_length,
        seed=options.seed,
        gptq=options.gptq,
        damping=options.damping,
        device=options.device,
        batch_tokens=options.batch_tokens,
        offload=options.offload,
    )
    report = quantize_model(
        options.model, options.build_scheme(), options.directory, config, options.resume, Bar(), options.revision
    )
    return {"output": str(options.directory), "scheme": options.scheme, "report": report.to_dict()}
