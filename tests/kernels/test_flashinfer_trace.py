"""The FlashInfer-Trace files: against its schema, and each definition's reference against our own ops."""

import ast
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
import torch

pydantic = pytest.importorskip(
    "pydantic", reason="the schema is checked with pydantic; pip install atom-serving[serving]"
)

from pydantic import BaseModel, ConfigDict, Field, model_validator  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from atom.kernels.bench import bench_kernels  # noqa: E402
from atom.kernels.bench_attention import FORMATS, Shape  # noqa: E402
from atom.kernels.bench_config import KernelsConfig  # noqa: E402
from atom.kernels.flashinfer_attention import paged_attention, rope_append  # noqa: E402
from atom.kernels.flashinfer_kv_solution import _caches, run_append, run_attention  # noqa: E402
from atom.kernels.flashinfer_solution import run_linear, run_producer  # noqa: E402
from atom.kernels.flashinfer_trace import write_trace  # noqa: E402
from atom.quant.mixed import quantize_weight  # noqa: E402
from atom.quant.presets import PRESETS, get_scheme  # noqa: E402
from atom.quant.stored import store_weight  # noqa: E402

from .emulated import EmulatedGpu  # noqa: E402
from .test_warm import needs_dsl  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1", "int64", "int32", "int16",
          "int8", "bool")  # fmt: skip


class Strict(BaseModel):
    """flashinfer-bench drops fields that it does not know; here they are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ConstAxis(Strict):
    type: Literal["const"]
    value: Annotated[int, Field(ge=0)]
    description: str | None = None


class VarAxis(Strict):
    type: Literal["var"]
    description: str | None = None


class TensorOf(Strict):
    shape: list[str] | None
    dtype: str
    description: str | None = None

    @model_validator(mode="after")
    def known_dtype(self) -> "TensorOf":
        assert self.dtype in DTYPES, self.dtype
        return self


class Definition(Strict):
    name: str
    op_type: str
    axes: dict[str, ConstAxis | VarAxis]
    inputs: dict[str, TensorOf]
    outputs: dict[str, TensorOf]
    reference: str
    tags: list[str] = []
    description: str = ""
    constraints: list[str] = []

    @model_validator(mode="after")
    def consistent(self) -> "Definition":
        assert not set(self.inputs) & set(self.outputs)
        for tensor in (*self.inputs.values(), *self.outputs.values()):
            assert set(tensor.shape or ()) <= set(self.axes)
        functions = [n for n in ast.parse(self.reference).body if isinstance(n, ast.FunctionDef) and n.name == "run"]
        assert len(functions) == 1 and [a.arg for a in functions[0].args.args] == list(self.inputs)
        return self


class Random(Strict):
    type: Literal["random"]


class Stored(Strict):
    type: Literal["safetensors"]
    path: str
    tensor_key: str


class Workload(Strict):
    uuid: str
    axes: dict[str, int]
    inputs: dict[str, Annotated[Random | Stored, Field(discriminator="type")]]


class Source(Strict):
    path: str
    content: str


class Spec(Strict):
    language: Literal["python", "triton", "cpp", "cuda", "tilelang"]
    target_hardware: Annotated[list[str], Field(min_length=1)]
    entry_point: Annotated[str, Field(pattern=r"^[\w./]+::\w+$")]
    dependencies: list[str]
    destination_passing_style: bool
    binding: Literal["tvm-ffi", "torch"] | None


class Solution(Strict):
    name: str
    definition: str
    author: str
    description: str | None = None
    spec: Spec
    sources: Annotated[list[Source], Field(min_length=1)]


class Correctness(Strict):
    max_relative_error: float
    max_absolute_error: float
    extra: dict[str, Any] | None = None


class Performance(Strict):
    latency_ms: float
    reference_latency_ms: float
    speedup_factor: float


class Environment(Strict):
    hardware: str
    libs: dict[str, str]


class Evaluation(Strict):
    status: Literal["PASSED"]  # all that we write; it must come with both
    environment: Environment
    timestamp: str
    log: str
    correctness: Correctness
    performance: Performance


class Trace(Strict):
    definition: str
    workload: Workload
    solution: str | None
    evaluation: Evaluation | None


LOW_BIT = tuple(name for name in PRESETS if name not in ("bf16", "w3a3"))


def test_files_follow_the_schema(tmp_path: Path) -> None:
    rows = bench_kernels(KernelsConfig(scheme=LOW_BIT, tokens=(1, 64)))
    for row in rows[: len(rows) // 2]:
        row |= {"us": 2.0, "gbps": 1.0, "bf16_us": 4.0}
    count = write_trace(tmp_path, rows)
    assert count == len([path for path in tmp_path.rglob("*") if path.is_file()])
    definitions = {}
    for path in (tmp_path / "definitions").rglob("*.json"):
        made = Definition.model_validate_json(path.read_text())
        assert path.stem == made.name
        definitions[made.name] = made
    assert len(definitions) == len(LOW_BIT) * 8  # four linears, four producers
    assert any("quantization:int4_packed_lohi" in made.tags for made in definitions.values())
    solutions = {
        made.name: made
        for path in (tmp_path / "solutions").rglob("*.json")
        for made in [Solution.model_validate_json(path.read_text())]
    }
    for solution in solutions.values():
        module = ast.parse(solution.sources[0].content)
        run = next(node for node in module.body if isinstance(node, ast.FunctionDef))
        assert [a.arg for a in run.args.args] == list(definitions[solution.definition].inputs)
    seen = 0
    for folder in ("workloads", "traces"):
        for path in (tmp_path / folder).rglob("*.jsonl"):
            for line in path.read_text().splitlines():
                trace = Trace.model_validate_json(line)
                assert set(trace.workload.inputs) == set(definitions[trace.definition].inputs)
                assert (trace.solution is None) == (trace.evaluation is None) == (folder == "workloads")
                assert trace.solution is None or trace.solution in solutions
                seen += 1
    assert seen == len(rows) + len(rows) // 2


@pytest.mark.parametrize("name", LOW_BIT)
def test_the_reference_of_a_linear_is_ours(name: str, tmp_path: Path) -> None:
    """On a small weight: the definition's K is a number in its text."""
    K = 240
    linear = get_scheme(name).for_linear("x")
    write_trace(tmp_path, bench_kernels(KernelsConfig(op="linear", scheme=(name,), tokens=(1,))))
    path = next((tmp_path / "definitions").rglob("*_n4096_k4096.json"))
    text = json.loads(path.read_text())["reference"]
    count = linear.outliers.count
    assert f"normal = {4096 - count}" in text
    scope: dict[str, Any] = {}
    exec(text.replace(f"normal = {4096 - count}", f"normal = {K - count}"), scope)
    generator = torch.Generator().manual_seed(0)
    tensors = store_weight(quantize_weight(torch.randn(24, K, generator=generator), linear), linear)
    inputs = {"x": torch.randn(5, K, generator=generator).bfloat16(), **tensors}
    as_given = {key: t.view(torch.int8) if t.dtype == torch.uint8 else t for key, t in inputs.items()}
    wanted = run_linear(name, as_given)
    assert list(json.loads(path.read_text())["inputs"]) == list(as_given)
    assert torch.allclose(scope["run"](**as_given).float(), wanted.float(), rtol=2**-7, atol=1e-3)


