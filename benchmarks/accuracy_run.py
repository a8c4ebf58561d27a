"""What the accuracy scripts share: their options, and one model with its texts, tokenised once for all checkpoints."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tyro
from measured import Perplexities
from parts import Part

from atom.calibration.config import CalibrationConfig
from atom.calibration.data import Windows, load_windows
from atom.calibration.distill import DistillText, load_distill_text
from atom.eval.load import Loaded, load
from atom.eval.perplexity import Bos
from atom.models.source import load_tokenizer, open_source


@dataclass(frozen=True)
class MeasureOptions:
    """What every accuracy script is asked: which model, on which texts, on what machine."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory, GGUF file or hub id of the full-precision model."""

    name: str
    """What the records call it."""

    output: Path
    """The part to write; what it holds already is kept and not measured again."""

    text: tuple[str, ...] = ("wikitext2",)
    """Test texts."""

    calib: str = "wikitext2"
    """Calibration text, disjoint from the test texts."""

    distill_calib: tuple[str, ...] = ()
    """Texts to distil on, in equal shares, disjoint from the test texts; default: the calibration text."""

    include_path: str | None = None
    """Folder of lm-eval task files."""

    task_limit: int | None = None
    """Documents of each task."""

    windows: int = 128
    """Calibration windows."""

    window_length: int = 2048
    """Tokens of a calibration window."""

    eval_window: int = 2048
    """Tokens of a test window."""

    limit: int | None = None
    """Test windows of each text."""

    device: str = "auto"
    """cpu or cuda."""

    machine: str = "cpu"
    """What the records call the machine: h200 or cpu."""

    source: str = ""
    """Where the weights come from (a GGUF's format, say); stands beside every number."""

    scratch: Path | None = None
    """Where checkpoints are written and removed again."""

    commit: str | None = None
    """The commit that is measured; default: the checkout's."""


@dataclass(frozen=True)
class Join:
    """Write the records from parts."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What measure wrote."""

    commit: str | None = None
    """The commit that was measured, of parts that do not say it."""


class AccuracyRun:
    """One model, measured under one scheme after another into a part; each script says what a measurement is.

    config  how every checkpoint is calibrated, but for what the script changes
    """

    def __init__(self, options: MeasureOptions, bos: Bos = "auto", **calibration: Any) -> None:
        """`calibration` are fields of CalibrationConfig that the script has options of its own for."""
        self.device = options.device
        self.part = Part.open(options.output, options.machine, options.commit)
        self.source = open_source(options.model)
        self.tokenizer = load_tokenizer(self.source.path)
        self.texts = Perplexities(self.tokenizer, options.text, options.eval_window, options.limit, bos)
        self.config = CalibrationConfig(
            calib=options.calib,
            distill_calib=options.distill_calib,
            windows=options.windows,
            window_length=options.window_length,
            device=options.device,
            **calibration,
        )

    @cached_property
    def windows(self) -> Windows:
        """The calibration text."""
        c = self.config
        return load_windows(c.calib, self.tokenizer, c.windows, c.window_length, c.seed)

    @cached_property
    def distill_text(self) -> DistillText:
        """What is trained on, and judged by."""
        return load_distill_text(self.tokenizer, self.config, self.windows)

    @cached_property
    def full(self) -> Loaded:
        """The model in full precision."""
        return self.load(self.source.path)

    def prepare(self) -> None:
        """Load what every measurement needs now, so that it is in no row's seconds."""
        _ = self.windows, self.full

    def load(self, where: Path) -> Loaded:
        """A model or checkpoint on the reference path, in float32."""
        return load(str(where), self.device, "float32", "reference")

    def calibration(self, steps: int, how: str = "") -> dict[str, Any]:
        """Keys of a row: on what text it was calibrated, and `how`, and on what it was distilled, for `steps`."""
        c = self.config
        text = f"{c.windows} x {c.window_length} of {Path(c.calib).name}{how}"
        if steps:
            names = " and ".join(Path(name).name for name in c.distill_calib or (c.calib,))
            text += f", distilled on {steps} x {c.distill_tokens} tokens of {names}"
        return {"calibration": text, "distill_steps": steps}
