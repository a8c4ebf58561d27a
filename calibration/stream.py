"""The whole-model driver: layer after layer from the source to the checkpoint.

In memory at a time: one decoder layer, its activations in batches, and the hidden states of the calibration windows
between two layers. Weights are read on demand and written when they are done, one shard a layer, so a killed run
loses at most the layer it was in. A resumed run keeps no activations: it runs the quantized layers again.
"""

import logging
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atom
from atom.checkpoint import CheckpointWriter, check_output, quantization_config, read_scheme
from atom.circumstances import current_commit
from atom.errors import CalibrationError, CheckpointError, UnsupportedError
from atom.models.device import choose_device
from atom.models.family import model_config
from atom.models.layout import check_source, is_ignored, model_tensors
from atom.models.loader import meta_model
from atom.models.model import Model
from atom.models.source import Source, load_tokenizer, open_source
from atom.models.tokens import Tokenizer
from atom.quant.schemes import Scheme

from .config import CalibrationConfig
from .data import SELF, Windows, load_windows
from .distill import DistillText, distill_checkpoint, load_distill_text
from .distill_plan import default_steps, free_gpu_bytes, plan_distillation
from .passes import Passes
from .plan import check_sizes, plan_layer
from .progress import Progress, Silent
from .report import Report, total
from .rotated import rotate_source
from .sample import sample_windows

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"


def quantize_model(
    source: str | Path,
    scheme: Scheme,
    out: Path,
    config: CalibrationConfig,
    resume: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
) -> Report:
    """Quantize the model called `source` (directory, GGUF file, hub id, alias) into the directory `out`.

    resume    continue the unfinished run in OUT.partial; the result is the same, bit for bit
    progress  told about every layer
    Raises CheckpointError if the source is damaged, `out` is not empty, the disk is full, or OUT.partial is another
    run's; CalibrationError if text or statistics cannot be used; ValueError if the scheme does not fit the model.
    """
    config = replace(config, device=str(choose_device(config.device)))
    check_output(out, resume)  # before anything is downloaded, tokenised or sampled
    opened = open_full_precision(source, revision)
    tokenizer = load_tokenizer(opened.path)  # missing files are an error now rather than at the first prompt
    windows = _windows(opened, tokenizer, config) if is_calibrated(opened, scheme) else None
    config = _with_distillation(opened, scheme, config, progress or Silent())
    if windows is not None and config.distill_steps:
        text = load_distill_text(tokenizer, config, windows)
        return quantize_and_distill(opened, scheme, out, config, windows, text, resume, progress)
    return quantize_source(opened, scheme, out, config, windows, resume, progress)


def open_full_precision(source: str | Path, revision: str | None = None) -> Source:
    """As open_source. Raises UnsupportedError if the model is quantized already."""
    opened = open_source(source, revision)
    if read_scheme(opened.config, f"{opened.path.name}/config.json") is not None:
        raise UnsupportedError(f"{opened.path.name} is quantized already; calibration needs the full-precision model")
    return opened


def quantize_and_distill(
    source: Source,
    scheme: Scheme,
    out: Path,
    config: CalibrationConfig,
    windows: Windows,
    text: DistillText,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """As quantize_source, then train what was rounded (distill.py). In between it lies in OUT.rounded.

    A killed run resumes at the layer it was in, or, once all layers are rounded, at the first step of training.
    """
    config = replace(config, device=str(choose_device(config.device)))
    rounded = out.with_name(f"{out.name}.rounded")
    if not (resume and rounded.exists()):
        quantize_source(source, scheme, rounded, config, windows, resume, progress)
    try:
        with _MatmulPrecision(config), progress or Silent() as shown:
            distill_checkpoint(source, rounded, out, text, config, shown)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"distillation ran out of GPU memory ({str(error).splitlines()[0]}); {rounded} holds the checkpoint "
            "without it: take it as it is, or --resume on a larger GPU; --distill-steps 0 leaves distillation out"
        ) from error
    shutil.rmtree(rounded)
    return Report.read(out)


