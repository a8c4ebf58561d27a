"""Make a low-bit checkpoint from a model: reorder, outliers, groups, clip, GPTQ and KV, each step a switch.

Example: atom quantize smollm2 --scheme w4a4 --calib text.txt --windows 16 --window-length 512 --output smollm2-w4a4
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from atom.calibration.config import CalibrationConfig

from ..quant.presets import get_scheme
from ..quant.schemes import Scheme
from ..quant.switches import Switches


@dataclass(frozen=True)
class Options:
    """Options of `atom quantize`."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, model directory, GGUF file, or the alias smollm2."""

    scheme: str = "w4a4"
    """w4a4, w4a8, w4a16, w8a8, fp8, nvfp4, mxfp4, nvint4, w3a3 or bf16; +kv4, +kv8, +kvfp8, +kv16 choose the cache."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Directory to write; default MODEL-SCHEME here."""

    resume: bool = False
    """Continue the run that was stopped, at the layer it was in."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    calibration: Annotated[CalibrationConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CalibrationConfig)
    switches: Annotated[Switches, tyro.conf.OmitArgPrefixes] = field(default_factory=Switches)

    def __post_init__(self) -> None:
        self.build_scheme()

    def build_scheme(self) -> Scheme:
        """The scheme after the switches; ValueError if they do not fit together."""
        return self.switches.apply(get_scheme(self.scheme), self.calibration.gptq)

    @property
    def config(self) -> CalibrationConfig:
        """The options of calibration; a clip that was given is not measured."""
        given = self.switches.activation_clip is not None
        return replace(self.calibration, clip="constant") if given else self.calibration

    @property
    def directory(self) -> Path:
        stem = Path(self.model).name.removesuffix(".gguf")
        return self.output or Path(f"{stem}-{self.scheme.replace('+', '-')}")


def run(options: Options) -> dict[str, Any]:
    """Quantize; print what was done; return where it lies and what it took."""
    from atom.calibration.progress import Bar
    from atom.calibration.stream import quantize_model

    from .console import console

    report = quantize_model(
        options.model,
        options.build_scheme(),
        options.directory,
        options.config,
        options.resume,
        Bar(),
        options.revision,
    )
    totals = report.totals
    size = f"{totals['bytes'] / 2**20:,.1f} MiB in {totals['seconds']:.0f} s"
    console.print(f"wrote {options.directory}: {options.scheme}, {size}; see atom report quant {options.directory}")
    return {"output": str(options.directory), "scheme": options.scheme, "totals": totals}