@needs_dsl
@pytest.mark.parametrize("op", ["rms_norm_quantize", "add_rms_norm_quantize", "permute_quantize", "gated_quantize"])
@pytest.mark.parametrize("name", LOW_BIT)
def test_the_reference_of_a_producer_is_ours(
    name: str, op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition's reference, our reference, and what our kernel's layout is read back to."""
    write_trace(tmp_path, bench_kernels(KernelsConfig(op=op, scheme=(name,), tokens=(1,))))  # type: ignore[arg-type]
    made = json.loads(next((tmp_path / "definitions").rglob("*.json")).read_text())
    scope: dict[str, Any] = {}
    exec(made["reference"], scope)
    K = 240
    special = {"perm": torch.randperm(K).int(), "weight": torch.rand(K) + 0.5}
    drawn = {key: special.get(key, torch.randn(5, K).bfloat16()) for key in made["inputs"]}
    # our reference multiplies the gate in the inputs' dtype, a kernel in float32
    wanted = run_producer(op, name, {key: t.float() for key, t in drawn.items()} if op == "gated_quantize" else drawn)
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    monkeypatch.setattr("atom.kernels.flashinfer_solution.device_arch", lambda device: "sm_90")
    EmulatedGpu(monkeypatch)
    for found in (scope["run"](**drawn), run_producer(op, name, drawn)):
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
        for got, want in pairs:
            assert float(((got.float() - want.float()).abs() > 1e-2 * want.float().abs()).float().mean()) < 0.02


def test_attention_s_files_follow_the_schema(tmp_path: Path) -> None:
    rows = bench_kernels(KernelsConfig(op="paged_attention"))
    for row in rows[:7]:
        row |= {"us": 2.0, "gbps": 1.0}
    count = write_trace(tmp_path, rows)
    assert count == len([path for path in tmp_path.rglob("*") if path.is_file()])
    paths = (tmp_path / "definitions").rglob("*.json")
    definitions = {path.stem: Definition.model_validate_json(path.read_text()) for path in paths}
    assert {made.op_type for made in definitions.values()} == {"gqa_paged", "rope_append_kv"}
    assert len(definitions) == 4 * 4 + 4 * 3  # three shapes of heads and a window; no window when keys are appended
    for path in (tmp_path / "solutions").rglob("*.json"):
        assert Solution.model_validate_json(path.read_text()).definition in definitions
    for path in [*(tmp_path / "workloads").rglob("*.jsonl"), *(tmp_path / "traces").rglob("*.jsonl")]:
        for line in path.read_text().splitlines():
            trace = Trace.model_validate_json(line)
            made = definitions[trace.definition]
            assert set(trace.workload.inputs) == set(made.inputs)
            assert set(trace.workload.axes) == {name for name, axis in made.axes.items() if axis.type == "var"}
            for name, given in trace.workload.inputs.items():
                if isinstance(given, Stored):
                    stored = load_file(tmp_path / given.path)[given.tensor_key]
                    sizes = [trace.workload.axes[axis] for axis in made.inputs[name].shape or ()]
                    assert list(stored.shape) == sizes and str(stored.dtype) == f"torch.{made.inputs[name].dtype}"


BENCH = importlib.util.find_spec("flashinfer_bench")


@pytest.mark.skipif(BENCH is None, reason="flashinfer-bench is not installed; pip install --no-deps flashinfer-bench")
def test_flashinfer_bench_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own data model takes every file, and finds each solution's definition."""
    assert BENCH is not None
    package = ModuleType("flashinfer_bench")  # without its __init__, which imports what runs on GPUs
    package.__path__ = list(BENCH.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "flashinfer_bench", package)
    data = importlib.import_module("flashinfer_bench.data")
    rows = bench_kernels(KernelsConfig(scheme=LOW_BIT, tokens=(1, 64)))
    for row in rows[::2]:
        row |= {"us": 2.0, "gbps": 1.0}
    write_trace(tmp_path, rows + bench_kernels(KernelsConfig(op="paged_attention")))
    found = data.TraceSet.from_path(str(tmp_path))
    assert len(found.definitions) == len(found.solutions) == len(LOW_BIT) * 8 + 28
    assert sum(map(len, found.traces.values())) == len(rows[::2])
    for path in (tmp_path / "workloads").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            assert data.Trace.model_validate_json(line).definition in found.definitions


@pytest.mark.parametrize("kv", FORMATS)
def test_the_references_of_attention_are_ours(kv: str) -> None:
    """Appending bit for bit; what it gives, as blocks, is then attended over, with a window and without."""
    shape = Shape(3, 40, heads=4, kv_heads=2, head_dim=64)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(48, 4, 64, generator=generator).bfloat16()
    k, v = torch.randn(2, 48, 2, 64, generator=generator).bfloat16()
    v[0], v[1] = 0, v[1].abs()
    angles = torch.rand(48, 32, generator=generator) * 100
    given = {"q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin()}
    made = rope_append(kv, shape)
    found, wanted = run_definition(made, given), run_append(kv, given)
    assert len(found) == len(wanted) == len(made["outputs"])
    for name, got, want in zip(made["outputs"], found, wanted, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.float(), want.float()), name
    cache = {
        name: x.unflatten(0, (3, 16)).transpose(1, 2).contiguous()
        for name, x in zip(made["outputs"], found, strict=True)
        if name != "turned"
    }
    tables = {"block_tables": torch.tensor([[2, 0, 1]] * 3).int(), "seqlens_k": torch.tensor([1, 33, 48]).int()}
    for window in (None, 20):
        given = {"q": found[0][:3], **cache, **tables}
        _caches.clear()
        wanted = run_attention(kv, given, window)
        got = run_definition(paged_attention(kv, replace(shape, window=window)), given)
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)


def run_definition(made: dict[str, Any], given: dict[str, torch.Tensor]) -> Any:
    scope: dict[str, Any] = {}
    exec(made["reference"], scope)
    assert list(given) == list(made["inputs"])
    return scope["run"](**given)
