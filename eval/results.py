"""What an evaluation found, with all that is needed to find it again, as one JSON file."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .perplexity import Perplexity
from .suites import primary_metric
from .table import format_table

KIND, VERSION = "atom-eval", 1


@dataclass(frozen=True)
class Metric:
    """A number, its standard error (None: unknown), and its value on each document, for paired comparison."""

    value: float
    stderr: float | None
    higher_is_better: bool
    per_sample: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TaskResult:
    """One task or group. `fingerprint` is the same for two results on the same documents and prompts."""

    task: str
    version: str
    num_fewshot: int
    samples: int
    fingerprint: str | None
    metrics: dict[str, Metric]

    @property
    def primary(self) -> tuple[str, Metric]:
        """The metric to quote where one is wanted."""
        name = primary_metric(self.task, self.metrics)
        return name, self.metrics[name]


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one model.

    scheme  the scheme as the checkpoint has it, None in full precision
    path    "kernels" if the quantized ops ran on the served kernels, "reference" if on the torch reference
    config  the EvalConfig it was asked for with
    """

    model: str
    scheme: dict[str, Any] | None
    path: str
    device: str
    dtype: str
    seed: int
    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    seconds: float
    perplexity: tuple[Perplexity, ...] = ()
    tasks: tuple[TaskResult, ...] = ()

    @property
    def scheme_name(self) -> str:
        """The scheme's name, "full precision" without one; where a budget chose it is that of the base."""
        if self.scheme is None:
            return "full precision"
        is_mixed = self.scheme.get("overrides") or self.scheme.get("kv_overrides")
        return f"{self.scheme.get('name', 'unnamed')}{', formats by place' if is_mixed else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EvalResult":
        """Read what to_dict wrote; ValueError if it is something else, or of a newer version."""
        if data.get("kind") != KIND:
            raise ValueError(
                f"this JSON is no evaluation (kind is {data.get('kind')!r}); give a file that atom eval wrote"
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"the file has version {data.get('version')}, this Atom reads {VERSION}; update Atom, or evaluate again"
            )
        fields = {key: value for key, value in data.items() if key not in ("kind", "version")}
        fields["perplexity"] = tuple(_perplexity(row) for row in data["perplexity"])
        fields["tasks"] = tuple(_task(row) for row in data["tasks"])
        return cls(**fields)

    def write(self, path: Path) -> None:
        """Write JSON to `path`, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "EvalResult":
        """Read an evaluation; FileNotFoundError or ValueError say what is wrong with the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; atom eval MODEL --output {path} writes it")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a complete evaluation ({error}); run atom eval again") from error

    def summary(self) -> dict[str, Any]:
        """The numbers alone, for the last line of stdout."""
        return {
            "model": self.model,
            "scheme": self.scheme_name,
            "path": self.path,
            "perplexity": {p.text: p.perplexity for p in self.perplexity},
            "tasks": {
                task.task: {name: {"value": m.value, "stderr": m.stderr} for name, m in task.metrics.items()}
                for task in self.tasks
            },
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """The result for people."""
        parts = [f"{self.model} ({self.scheme_name}, {self.path} path, {self.device}, {self.dtype})"]
        if self.perplexity:
            with_kl = any(p.kl is not None for p in self.perplexity)
            header = [
                "text",
                "perplexity",
                "windows",
                "tokens",
                "BOS",
                "seconds",
                *(["KL", "top-1"] if with_kl else []),
            ]
            parts.append(format_table(header, [_perplexity_row(p, with_kl) for p in self.perplexity]))
        if self.tasks:
            rows = [
                [
                    task.task,
                    name,
                    f"{m.value:.4f}",
                    "" if m.stderr is None else f"± {m.stderr:.4f}",
                    f"{task.samples}",
                    f"{task.num_fewshot}",
                ]
                for task in self.tasks
                for name, m in task.metrics.items()
            ]
            parts.append(format_table(["task", "metric", "value", "stderr", "documents", "shots"], rows))
        return "\n\n".join(parts)


def _perplexity_row(p: Perplexity, with_kl: bool) -> list[str]:
    kl = ["" if p.kl is None else f"{p.kl:.4f}", "" if p.top1 is None else f"{100 * p.top1:.2f} %"] if with_kl else []
    return [p.text, f"{p.perplexity:.4f}", f"{p.windows} x {p.window}", f"{p.tokens:,}", p.bos, f"{p.seconds:.1f}", *kl]


def _perplexity(row: dict[str, Any]) -> Perplexity:
    return Perplexity(**{**row, "window_nll": tuple(row["window_nll"])})


def _task(row: dict[str, Any]) -> TaskResult:
    metrics = {
        name: Metric(**{**metric, "per_sample": None if metric["per_sample"] is None else tuple(metric["per_sample"])})
        for name, metric in row["metrics"].items()
    }
    return TaskResult(**{**row, "metrics": metrics})
