"""The attention ops as FlashInfer-Trace: definitions, solutions and workloads; see flashinfer_trace.py.

Keys and values are given apart from their scales and zero points, block by block, so that random numbers make a cache;
the solution puts them together as our kernels read them. Tables and lengths, which cannot be random, lie in files.
"""

from pathlib import Path

import torch
from torch import Tensor

from .bench_attention import CELLS, FORMATS, Shape, layout_of
from .flashinfer_schema import Json, written_solution

REFERENCE = Path(__file__).with_name("flashinfer_kv_reference.py")
CODE_DTYPES = {"int4": "int8", "int8": "int8", "fp8_e4m3": "float8_e4m3fn", "bf16": "bfloat16"}
APPENDED = (64, 8192)  # tokens of the workloads of rope_append_kv


def format_of(kv: str) -> str:
    """The format of a cache as the benchmark calls it."""
    spec = FORMATS[kv]
    return "bf16" if spec is None else spec.format


def shape_of(row: Json) -> Shape | None:
    """The cell that a row of the benchmark measured, or None where its keys have an offset: it has no definition."""
    found = next(shape for shape in CELLS if (shape.batch, shape.name) == (row["M"], row["shape"]))
    return None if found.has_offset else found


def paged_attention(kv: str, shape: Shape) -> Json:
    """One query for each sequence over its blocks."""
    fmt, layout = format_of(kv), layout_of(kv, shape)
    axes = _axes(shape) | {"B": {"type": "var"}, "blocks": {"type": "var"}, "most_blocks": {"type": "var"}}
    axes |= {"block_size": _const(layout.block_size), "row": _const(layout.row_bytes // _itemsize(fmt))}
    inputs = {"q": _tensor(["B", "heads", "head_dim"], "bfloat16")}
    inputs |= _stored(fmt, ["blocks", "kv_heads", "block_size"])
    inputs |= {"block_tables": _tensor(["B", "most_blocks"], "int32"), "seqlens_k": _tensor(["B"], "int32")}
    first = "0" if shape.window is None else f"max(0, length - {shape.window})"
    lines = [
        f"def run({', '.join(inputs)}):",
        "    out = torch.empty_like(q)",
        "    for b, length in enumerate(seqlens_k.tolist()):",
        "        rows = block_tables[b].long()",
        *(f"        {part} = dequantize({_arguments(fmt, part, '[rows]')})" for part in ("key", "value")),
        f"        k, v = (x.transpose(0, 1).flatten(1, 2)[:, {first}:length] for x in (key, value))",
        "        heads = q[b].float().unflatten(0, (k.shape[0], -1))",
        f"        p = (heads @ k.mT * {shape.head_dim**-0.5!r}).softmax(-1)",
        "        out[b] = (p @ v).flatten(0, 1).to(q.dtype)",
        "    return out",
    ]
    window = "" if shape.window is None else f"_w{shape.window}"
    return {
        "name": f"atom_paged_attention_{kv}_h{shape.heads}_kv{shape.kv_heads}_d{shape.head_dim}{window}",
        "op_type": "gqa_paged",
        "axes": axes,
        "inputs": inputs,
        "outputs": {"out": _tensor(["B", "heads", "head_dim"], "bfloat16")},
        "reference": _source(lines),
        "tags": _tags(kv),
        "description": f"decode attention over blocks of keys and values in {FORMATS[kv] or 'bfloat16'}",
    }


def rope_append(kv: str, shape: Shape) -> Json:
    """RoPE of queries and keys, and the codes of keys and values."""
    fmt, layout = format_of(kv), layout_of(kv, shape)
    axes = _axes(shape) | {"T": {"type": "var"}, "half": _const(shape.head_dim // 2)}
    axes |= {"row": _const(layout.row_bytes // _itemsize(fmt))}
    inputs = {"q": _tensor(["T", "heads", "head_dim"], "bfloat16")}
    inputs |= {name: _tensor(["T", "kv_heads", "head_dim"], "bfloat16") for name in ("k", "v")}
    inputs |= {name: _tensor(["T", "half"], "float32") for name in ("cos", "sin")}
    lines = [
        f"def run({', '.join(inputs)}):",
        f"    keys, values = (quantize(x, {fmt!r}) for x in (turn(k, cos, sin), v))",
        "    return (turn(q, cos, sin), *keys, *values)",
    ]
    return {
        "name": f"atom_rope_append_kv_{kv}_h{shape.heads}_kv{shape.kv_heads}_d{shape.head_dim}",
        "op_type": "rope_append_kv",
        "axes": axes,
        "inputs": inputs,
        "outputs": {"turned": inputs["q"], **_stored(fmt, ["T", "kv_heads"])},
        "reference": _source(lines),
        "tags": [*_tags(kv), "fused"],
        "description": f"RoPE, and keys and values rounded to {FORMATS[kv] or 'bfloat16'}",
    }


def solution(definition: Json, kv: str, window: int | None = None) -> Json:
    """Our kernels behind a definition."""
    names = list(definition["inputs"])
    function = "run_append" if definition["op_type"] == "rope_append_kv" else "run_attention"
    options = "" if function == "run_append" else f", {window!r}"
    call = f"{function}({kv!r}, dict({', '.join(f'{n}={n}' for n in names)}){options})"
    lines = [f"from atom.kernels.flashinfer_kv_solution import {function}", "", ""]
    lines += [f"def run({', '.join(names)}):", f"    return {call}"]
    return written_solution(definition, "atom-serving", lines)


def tables_of(shape: Shape) -> tuple[Json, dict[str, Tensor]]:
    """Sizes of a workload of paged_attention, and its block table and lengths: blocks in order, no two shared."""
    lengths = torch.from_numpy(shape.lengths())
    block_size = layout_of("bf16", shape).block_size
    counts = (lengths + block_size - 1) // block_size
    starts = (counts.cumsum(0) - counts)[:, None]
    index = torch.arange(int(counts.max()))
    tables = torch.where(index < counts[:, None], starts + index, 0).int()
    sizes = {"B": shape.batch, "blocks": int(counts.sum()), "most_blocks": len(index)}
    return sizes, {"block_tables": tables, "seqlens_k": lengths}


def _stored(fmt: str, shape: list[str]) -> Json:
    """Tensors of keys and values: codes, and scales and zero points where the format has them."""
    found = {}
    for part in ("key", "value"):
        found[f"{part}_codes"] = _tensor([*shape, "row"], CODE_DTYPES[fmt])
        for word in _words(fmt):
            found[f"{part}_{word}"] = _tensor(shape, "bfloat16")
    return found


def _words(fmt: str) -> tuple[str, ...]:
    return {"bf16": (), "fp8_e4m3": ("scale",)}.get(fmt, ("scale", "zero"))


def _arguments(fmt: str, part: str, index: str) -> str:
    words = "".join(f", {part}_{word}{index}" for word in _words(fmt))
    return f"{part}_codes{index}, {fmt!r}{words}"


def _axes(shape: Shape) -> Json:
    return {"heads": _const(shape.heads), "kv_heads": _const(shape.kv_heads), "head_dim": _const(shape.head_dim)}


def _itemsize(fmt: str) -> int:
    return 2 if fmt == "bf16" else 1


def _tags(kv: str) -> list[str]:
    return ["model:llama-3-8b", f"quantization:kv_{kv}", *(["quantization:int4_packed_lohi"] if kv == "int4" else [])]


def _source(lines: list[str]) -> str:
    return REFERENCE.read_text() + "\n\n" + "\n".join(lines) + "\n"


def _const(value: int) -> Json:
    return {"type": "const", "value": value}


def _tensor(shape: list[str], dtype: str) -> Json:
    return {"shape": shape, "dtype": dtype}
