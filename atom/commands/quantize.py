"""Make a low-bit checkpoint from a model: reorder, outliers, groups, clip, GPTQ and KV, each step a switch.

Example: atom quantize smollm2 --scheme w4a4 --calib text.txt --windows 16 --window-length 512 --output smollm2-w4a4
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from atom.calibration.config import CalibrationConfig
from atom.calibration.recommended import AUTO, resolve

from ..checkpoint import check_output
from ..quant.presets import get_scheme
from ..quant.schemes import Scheme
from ..quant.switches import Switches


@dataclass(frozen=True)
class Options:
    """Options of `atom quantize`."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, model directory, GGUF file, or the alias smollm2."""

    scheme: str | None = None
    """w4a4, w4a8, w4a4-hadamard, w4a8-hadamard, w4a16, w8a8, fp8, nvfp4, mxfp4, nvint4, w3a3, bf16, or auto: what
    measurements recommend for the GPU; +kv4, +kv8, +kvfp8, +kv16 choose the cache, +kv3, +kv2 one without kernels.
    Default: w4a4, and as the base of a budget w4a4-hadamard."""

    gpu: str | None = None
    """The GPU that will serve the model, for --scheme auto: h100 or h200; default this machine's."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Directory to write; default MODEL-SCHEME here."""

    budget: float | None = None
    """Choose formats and outlier counts input by input, and the cache layer by layer, at most so many bits an operand:
    of weights, activations and cached values."""

    max_loss: float | None = None
    """The same, with the fewest bits whose predicted divergence from full precision is at most so many nats a token."""

    budget_windows: int = 8
    """Calibration windows that the choice is measured on."""

    budget_length: int = 512
    """Tokens of each of them."""

    budget_context: int = 2048
    """Tokens whose cached values count, once each, beside the weights; 0 leaves the cache as the scheme has it."""

    resume: bool = False
    """Continue the run that was stopped, at the layer it was in."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    calibration: Annotated[CalibrationConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CalibrationConfig)
    switches: Annotated[Switches, tyro.conf.OmitArgPrefixes] = field(default_factory=Switches)

    def __post_init__(self) -> None:
        if self.gpu is not None and not self.is_auto:
            raise ValueError(f"--gpu chooses what --scheme auto means, and the scheme is {self.preset}; drop --gpu")
        self.build_scheme()
        if self.budget is not None and self.max_loss is not None:
            raise ValueError("--budget and --max-loss exclude each other; give one of them")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"--budget is the mean bits of an operand, above 0; got {self.budget:g}")
        if self.max_loss is not None and not self.max_loss > 0:
            raise ValueError(f"--max-loss is a divergence in nats a token, above 0; got {self.max_loss:g}")
        if self.budget_context < 0:
            raise ValueError(f"budget_context counts tokens from 0, got {self.budget_context}; leave it out for 2048")
        if self.budget_windows < 1 or self.budget_length < 2:
            raise ValueError(
                f"{self.budget_windows} budget_windows of budget_length {self.budget_length} measure nothing; give at "
                "least 1 of at least 2 tokens, or leave both out for 8 of 512"
            )

    def build_scheme(self) -> Scheme:
        """The scheme after the switches; ValueError if they do not fit together."""
        return self.switches.apply(get_scheme(self.preset), self.calibration.gptq)

    @property
    def has_budget(self) -> bool:
        """Formats are chosen by place, the scheme is their base."""
        return self.budget is not None or self.max_loss is not None

    @property
    def is_auto(self) -> bool:
        return self.scheme is not None and self.scheme.partition("+")[0] == AUTO

    @property
    def preset(self) -> str:
        """The scheme's name, where it is auto that of the GPU's."""
        if self.scheme is None:
            return "w4a4-hadamard" if self.has_budget else "w4a4"
        return str(resolve(self.scheme, self.gpu))

    @property
    def config(self) -> CalibrationConfig:
        """The options of calibration; a clip that was given is not measured."""
        given = self.switches.activation_clip is not None
        return replace(self.calibration, clip="constant") if given else self.calibration

    @property
    def directory(self) -> Path:
        stem = Path(self.model).name.removesuffix(".gguf")
        return self.output or Path(f"{stem}-{self.preset.replace('+', '-')}")


def run(options: Options) -> dict[str, Any]:
    """Quantize; print what was done; return where it lies and what it took."""
    from atom.calibration.progress import Bar
    from atom.calibration.stream import quantize_model

    from .console import console, progress_console

    scheme = options.build_scheme()
    check_output(options.directory, options.resume)  # before a choice is measured
    if options.is_auto:
        console.print(
            f"scheme {options.scheme}: {options.preset}, as measurements on {options.gpu or 'this GPU'} recommend"
        )
    try:
        if options.has_budget:
            scheme = _choose_scheme(options, scheme)
        report = quantize_model(
            options.model,
            scheme,
            options.directory,
            options.config,
            options.resume,
            Bar(),
            options.revision,
        )
    except KeyboardInterrupt:
        progress_console.print("stopped; the same command with --resume goes on with what is done")
        raise
    totals = report.totals
    size = f"{totals['bytes'] / 2**20:,.1f} MiB in {totals['seconds']:.0f} s"
    name = f"{options.preset}, formats by place" if scheme.is_mixed else options.preset
    console.print(f"wrote {options.directory}: {name}, {size}; see atom report quant {options.directory}")
    if report.distilled is not None:
        console.print(
            "distilled in {steps} steps and {seconds:.0f} s: {kl_before:.4f} -> {kl_after:.4f} nats a token from full "
            "precision, on text held back; {share:.0%} of what was learned is kept".format(**report.distilled)
        )
    found = {"output": str(options.directory), "scheme": options.preset, "totals": totals}
    return found if report.distilled is None else {**found, "distilled": report.distilled}


def _choose_scheme(options: Options, base: Scheme) -> Scheme:
    """`base` with the formats that the budget affords, after printing the frontier and what was chosen."""
    import time
    from collections import Counter

    import torch
    from rich.table import Table

    from atom.calibration.budget import choose_by_budget
    from atom.calibration.data import load_windows
    from atom.calibration.sensitivity import losses_file
    from atom.calibration.stream import open_full_precision

    from ..models.source import load_tokenizer
    from .console import console, progress_console

    chosen: Scheme
    source, config = open_full_precision(options.model, options.revision), options.config
    tokenizer = load_tokenizer(source.path)
    windows = load_windows(config.calib, tokenizer, options.budget_windows, options.budget_length, config.seed)
    torch.set_float32_matmul_precision(config.matmul_precision)
    kept = losses_file(options.directory, source, base, windows.sha256, config)
    started = time.perf_counter()
    with progress_console.status("measuring what each choice loses") as status:
        chosen, plan, points, bits = choose_by_budget(
            source,
            base,
            windows.tokens,
            kept,
            config,
            options.budget,
            options.max_loss,
            lambda done, total: status.update(f"measuring what each choice loses: {done}/{total} inputs"),
            options.budget_context,
        )
    seconds = time.perf_counter() - started
    names = {"weight": "a weight", "activation": "an activation", "kv": "a cached value"}
    table = Table("bits an operand", "predicted loss, nats a token", "inputs and caches by choice")
    for point in [*points, plan]:
        counts = Counter(point.chosen.values()).most_common()
        name = f"{point.bits:.3f}" + (" (chosen)" if point is plan else "")
        table.add_row(name, f"{point.loss:.4f}", "; ".join(f"{count} {choice}" for choice, count in counts))
    console.print(table)
    chosen_bits = ", ".join(f"{names[kind]} {mean:.3f}" for kind, mean in bits.items())
    console.print(
        f"chosen bits: {chosen_bits}; {len(plan.chosen)} inputs and caches in {seconds:.0f} s, kept in {kept}"
    )
    return chosen
