"""Measurement records: the JSON files under benchmarks/results/<machine>/ that every quoted number comes from.

A record is written by the command that measured it and holds its latest complete run. Tables in README and docs are
drawn from records (record_tables.py). SCHEMAS names the records that other tools read, and their row keys.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .circumstances import CHECKOUT, circumstances, current_commit

Row = dict[str, Any]

RESULTS = CHECKOUT / "benchmarks" / "results"

_LOW_BIT = ("int4", "int8", "fp8")
KV_FORMATS = (*_LOW_BIT, "bf16", *(f"{kv}r{tokens}" for kv in _LOW_BIT for tokens in (16, 32, 64)))  # r: newest exact
PATHS = ("kernels", "reference")
LADDER_STEPS = ("fp", "rtn", "outliers-bf16", "outliers-int8", "groups", "clip", "gptq", "kv4", "distill")
# Row keys any record may carry: where a number came from, never what it is.
COMMENT_KEYS = ("source", "seconds", "seed", "note", "commit", "gpu")
BITS = ("bits_weight", "bits_activation", "bits_kv")
PERPLEXITY_EXTRAS = ("window", "tokens", "ppl_stderr", "kl", "calibration", "dtype", "distill_steps")


@dataclass(frozen=True)
class RecordSchema:
    """What the rows of one record hold.

    keys      present in every row; None stands for "not measured"; "a|b" asks for exactly one of a and b
    optional  may be present; a name that ends in ":" is a prefix ("task:" allows task:piqa and task:piqa:stderr)
    choices   key -> the values it may take; a choice that ends in ":" is a prefix
    """

    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self, row: Mapping[str, Any], where: str) -> None:
        """Raise ValueError, opening with `where`, at the first thing in `row` that the schema does not allow."""
        known: set[str] = set()
        for key in self.keys:
            names = key.split("|")
            present = [name for name in names if name in row]
            if len(present) != 1:
                got = f"both {' and '.join(present)}" if present else f"only {', '.join(row) or 'nothing'}"
                raise ValueError(
                    f"{where}: needs {' or '.join(names)}, got {got}; write null where it was not measured"
                )
            known.update(names)
        for key, value in row.items():
            if key not in known and not _matches(key, (*self.optional, *COMMENT_KEYS)):
                raise ValueError(
                    f"{where}: unknown key {key!r}; the keys are {', '.join((*self.keys, *self.optional))}; "
                    "add it to SCHEMAS in atom/records.py if it belongs there"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {key} is {value}, which JSON cannot hold; write null and a note")
            if key in self.choices and value is not None and not _matches(str(value), self.choices[key]):
                raise ValueError(f"{where}: {key} is {value!r}; it must be one of {', '.join(self.choices[key])}")
        if "+" in str(row.get("scheme", "")):
            raise ValueError(
                f"{where}: scheme is {row['scheme']!r}; write the preset's bare name and the cache under kv"
            )


def _matches(name: str, allowed: Iterable[str]) -> bool:
    return any(name == a or (a.endswith(":") and name.startswith(a)) for a in allowed)


_KV = {"kv": KV_FORMATS}
_PRESETS = RecordSchema(
    ("model", "text", "scheme", "kv", "ppl", "ppl_fp", "windows", "path", *BITS),
    # change: of the kernels' perplexity from the reference path's on the same windows, a fraction; its standard error
    ("task:", "ppl_reference", "change", "change_se", *PERPLEXITY_EXTRAS),
    {"path": PATHS, **_KV},
)

SCHEMAS: dict[str, RecordSchema] = {
    "quality-ladder": RecordSchema(
        ("model", "text", "step", "outliers", "ppl", "windows", "path"),
        (*BITS, "task:", *PERPLEXITY_EXTRAS),
        {"step": LADDER_STEPS, "path": PATHS},
    ),
    "quality-presets": _PRESETS,
    "quality-variants": RecordSchema(
        ("model", "text", "variant", "ppl", *BITS, "windows", "path"), PERPLEXITY_EXTRAS, {"path": PATHS}
    ),
    "quality-budget": RecordSchema(  # benchmarks/budget_quality.py has the words
        (
            *("model", "text", "base", "choice", "limit", "bits", *BITS, "kv", "predicted"),
            *("ppl", "ppl_fp", "windows", "path"),
        ),
        ("measuring_seconds", "ppl_reference", "change", "change_se", *PERPLEXITY_EXTRAS),
        {"path": PATHS},
    ),
    "accuracy-frontier": RecordSchema(
        ("model", "text", "method", "kv", "ppl", "ppl_fp", "windows", "path", *BITS),
        # what is kept of the mean over tasks in percent, half of its 95 % interval, and over how many documents;
        # kv_zero: the rule of a cache's zero points, whole in rows that do not say; kv_recent: newest tokens that are
        # read exactly, none in rows that do not say; above_fp, closed: gaps.py;
        # earlier: a run before the one that has the place, kept for its tasks; distill_share: what is kept of what
        # training learned, all of it in rows that do not say
        (
            *("scheme", "kv_zero", "kv_recent", "task:", "recovery", "recovery:95", "documents", "retrieval:"),
            "flat_steps",
            *("earlier", "above_fp", "above_fp:stderr", "closed", "closed:stderr", "distill_share", *PERPLEXITY_EXTRAS),
        ),
        {"path": PATHS, "scheme": ("w4a4", "w4a8", "kv4"), "kv_zero": ("whole", "mean"), **_KV},
    ),
    "cache-quality": RecordSchema(
        # kv: what the weights were calibrated for; cache: what they were measured through
        ("model", "text", "scheme", "kv", "cache", "step", "ppl", "ppl_fp", "percent", "windows", "path", *BITS),
        ("retrieval:", *PERPLEXITY_EXTRAS),
        {
            "path": PATHS,
            "kv": ("int2", "int3", *KV_FORMATS),
            "cache": ("int2", "int3", *KV_FORMATS),
            "step": ("fp", "calibrated", "trained"),
        },
    ),
    "cache-parts": RecordSchema(
        # part: what of a 4-bit cache is otherwise; change: of perplexity from full precision's, a fraction
        ("model", "text", "part", "layer", "ppl", "change", "change_se", "kl", "windows", "path"),
        PERPLEXITY_EXTRAS,
        {"path": PATHS},
    ),
    "kv-rope": RecordSchema(
        ("model", "text", "kv", "place", "ppl", "windows", "path"),
        PERPLEXITY_EXTRAS,
        {"place": ("16 bits", "before", "after", "after, calibrated"), "path": PATHS, **_KV},
    ),
    "lm-eval-agreement": RecordSchema(("model", "task", "metric", "atom", "hf", "documents", "max_difference")),
    "calibration-8b": RecordSchema(
        ("scheme", "seconds", "peak_gpu_gb", "peak_host_gb"),
        ("windows", "window", "layers", "seconds:", "shape", "distill_steps"),
    ),
    "gemm": RecordSchema(
        ("model", "scheme", "shape", "M", "N", "K", "us", "sol_us", "bf16_us", "fp8_us", "peer_us"),
        ("peer",),
        {"shape": ("qkv", "o", "gate_up", "down", "sum")},
    ),
    # l2_us: of few tokens, with inputs that still lie in L2 as behind the GEMM that writes them
    "producers": RecordSchema(("op", "scheme", "M", "hidden", "us", "gbps"), ("sol_us", "l2_us")),
    "attention": RecordSchema(
        ("op", "kv", "batch", "context", "heads", "kv_heads", "head_dim", "window", "us", "sol_us", "bf16_sdpa_us"),
        # a key offset is added back while keys are read; new tokens of a prefill's chunk; tokens that all sequences
        # begin with, and the time where each reads them for itself; last tokens that are read exactly
        ("offset", "queries", "shared", "alone_us", "recent"),
        {"op": ("decode", "prefill", "rope_append", "plan"), **_KV},
    ),
    "attention-perplexity": RecordSchema(
        # kernels and reference over the same windows; `change` is the first's perplexity over the second's, less 1, and
        # `change_se` its standard error, from the differences of whole windows
        ("model", "text", "kv", "op", "windows", "window", "tokens", "ppl", "ppl_reference", "change"),
        ("calibrated", "change_se"),
        {"op": ("decode", "prefill", "both"), **_KV},
    ),
    "engine-latency": RecordSchema(
        ("shape", "scheme", "kv", "batch", "context", "ms", "sol_ms", "host_ms", "idle"),
        ("head", "cpu_ms", "mean_ms", "idle_median", "schedule_us", "launch_us", "update_us", "emit_us", "step_us"),
        {"head": ("full", "int8"), **_KV},
    ),
    "engine-start": RecordSchema(  # seconds from the command to the first token, and what the parts of it take
        ("model", "kind", "first_token_s"),
        ("scheme", "tokenizer_s", "weights_s", "cache_s", "warm_up_s", "start_up_s"),
        {"kind": ("cold", "warm")},
    ),
    "soak": RecordSchema(  # benchmarks/soak_report.py has the words; of lists the lengths
        (
            *(
                "model",
                "scheme",
                "seconds",
                "clients",
                "cache_tokens",
                "tokens",
                "faults",
                "preemptions",
                "wrong",
                "left",
            ),
            *("recomputed", "recomputed_nats", "worst_nats", "memory_mib_before", "memory_mib_after"),
            *("device_mib_before", "device_mib_after"),
        ),
        ("at_s", "requests:"),
    ),
    "engine-host": RecordSchema(
        ("batch", "context", "sampling", "schedule_us", "launch_us", "update_us", "emit_us", "step_us"),
        (),
        {"sampling": ("greedy", "top_p")},
    ),
    "latency": RecordSchema(
        ("shape", "scheme", "kv", "batch", "context", "ms", "ms_p99", "prefill_ms", "sol_ms"), (), _KV
    ),
    "served": RecordSchema(
        (
            *("model", "scheme", "kv", "workload", "load", "requests", "errors", "out_tok_s", "slo", "good"),
            *("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "ppl", "text", "windows"),
        ),
        (),
        _KV,
    ),
    "profile": RecordSchema(  # shares of the GPU's time, steps in milliseconds; docs/benchmarks.md has the words
        (
            *("shape", "scheme", "kv", "workload", "memory_gb", "batch", "out_tok_s"),
            *("gemm", "decode_attention", "prefill_attention", "append", "producers", "sampling", "torch", "copies"),
            *("other", "idle", "decode_ms", "mixed_ms", "mixed_time", "host_ms"),
        ),
        ("mixed_tokens",),
        _KV,
    ),
    "mixed-steps": RecordSchema(  # benchmarks/mixed_steps.py has the words; milliseconds
        (
            *("shape", "scheme", "kv", "decodes", "prompts", "tokens", "way"),
            *("decode_ms", "decode_alone_ms", "alone_ms", "first_ms", "host_ms", "adds_ms"),
        ),
        ("idle_ms", "gpu"),
        _KV,
    ),
    "mixed-load": RecordSchema(
        (
            *("shape", "scheme", "kv", "memory_gb", "workload", "batch", "way", "turn"),
            *("max_num_batched_tokens", "admission_interval", "out_tok_s"),
        ),
        ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p50", "itl_p99"),
        _KV,
    ),
    "throughput": RecordSchema(
        (
            *("experiment", "shape", "scheme", "kv", "memory_gb", "batch_mode", "batch", "input", "output"),
            *("out_tok_s", "tpot_target_ms", "tpot_ms_p50", "tpot_ms_p99", "ttft_ms_p50"),
        ),
        (
            *("workload", "requests", "rate", "steady_tok_s", "overall_tok_s", "bound_tok_s", "ttft_ms_p99", "errors"),
            *("weight_gb", "kv_gb", "kv_tokens", "step_gb", "graphs_gb", "others_gb"),
        ),
        {"experiment": ("paper", "offline", "trace:"), "batch_mode": ("best", "equal"), **_KV},
    ),
}


@dataclass(frozen=True)
class Record:
    """One measurement: what was run, when, on what, and its rows."""

    name: str
    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]


def get_schema(name: str) -> RecordSchema:
    """The schema of record `name`; ValueError with the known names if there is none."""
    if name not in SCHEMAS:
        raise ValueError(
            f"unknown record {name!r}; the records are {', '.join(SCHEMAS)}; add a schema in atom/records.py"
        )
    return SCHEMAS[name]


def check_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if the rows are empty or do not follow the schema of record `name`."""
    schema, count = get_schema(name), 0
    for index, row in enumerate(rows):
        schema.check(row, f"record {name}, row {index}")
        count += 1
    if not count:
        raise ValueError(f"record {name} has no rows; a record holds a complete run")