def quantize_source(
    source: Source,
    scheme: Scheme,
    out: Path,
    config: CalibrationConfig,
    windows: Windows | None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """As quantize_model, from an opened source and given tokens; `windows` None copies the weights as they are."""
    started = time.perf_counter()
    config = replace(config.for_scheme(scheme), device=str(choose_device(config.device)))
    if config.rotate != "none":
        source = rotate_source(source, config.seed, config.device, values_alone=config.rotate == "values")
    model = meta_model(model_config(source.config, source.generation_config))
    check_source(model_tensors(model, None), source, model)
    _check_scheme(model, scheme)
    provenance = _provenance(source, config, windows)
    run = {
        "source": dict(source.provenance),
        "scheme": scheme.to_dict(),
        "config": config.to_dict(),
        "tokens": None if windows is None else windows.sha256,
        "atom": atom.__version__,
        "torch": torch.__version__,
        "machine": _machine(torch.device(config.device)),
    }
    writer = CheckpointWriter(out, run, model.config.num_layers + 1, resume)
    progress = progress or Silent()
    with torch.no_grad(), _MatmulPrecision(config), progress:
        if not writer.has_shard(1):
            writer.write_shard(1, _outside(source, model))
        clips: dict[str, Any] | None = None
        layers: list[dict[str, Any]] = []
        passes = Passes(source, model, config, writer, progress)
        if windows is None:
            passes.copy_layers()
        else:
            if config.clip == "measured":
                scheme, clips = passes.measure_clips(scheme, windows)
            layers = passes.quantize_layers(scheme, windows)
        written = sum(writer.shard_path(n).stat().st_size for n in range(1, writer.num_shards + 1))
        report = Report(provenance, scheme.to_dict(), config.to_dict(), layers, clips=clips)
        report.totals = total(layers, time.perf_counter() - started, written)
        files = [f for f in [*source.tokenizer_files(), source.path / GENERATION_FILE] if f.is_file()]
        writer.finish(_config(source, scheme), report.to_dict(), files)
    return report


def _with_distillation(
    source: Source, scheme: Scheme, config: CalibrationConfig, progress: Progress
) -> CalibrationConfig:
    """`config` with its steps of distillation decided; a remark where they are left out."""
    model = meta_model(model_config(source.config, source.generation_config))
    planned, why = plan_distillation(model, scheme, config, free_gpu_bytes(torch.device(config.device)))
    if why is not None:
        steps = default_steps(scheme)
        progress.remark(f"distillation is left out: {why} (--distill-steps {steps} insists, 0 is silent)")
    return planned


def is_calibrated(source: Source, scheme: Scheme) -> bool:
    """Whether calibration has anything to find, weights or what keys have in common: else weights are copied."""
    if scheme.stores_key_offset or scheme.stores_key_centre:
        return True
    model = meta_model(model_config(source.config, source.generation_config))
    return any(
        plan.is_quantized
        for index in range(model.config.num_layers)
        for plan in plan_layer(model.family, scheme, index)
    )


def _outside(source: Source, model: Model) -> dict[str, Tensor]:
    """Everything that is in no decoder layer: embedding, final norm, head."""
    names = [n for n in source.names() if not n.startswith("model.layers.") and not is_ignored(n, model)]
    tensors = {name: source.get(name).to(source.dtype(name)) for name in names}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} holds NaN or infinity; quantization needs finite weights: "
                "download the model again, or start from another checkpoint"
            )
    return tensors


def _windows(source: Source, tokenizer: Tokenizer, config: CalibrationConfig) -> Windows:
    if config.calib == SELF:
        return sample_windows(source, config, choose_device(config.device))
    return load_windows(config.calib, tokenizer, config.windows, config.window_length, config.seed)


def _check_scheme(model: Model, scheme: Scheme) -> None:
    layer = next(model.model.decoder_layers())
    columns = {name: layer.get_parameter(f"{name}.weight").shape[1] for name in model.family.linears}
    for index in range(model.config.num_layers):
        check_sizes(plan_layer(model.family, scheme, index), columns)


def _config(source: Source, scheme: Scheme) -> dict[str, Any]:
    """config.json of the checkpoint: the source's, and how it is quantized."""
    return {**source.config, "quantization_config": quantization_config(scheme)}


class _MatmulPrecision:
    """TF32 on a GPU if the run allows it; the setting before comes back at the end."""

    def __init__(self, config: CalibrationConfig) -> None:
        self._wanted = config.matmul_precision if config.device.startswith("cuda") else "highest"

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._wanted)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def _provenance(source: Source, config: CalibrationConfig, windows: Windows | None) -> dict[str, Any]:
    import transformers

    data: Mapping[str, Any] = {}
    if windows is not None:
        count, length = windows.tokens.shape
        data = {"data": windows.source, "tokens_sha256": windows.sha256, "windows": count, "window_length": length}
    device = torch.device(config.device)
    return {
        "source": dict(source.provenance),
        "calibration": dict(data),
        "seed": config.seed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": current_commit(),
        "versions": {
            "atom": atom.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": _machine(device),
    }


def _machine(device: torch.device) -> str:
    """What the bits of a float sum depend on: the GPU, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
