"""What the accuracy scripts say of one model under one scheme: bits, perplexities, task scores, retrieval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atom.eval.compare import average_recovery
from atom.eval.load import Loaded
from atom.eval.perplexity import Bos, Perplexity, Reference, Windows, make_windows, measure_perplexity
from atom.eval.results import TaskResult
from atom.eval.retrieval import measure_retrieval
from atom.eval.texts import Text, load_text
from atom.models.family import model_config
from atom.models.model import Model
from atom.models.source import Source
from atom.models.tokens import Tokenizer
from atom.quant.schemes import Scheme
from atom.records import Row

if TYPE_CHECKING:
    from atom.eval.engine import EngineGenerator


def effective_bits(source: Source, scheme: Scheme) -> dict[str, float]:
    """Bits of a weight, of an activation, and of a cached value at this model's width, scales included."""
    config = model_config(source.config, source.generation_config)
    return {
        "bits_weight": round(scheme.weight_bits(config.hidden_size), 3),
        "bits_activation": round(scheme.activation_bits(config.hidden_size), 3),
        "bits_kv": round(scheme.kv_bits(config.head_dim, config.num_layers), 3),
    }


@dataclass
class Perplexities:
    """Perplexity on test texts, each tokenised once for all checkpoints of a model.

    length  tokens of a window
    limit   windows of each text
    """

    tokenizer: Tokenizer
    names: Sequence[str]
    length: int
    limit: int | None
    bos: Bos = "auto"
    texts: list[Text] = field(init=False)
    _windows: dict[int, Windows] = field(default_factory=dict)
    _reference: Reference | None = None  # full precision, whose hidden states are kept

    def __post_init__(self) -> None:
        self.texts = [load_text(name) for name in self.names]

    def measure(self, loaded: Loaded, number: int = 0, full: Model | None = None) -> dict[str, Any]:
        """Keys of a row for text `number`; with the full model also the divergence of its predictions from this one's.

        Raises ValueError where the loss is beyond all sense.
        """
        return perplexity_keys(loaded, self.score(loaded, number, full))

    def score(self, loaded: Loaded, number: int = 0, full: Model | None = None) -> Perplexity:
        """What `measure` has its keys from."""
        text = self.texts[number]
        if number not in self._windows:
            self._windows[number] = make_windows(self.tokenizer, text, self.length, self.bos, self.limit)
        if full is not None and (self._reference is None or self._reference.model is not full):
            self._reference = Reference(full)
        return measure_perplexity(
            loaded.model,
            self.tokenizer,
            text,
            window=self.length,
            windows=self._windows[number],
            reference=None if full is None else self._reference,
        )


def perplexity_keys(loaded: Loaded, found: Perplexity) -> dict[str, Any]:
    """Keys of a row: a model's perplexity, and how it was measured."""
    size = {"windows": found.windows, "window": found.window}
    row = {"text": found.text, "ppl": round(found.perplexity, 4), **size, "path": loaded.path, "dtype": loaded.dtype}
    return row if found.kl is None else {**row, "kl": round(found.kl, 5)}


def change_keys(reference: Perplexity, found: Perplexity) -> dict[str, Any]:
    """Keys of a row: by what part perplexity differs from the reference's on the same windows.

    A code at half a step falls to either side of a rounding and all that follows it differs a little, so part of the
    change is chance: its standard error comes from the differences of whole windows in nats (None: of one window).
    """
    nats = [a - b for a, b in zip(found.window_nll, reference.window_nll, strict=True)]
    error = statistics.stdev(nats) / math.sqrt(len(nats)) if len(nats) > 1 else None
    return {
        "ppl_reference": round(reference.perplexity, 4),
        "change": round(math.expm1(statistics.fmean(nats)), 6),
        "change_se": None if error is None else round(error, 6),
    }


@dataclass
class Tasks:
    """lm-eval's tasks, their data loaded once; without `names` nothing runs."""

    names: Sequence[str]
    include_path: str | None = None
    limit: int | None = None
    _prepared: Any = None

    def measure(self, loaded: Loaded) -> dict[str, Any]:
        """Keys of a row: each task's own metric and its standard error."""
        return task_keys(self.run(loaded))

    def run(self, loaded: Loaded, engine: "EngineGenerator | None" = None) -> tuple[TaskResult, ...]:
        """All tasks on one model, document by document; `engine` generates, if given."""
        if not self.names:
            return ()
        from atom.eval.lm import AtomLM
        from atom.eval.tasks import prepare_tasks, run_tasks

        if self._prepared is None:
            self._prepared = prepare_tasks(self.names, self.include_path)
        return run_tasks(AtomLM(loaded, engine=engine), self._prepared, limit=self.limit)


def task_keys(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Keys of a row: each task's own metric and its standard error."""
    found: dict[str, Any] = {}
    for task in results:
        _, metric = task.primary
        name = f"task:{task.task.removesuffix('_local')}"
        found[name] = round(metric.value, 4)
        found[f"{name}:stderr"] = None if metric.stderr is None else round(metric.stderr, 4)
    return found


def retrieval_keys(loaded: Loaded, lengths: Sequence[int], contexts: int = 8) -> dict[str, Any]:
    """Keys of a row: the shares of numbers found in `contexts` contexts of each length, and their standard errors."""
    keys: dict[str, Any] = {}
    for length in lengths:
        _, found = measure_retrieval(loaded.model, loaded.tokenizer, length, contexts).primary
        keys[f"retrieval:{length}"] = round(found.value, 4)
        keys[f"retrieval:{length}:stderr"] = None if found.stderr is None else round(found.stderr, 4)
    return keys


def recovery_keys(full: Sequence[TaskResult], found: Sequence[TaskResult]) -> dict[str, Any]:
    """Keys of a row: what is kept of full precision's mean over tasks, and half of its 95 % interval, in percent."""
    recovery, half = average_recovery(full, found)
    return {
        "recovery": round(recovery, 2),
        "recovery:95": None if half is None else round(half, 2),
        "documents": sum(task.samples for task in full),
    }


def fill_in_full_precision(rows: Sequence[Row]) -> None:
    """Write full precision's perplexity beside every other one on the same text; it may stand in another part.

    Raises KeyError if a model's full precision was not measured on the same windows.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return row["model"], row["text"], row["windows"]

    own = [row for row in rows if _is_full_precision(row) and row.get("dtype", "float32") == "float32"]
    full = {key(row): row["ppl"] for row in own}
    for row in rows:
        row["ppl_fp"] = full[key(row)]


def _is_full_precision(row: Row) -> bool:
    """It is what the others lose against, by method or, where schemes are compared, by scheme and cache."""
    return row["method"] == "fp" if "method" in row else (row["scheme"], row["kv"]) == ("bf16", "bf16")