def write_record(
    name: str,
    rows: Iterable[Row],
    machine: str = "cpu",
    *,
    command: str | None = None,
    commit: str | None = None,
    where: Mapping[str, Any] | None = None,
    results: Path = RESULTS,
) -> Path:
    """Write rows as results/<machine>/<name>.json, in place of an earlier run; returns the path.

    machine   "cpu" or the GPU's short name ("h200")
    command   default: this process's command line
    commit    default: the checkout's, with "-dirty" where tracked files were changed
    where     circumstances() of the process that measured, if it was another one
    """
    rows = list(rows)
    check_rows(name, rows)
    record = Record(
        name=name,
        commit=current_commit() if commit is None else commit,
        rows=rows,
        **{**(where or circumstances(machine)), **({"command": command} if command else {})},
    )
    path = results / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(_to_json(record), encoding="utf-8")
    partial.replace(path)
    return path


def read_record(name: str, machine: str = "cpu", results: Path = RESULTS) -> Record:
    """Read and validate results/<machine>/<name>.json.

    Raises FileNotFoundError if it was never measured, ValueError if it does not follow its schema.
    """
    path = results / machine / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no record {path}; check the path, or run the command that measures {name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a record") from None
    missing = set(Record.__dataclass_fields__) ^ set(data if isinstance(data, dict) else ())
    if missing or data["name"] != name:
        raise ValueError(
            f"{path}: expected the fields of record {name}, these differ: {', '.join(sorted(missing)) or 'name'}"
        )
    record = Record(**data)
    check_rows(name, record.rows)
    return record


def _to_json(record: Record) -> str:
    """JSON with one row a line, so that git shows which rows changed."""
    head = asdict(record) | {"rows": []}
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in record.rows)
    return text.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"
