"""Time and memory of GPTQ calibration at the shape of a real model, with random weights: the record calibration-8b.

    python benchmarks/bench_calibration.py --shape llama-3-8b --scheme w4a4 --machine h200

The weights are built and written first, and are not timed; what is timed is everything that `atom quantize` does
with given tokens, reading and writing included. Random weights cost what trained ones do: no step looks at values.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from atom.calibration.config import CalibrationConfig
from atom.calibration.data import Windows, hash_tokens
from atom.calibration.stream import quantize_source
from atom.models.source import open_directory
from atom.quant.presets import get_scheme
from atom.records import circumstances, write_record

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

    offload: str = "auto"
    """Hidden states in host memory: on, off, auto."""

    device: str = "auto"
    """cpu or cuda."""

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
        offload=options.offload,  # type: ignore[arg-type]
        device=options.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        source = build(Path(folder) / "model", options.shape)
        vocabulary = SHAPES[options.shape]["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (options.windows, options.window_length), generator=generator)
        windows = Windows(tokens, "random tokens", hash_tokens(tokens))
        report = quantize_source(
            open_directory(source, {"source": options.shape, "kind": "random weights"}),
            get_scheme(options.scheme),
            Path(folder) / "out",
            config,
            windows,
        )
    totals = report.totals
    row = {
        "scheme": options.scheme,
        "shape": options.shape,
        "seconds": round(totals["seconds"], 1),
        "peak_gpu_gb": round(totals["peak_gpu_bytes"] / 1e9, 2),
        "peak_host_gb": round(totals["peak_host_bytes"] / 1e9, 2),
        "windows": options.windows,
        "window": options.window_length,
        "layers": SHAPES[options.shape]["num_hidden_layers"],
        **{f"seconds:{phase}": round(s, 1) for phase, s in totals["seconds_by_phase"].items()},
    }
    Console().print_json(json.dumps(row))
    if options.output is not None:
        options.output.write_text(json.dumps({"calibration-8b": [row], "where": circumstances(options.machine)}))
    else:
        print("wrote", write_record("calibration-8b", [row], options.machine))


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
    weight_map = {}
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
