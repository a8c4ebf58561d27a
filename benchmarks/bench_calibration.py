"""Time and memory of GPTQ calibration at the shape of a real model, with random weights: the record calibration-8b.

    python benchmarks/bench_calibration.py --shape llama-3-8b --scheme w4a4 --machine h200

The weights are built and written first, and are not timed; what is timed is everything that `atom quantize` does
with given tokens, reading and writing included. Random weights cost what trained ones do: no step looks at values.
With `--distill-steps` the rounded checkpoint is then trained, and there is a second row of both together.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from atom.calibration.config import CalibrationConfig, Offload
from atom.calibration.data import Windows, hash_tokens
from atom.calibration.distill import DistillText, distill_checkpoint
from atom.calibration.stream import quantize_source
from atom.circumstances import circumstances
from atom.models.device import choose_device
from atom.models.source import Source, open_directory
from atom.quant.presets import get_scheme
from atom.records import Row, write_record

SHAPES = {
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512},
}
HEAD_DIM = 128


@dataclass(frozen=True)
class Options:
    """What to time."""

    shape: str = "llama-3-8b"
    """llama-3-8b, or tiny to try the command."""

    scheme: str = "w4a4"
    """As for atom quantize."""

    windows: int = 128
    """Calibration windows."""

    window_length: int = 2048
    """Tokens of a window."""

    batch_tokens: int = 8192
    """Tokens that run through a layer at once."""

    offload: Offload = "auto"
    """Hidden states in host memory: on, off, auto."""

    distill_steps: int = 0
    """Steps of distillation after that; `atom quantize` takes 100 where the GPU holds both models."""

    device: str = "auto"
    """cpu or cuda."""

    weights: Path | None = None
    """Where the random model lies; built there if it does not exist. Default: built anew, and removed again."""

    machine: str = "cpu"
    """What the record calls the machine: h200 or cpu."""

    output: Path | None = None
    """Write the rows and circumstances here instead of the record (for a machine that is not the checkout's)."""


def main(options: Options) -> None:
    config = CalibrationConfig(
        calib="random tokens",
        windows=options.windows,
        window_length=options.window_length,
        batch_tokens=options.batch_tokens,
        offload=options.offload,
        distill_steps=options.distill_steps,
        device=str(choose_device(options.device)),
    )
    torch.set_float32_matmul_precision(config.matmul_precision)
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or Path(folder) / "model"
        if not weights.exists():
            build(weights, options.shape)
        source = open_directory(weights, {"source": options.shape, "kind": "random weights"})
        vocabulary = SHAPES[options.shape]["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (options.windows, options.window_length), generator=generator)
        windows = Windows(tokens, "random tokens", hash_tokens(tokens))
        rounded = Path(folder) / "rounded"
        report = quantize_source(source, get_scheme(options.scheme), rounded, config, windows)
        totals, clips = report.totals, report.clips or {}
        row: Row = {
            "scheme": options.scheme,
            "shape": options.shape,
            "distill_steps": 0,
            "seconds": round(totals["seconds"], 1),
            "peak_gpu_gb": round(totals["peak_gpu_bytes"] / 1e9, 2),
            "peak_host_gb": round(totals["peak_host_bytes"] / 1e9, 2),
            "windows": options.windows,
            "window": options.window_length,
            "layers": SHAPES[options.shape]["num_hidden_layers"],
            "seconds:clips": round(clips.get("seconds", 0.0), 1),
            **{f"seconds:{phase}": round(s, 1) for phase, s in totals["seconds_by_phase"].items()},
        }
        rows = [row]
        write(rows, options)
        if options.distill_steps:
            rows.append(row | distilled(source, rounded, config, tokens, totals))
            write(rows, options)


def distilled(
    source: Source, rounded: Path, config: CalibrationConfig, tokens: torch.Tensor, totals: dict[str, Any]
) -> Row:
    """Train the checkpoint in `rounded`; what its row has otherwise than that of rounding, whose totals are given."""
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    held_back = max(1, len(tokens) // 16)
    text = DistillText(tokens[:-held_back], tokens[-held_back:])
    found = distill_checkpoint(source, rounded, rounded.with_name("out"), text, config)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "distill_steps": found.steps,
        "seconds": round(totals["seconds"] + seconds, 1),
        "peak_gpu_gb": round(max(totals["peak_gpu_bytes"], peak) / 1e9, 2),
        "seconds:distill": round(seconds, 1),
        "seconds:distill_steps": round(found.seconds, 1),
    }


def write(rows: list[Row], options: Options) -> None:
    """Show the last row; write the record, or the rows with their circumstances where a file was asked for."""
    Console().print_json(json.dumps(rows[-1]))
    if options.output is not None:
        options.output.write_text(json.dumps({"calibration-8b": rows, "where": circumstances(options.machine)}))
    else:
        print("wrote", write_record("calibration-8b", rows, options.machine))


def build(folder: Path, shape: str) -> Path:
    """A Llama checkpoint of `shape` with random bf16 weights, one shard a layer."""
    from safetensors.torch import save_file

    folder.mkdir()
    sizes = SHAPES[shape]
    heads = sizes["hidden_size"] // HEAD_DIM
    config = {
        **sizes,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    hidden, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    kv = config["num_key_value_heads"] * HEAD_DIM  # type: ignore[operator]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    weight_map: dict[str, str] = {}
    for index in range(sizes["num_hidden_layers"]):
        tensors = {f"model.layers.{index}.{n}.weight": _random(*s) for n, s in layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        name = f"layer-{index}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    outside = {
        "model.embed_tokens.weight": _random(sizes["vocab_size"], hidden),
        "lm_head.weight": _random(sizes["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    save_file(outside, folder / "outside.safetensors")
    weight_map |= dict.fromkeys(outside, "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _random(*shape: int) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(*shape, device=device) * 0.02).to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
