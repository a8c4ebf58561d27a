"""Our ops as FlashInfer-Trace: definitions, solutions, workloads, and traces of what was measured.

A definition is self-contained: its reference is plain torch (flashinfer_reference.py and a `run`). Weights are given
as a checkpoint holds them; FlashInfer's dtypes know neither INT4 nor uint8, so nibbles travel as packed int8, the low
one first, under the tag `quantization:int4_packed_lohi`. Schema: flashinfer-bench `data/*.py`, as of version 0.1.
"""

import datetime
import json
import uuid
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import UnsupportedError
from ..quant.formats import get_format
from ..quant.presets import get_scheme
from ..quant.schemes import LinearScheme, TensorSpec
from ..quant.stored import stored_tensors
from . import flashinfer_attention
from .flashinfer_schema import Json, written_solution

REFERENCE = Path(__file__).with_name("flashinfer_reference.py")
DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.int8: "int8",
    torch.uint8: "int8",  # its bits: FlashInfer has no uint8
    torch.int32: "int32",
}


def write_trace(root: Path, rows: list[Json]) -> int:
    """Write the rows of bench.bench_kernels under `root`; returns how many files that were.

    Rows that were not measured give a definition, a solution and a workload, and no trace.
    """
    files: dict[Path, list[Json]] = {}
    blobs = 0
    for row in rows:
        if row["op"] == "paged_attention":
            blobs += _add_attention(files, root, row)
            continue
        linear = get_scheme(row["scheme"]).for_linear("x")
        made = _linear(row, linear) if row["op"] == "linear" else _producer(row, linear)
        name, op = made["name"], row["op"]
        solution = _solution(made, row)
        _add(files, root, op, made, solution)
        trace = _unsolved(name, _workload(made, row["M"]))
        files.setdefault(root / "workloads" / op / f"{name}.jsonl", []).append(trace)
        if row["us"] is not None:
            done = {**trace, "solution": solution["name"], "evaluation": _evaluation(row)}
            files.setdefault(root / "traces" / op / f"{name}.jsonl", []).append(done)
    for path, entries in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.suffix == ".jsonl"
        path.write_text("\n".join(json.dumps(entry, indent=None if lines else 2) for entry in entries) + "\n")
    return len(files) + blobs


def _add_attention(files: dict[Path, list[Json]], root: Path, row: Json) -> int:
    """Entries of a cell of paged_attention, and of rope_append_kv in its format; how many tensor files were written."""
    kv, shape = row["scheme"], flashinfer_attention.shape_of(row)
    if shape is None:
        return 0
    appends = flashinfer_attention.rope_append(kv, shape)
    folder = root / "workloads" / "rope_append_kv" / f"{appends['name']}.jsonl"
    if folder not in files:
        _add(files, root, "rope_append_kv", appends, flashinfer_attention.solution(appends, kv))
        files[folder] = [_unsolved(appends["name"], _workload(appends, T, "T")) for T in flashinfer_attention.APPENDED]
    made = flashinfer_attention.paged_attention(kv, shape)
    solution = flashinfer_attention.solution(made, kv, shape.window)
    _add(files, root, "paged_attention", made, solution)
    sizes, tensors = flashinfer_attention.tables_of(shape)
    workload = _workload(made, shape.batch, "B") | {"axes": sizes}
    workload["uuid"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{made['name']}/{shape.batch}x{shape.context}"))
    path = f"blob/workloads/paged_attention/{made['name']}/{workload['uuid']}.safetensors"
    for name in tensors:
        workload["inputs"][name] = {"type": "safetensors", "path": f"./{path}", "tensor_key": name}
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / path)
    trace = _unsolved(made["name"], workload)
    files.setdefault(root / "workloads" / "paged_attention" / f"{made['name']}.jsonl", []).append(trace)
    if row["us"] is not None:
        done = {**trace, "solution": solution["name"], "evaluation": _evaluation(row)}
        files.setdefault(root / "traces" / "paged_attention" / f"{made['name']}.jsonl", []).append(done)
    return 1


