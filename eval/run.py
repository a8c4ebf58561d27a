"""The function behind `atom eval`: load once, measure texts and tasks, return what was found."""

import contextlib
import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from atom.circumstances import command_line, current_commit, machine_facts, package_versions
from atom.errors import UnsupportedError

from .load import Loaded, load
from .perplexity import Bos, Perplexity, measure_perplexity
from .results import EvalResult, TaskResult
from .retrieval import measure_retrieval
from .texts import load_text

if TYPE_CHECKING:
    from .engine import EngineGenerator
    from .tasks import Prepared

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model: perplexity on texts, tasks through lm-eval, on the path that runs it.

    Example: atom eval OUT --ppl wikitext2 --tasks piqa,arc_easy --limit 100 --output result.json
    """

    model: Annotated[str, tyro.conf.Positional]
    """Atom checkpoint, model directory, hub id, GGUF file, or the alias smollm2."""

    ppl: tuple[str, ...] = ()
    """Texts for perplexity: wikitext2, ptb, c4, a .txt, .jsonl or .parquet FILE, or SET=FILE, a local copy of a set."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks and groups, or suites: zero-shot, zero-shot-more, generative, long-context. Commas separate too."""

    retrieval: tuple[int, ...] = ()
    """Contexts in tokens, 4096 16384 say: the share of numbers hidden in so long a text that are found again."""

    generate_on: Literal["model", "engine"] = "model"
    """Who continues the prompts of generative tasks: the model alone, or an engine like the one that serves."""

    limit: int | None = None
    """Only the first so many windows of each text and documents of each task."""

    window: int | None = None
    """Tokens of a perplexity window; default 2048, or the model's context where that is shorter."""

    bos: Bos = "auto"
    """BOS in every window, before the whole text (published Llama tables), or none; auto asks the tokenizer."""

    kl_to: str | None = None
    """A full-precision model with the same tokenizer: also measure the KL divergence to it on the texts."""

    batch_size: int | None = None
    """Windows or sequences that go through the model at once; default: as fits the device. Changes speed only."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the GPU where there is one."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of everything that is not quantized; auto is float32 on a CPU and bfloat16 on a GPU."""

    kernels: Literal["auto", "reference"] = "auto"
    """Run quantized ops on the served kernels, or on the torch reference."""

    head: Literal["full", "int8"] = "full"
    """The head in the model's own format, or in INT8 weights and activations."""

    include_path: str | None = None
    """A folder of lm-eval task files, for tasks of your own and for offline copies (<task>_local)."""

    num_fewshot: int | None = None
    """Examples in each task's prompt; default: the suite's or the task's own."""

    max_length: int | None = None
    """Context in tokens for tasks; default the model's."""

    apply_chat_template: bool = False
    """Put task prompts into the model's chat template."""

    seed: int = 1234
    """Of the choice of few-shot examples and of everything random; 1234 is lm-eval's own default."""

    output: str | None = None
    """Write the full result as JSON to this file, for atom report eval A.json B.json."""

    def __post_init__(self) -> None:
        if not self.ppl and not self.tasks and not self.retrieval:
            raise ValueError("nothing to measure; give --ppl wikitext2 (or a file), --tasks piqa,..., --retrieval 4096")
        for name in ("limit", "window", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out")
        if self.kl_to is not None and not self.ppl:
            raise ValueError("--kl-to measures on texts, and none was given; add --ppl wikitext2 (or a file)")


def evaluate(config: EvalConfig, progress: Progress | None = None) -> EvalResult:
    """Measure what `config` asks for; written to config.output if that is given.

    progress  called with (text, windows done, windows in all, perplexity so far)
    Raises ValueError, UnsupportedError, CheckpointError or FileNotFoundError, before a weight is read where possible.
    """
    began = time.perf_counter()
    texts = [load_text(name) for name in config.ppl]
    prepared = _prepare_tasks(config) if config.tasks else None
    loaded = load(config.model, config.device, config.dtype, config.kernels, head=config.head)
    reference = None if config.kl_to is None else load(config.kl_to, config.device, config.dtype, config.kernels)
    found: list[Perplexity] = []
    for text in texts:
        report = None if progress is None else _named(progress, text.name)
        found.append(
            measure_perplexity(
                loaded.model,
                loaded.tokenizer,
                text,
                window=config.window,
                limit=config.limit,
                batch_size=config.batch_size,
                bos=config.bos,
                reference=None if reference is None else reference.model,
                reference_name=config.kl_to,
                progress=report,
            )
        )
        log.info("%s: perplexity %.4f over %d windows", text.name, found[-1].perplexity, found[-1].windows)
    scheme = loaded.model.scheme
    result = EvalResult(
        model=config.model,
        scheme=None if scheme is None else scheme.to_dict(),
        path=loaded.path,
        device=loaded.device,
        dtype=loaded.dtype,
        seed=config.seed,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=current_commit(),
        command=command_line(),
        machine=machine_facts(gpu=loaded.model.device.type == "cuda"),
        versions=package_versions(),
        config=json.loads(json.dumps(dataclasses.asdict(config))),
        perplexity=tuple(found),
        tasks=(
            *(measure_retrieval(loaded.model, loaded.tokenizer, length) for length in config.retrieval),
            *(() if prepared is None else _run_tasks(config, loaded, prepared)),
        ),
        seconds=round(time.perf_counter() - began, 3),
    )
    if config.output is not None:
        result.write(Path(config.output))
    return result


def _named(progress: Progress, text: str) -> Callable[[int, int, float], None]:
    return lambda done, count, perplexity: progress(text, done, count, perplexity)


def _prepare_tasks(config: EvalConfig) -> "Prepared":
    try:
        from .tasks import prepare_tasks
    except ImportError as error:
        raise UnsupportedError(
            f"--tasks needs the package lm_eval ({error}); pip install 'atom-serving[eval]', or measure --ppl only"
        ) from error
    return prepare_tasks(config.tasks, config.include_path)


def _run_tasks(config: EvalConfig, loaded: Loaded, prepared: "Prepared") -> tuple[TaskResult, ...]:
    from .lm import AtomLM
    from .tasks import run_tasks

    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_engine(config)) if config.generate_on == "engine" else None
        lm = AtomLM(
            loaded,
            batch_size=config.batch_size or "auto",
            max_length=config.max_length,
            seed=config.seed,
            engine=engine,
        )
        return run_tasks(
            lm,
            prepared,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            seed=config.seed,
            apply_chat_template=config.apply_chat_template,
        )


def _engine(config: EvalConfig) -> "EngineGenerator":
    from .engine import EngineGenerator

    return EngineGenerator(
        config.model, device=config.device, dtype=config.dtype, kernels=config.kernels, head=config.head
    )