def _add(files: dict[Path, list[Json]], root: Path, op: str, made: Json, solution: Json) -> None:
    files[root / "definitions" / op / f"{made['name']}.json"] = [made]
    files[root / "solutions" / op / made["name"] / f"{solution['name']}.json"] = [solution]


def _unsolved(name: str, workload: Json) -> Json:
    return {"definition": name, "workload": workload, "solution": None, "evaluation": None}


def _linear(row: Json, linear: LinearScheme) -> Json:
    """x bfloat16 [M, K], permuted, rounded as the scheme says, times the stored weight."""
    N, K, scheme = row["N"], row["K"], row["scheme"]
    axes, inputs = {"M": {"type": "var"}, "N": _const(N), "K": _const(K)}, {"x": _tensor(["M", "K"], "bfloat16")}
    for name, stored in stored_tensors(N, K, linear).items():
        shape = []
        for size in stored.shape:
            axis = {N: "N", K: "K"}.get(size, f"n{size}")
            axes.setdefault(axis, _const(size))
            shape.append(axis)
        inputs[name] = _tensor(shape, DTYPES[stored.dtype])
    assert linear.weight is not None
    return {
        "name": f"atom_linear_{scheme}_n{N}_k{K}",
        "op_type": "gemm",
        "axes": axes,
        "inputs": inputs,
        "outputs": {"y": _tensor(["M", "N"], "bfloat16")},
        "reference": _source(_linear_run(linear, list(inputs), K)),
        "tags": _tags(row, linear),
        "description": f"y = round(x) @ dequantize(w).T, weights {linear.weight}, activations {linear.activation}",
    }


def _producer(row: Json, linear: LinearScheme) -> Json:
    """What a fused norm, gate or permutation hands on, dequantized: the codes' layout is an implementation's own."""
    op, K = row["op"], row["hidden"]
    wide = _tensor(["M", "K"], "bfloat16")
    inputs = {"gated_quantize": {"gate": wide, "up": wide}, "add_rms_norm_quantize": {"residual": wide, "x": wide}}.get(
        op, {"x": wide}
    )
    inputs = dict(inputs)
    if "norm" in op:
        inputs["weight"] = _tensor(["K"], "float32")
    if linear.reorder and op != "gated_quantize":
        inputs["perm"] = _tensor(["K"], "int32")
    outputs = {"y": _tensor(["M", "K"], "float32")}
    if op == "add_rms_norm_quantize":
        outputs = {"total": wide, **outputs}
    return {
        "name": f"atom_{op}_{row['scheme']}_h{K}",
        "op_type": op,
        "axes": {"M": {"type": "var"}, "K": _const(K)},
        "inputs": inputs,
        "outputs": outputs,
        "reference": _source(_producer_run(op, linear, list(inputs))),
        "tags": [*_tags(row, linear), "fused"],
        "description": f"{op}, activations {linear.activation}, dequantized, {linear.outliers.count} outliers last",
    }


def _linear_run(linear: LinearScheme, names: list[str], K: int) -> str:
    spec = linear.weight
    assert spec is not None
    fmt, outliers = get_format(spec.format), linear.outliers.count
    lines = [f"def run({', '.join(names)}):", f"    normal = {K - outliers}"]
    if fmt.bits == 4:
        lines.append("    codes = unpack4(weight_packed, normal)")
    else:
        lines.append("    codes = weight_packed")
    scale = "weight_scale.float()"
    if spec.scale_format == "e8m0":
        scale = "torch.exp2(weight_scale.view(torch.uint8).float() - 127)"
    if spec.outer is not None:
        scale += " * " + ("weight_tensor_scale" if spec.outer == "tensor" else "weight_channel_scale")
    lines.append(f"    w = values(codes, {spec.format!r}) * spread({scale}, {spec.group_size or 0}, normal)")
    if outliers:
        lines.append("    w = torch.cat((w, outlier_weight.float() * outlier_scale.float()), 1)")
    lines.append("    x = x.float()")
    lines += _turned("x", linear)
    lines.append(f"    rounded = round_activation(x, {_activation(linear.activation)}, {outliers})")
    lines.append("    return (rounded @ w.T).bfloat16()")
    return "\n".join(lines)


def _producer_run(op: str, linear: LinearScheme, names: list[str]) -> str:
    lines = [f"def run({', '.join(names)}):"]
    if op == "gated_quantize":
        lines.append("    h = torch.nn.functional.silu(gate.float()) * up.float()")
    elif op == "add_rms_norm_quantize":
        lines += ["    total = residual + x", "    h = total.float()"]
    else:
        lines.append("    h = x.float()")
    if "norm" in op:
        lines.append("    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight")
    if "perm" in names:
        lines.append("    h = h[:, perm.long()]")
    lines += _turned("h", linear)
    lines.append(f"    y = round_activation(h, {_activation(linear.activation)}, {linear.outliers.count})")
    lines.append("    return total, y" if op == "add_rms_norm_quantize" else "    return y")
    return "\n".join(lines)


def _turned(name: str, linear: LinearScheme) -> list[str]:
    """The line that rotates `name`, where the scheme rotates."""
    rotation = linear.rotation
    if rotation is None:
        return []
    if rotation.kind != "block_hadamard":
        raise UnsupportedError("a definition has no whole Hadamard rotation; use --rotation block_hadamard")
    return [f"    {name} = turn({name}, {rotation.block}, {linear.outliers.count})"]


def _activation(spec: TensorSpec | None) -> str:
    if spec is None:
        return "None"
    fmt = get_format(spec.format)
    levels = (2**fmt.bits - 1) / 2 if spec.scale_rule == "range" else fmt.max
    ratio = float(spec.clip) if spec.scale_format == "e8m0" else float(spec.clip) / levels
    return repr((spec.format, spec.group_size or 0, spec.scale_format, ratio))


def _source(run: str) -> str:
    return REFERENCE.read_text() + "\n\n" + run + "\n"


def _solution(definition: Json, row: Json) -> Json:
    names = list(definition["inputs"])
    lines = [f"from atom.kernels.flashinfer_solution import run_{'linear' if row['op'] == 'linear' else 'producer'}"]
    arguments = ", ".join(names)
    call = f"run_linear({row['scheme']!r}, dict({', '.join(f'{n}={n}' for n in names)}))"
    if row["op"] != "linear":
        call = call.replace("run_linear(", f"run_producer({row['op']!r}, ")
    lines += ["", "", f"def run({arguments}):", f"    return {call}"]
    return written_solution(definition, f"atom-serving, {row['runs']}", lines)


def _workload(definition: Json, size: int, axis: str = "M") -> Json:
    name = f"{definition['name']}/{axis}={size}"
    return {
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        "axes": {axis: size},
        "inputs": {name: {"type": "random"} for name in definition["inputs"]},
    }


def _evaluation(row: Json) -> Json:
    base = row.get("bf16_us") or row.get("torch_us") or row["us"]
    extra = {key: row[key] for key in ("sol_us", "score", "gbps", "tflops", "fp8_us") if row.get(key) is not None}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown"
    return {
        "status": "PASSED",
        "environment": {"hardware": hardware, "libs": {"torch": torch.__version__, "atom": _version()}},
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "log": "",
        "correctness": {"max_relative_error": 2.0**-8, "max_absolute_error": 0.0, "extra": extra},
        "performance": {
            "latency_ms": row["us"] / 1e3,
            "reference_latency_ms": base / 1e3,
            "speedup_factor": base / row["us"],
        },
    }


def _version() -> str:
    try:
        return metadata.version("atom-serving")
    except metadata.PackageNotFoundError:
        return "unknown"


def _tags(row: Json, linear: LinearScheme) -> list[str]:
    tags = ["model:llama-3-8b", f"quantization:{row['scheme']}"]
    assert linear.weight is not None
    if row["op"] == "linear" and get_format(linear.weight.format).bits == 4:
        tags.append(f"quantization:{linear.weight.format}_packed_lohi")
    return tags


def _const(value: int) -> Json:
    return {"type": "const", "value": value}


def _tensor(shape: list[str], dtype: str) -> Json:
    return {"shape": shape, "dtype": dtype}
