"""End-to-end distillation of a rounded checkpoint: scales, norms and biases learn what the full model predicts.

Rounding layer by layer cannot know what later layers do with an error. Here the rounded model, exactly as it will be
run, is trained for some minutes to predict what the full-precision model predicts: the loss is the divergence
KL(full || rounded) of the next token, on calibration text. Nothing changes in form, so nothing is paid at run time.
A part of the text is held back: as much of what was learned is kept as predicts it best (way_back.py), and where the
divergence does not fall on it the checkpoint stays as it was rounded.

Sources: distillation of quantized language models on the full model's own predictions, LLM-QAT (arXiv:2305.17888);
scales alone, under codes that stay, EfficientQAT (arXiv:2407.11062). Codes learn where they are asked to, straight
through the rounding as in LSQ (arXiv:1902.08153): they start as GPTQ's, their latents where the weights were
(latent.py), and one moves once its latent has crossed the middle to the next.
"""

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atom.checkpoint import REPORT_FILE, RUN_FILE, CheckpointWriter, read_json, read_scheme
from atom.errors import CalibrationError
from atom.models.device import choose_device
from atom.models.loader import load_source
from atom.models.model import Model
from atom.models.source import Source, open_source
from atom.models.tokens import Tokenizer

from .config import CalibrationConfig
from .data import SELF, Windows, load_windows
from .latent import REST
from .progress import Progress, Silent
from .recorded import PLAIN_STEPS
from .student import Student
from .trainable import TrainingKV
from .training_step import TrainingStep, schedule
from .way_back import WayBack

log = logging.getLogger(__name__)

HELD_BACK = 0.05  # of the text
CHUNK_BYTES = 512 * 2**20  # of one chunk of float32 logits
WARM_UP_STEPS = 10
RECENTRED_STEPS = 50  # after so many the centres of keys follow what was learned, and at the end
FIRST_TOKENS = 64  # whose mean key they put on the grid
PACED_STEPS = (PLAIN_STEPS + 1, PLAIN_STEPS + 6)  # whose pace between them says how many there is time for


@dataclass(frozen=True)
class DistillText:
    """Tokens to train on, and tokens of another part of the text to judge by; [windows, length] each."""

    training: Tensor
    held_back: Tensor


def load_distill_text(tokenizer: Tokenizer, config: CalibrationConfig, windows: Windows) -> DistillText:
    """Windows from the texts to distil on, in equal shares: the first 95 % of each to train on, the rest to judge by.

    windows  those of calibration; split instead, where text is sampled from the model itself
    Raises CalibrationError if a text is too short.
    """
    names = config.distill_calib or (config.calib,)
    if names == (SELF,):
        held = max(1, round(len(windows.tokens) * HELD_BACK))
        if held == len(windows.tokens):
            raise CalibrationError("distillation needs 2 windows or more of sampled text; raise --windows")
        return DistillText(windows.tokens[:-held], windows.tokens[-held:])
    count = -(-config.distill_windows // len(names))
    held = max(1, round(count * HELD_BACK))
    parts: list[tuple[Tensor, Tensor]] = []
    for name in names:
        training, held_back = (
            load_windows(name, tokenizer, n, config.window_length, config.seed + 1, part).tokens
            for n, part in ((count, (0.0, 1.0 - HELD_BACK)), (held, (1.0 - HELD_BACK, 1.0)))
        )
        parts.append((training, held_back))
    return DistillText(*(torch.cat(tokens) for tokens in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Distilled:
    """What training did: steps made, the divergence in nats a token on held-back text before and after, seconds.

    tried  the divergence after each share of what was learned; the least is `kl_after`
    """

    steps: int
    tokens: int
    kl_before: float
    tried: dict[float, float]
    seconds: float

    @property
    def share(self) -> float:
        """What was kept of what was learned, if that is better than nothing."""
        return min(self.tried, key=lambda share: self.tried[share])

    @property
    def kl_after(self) -> float:
        return self.tried[self.share]

    @property
    def is_better(self) -> bool:
        return self.kl_after < self.kl_before

    def to_dict(self) -> dict[str, Any]:
        tried = {f"{share:g}": float(f"{kl:.5g}") for share, kl in self.tried.items()}
        found = {"kl_before": float(f"{self.kl_before:.5g}"), "kl_after": float(f"{self.kl_after:.5g}")}
        share = {"share": self.share if self.is_better else 0.0, "tried": tried}
        return {"steps": self.steps, "tokens": self.tokens, "seconds": round(self.seconds, 2), **found, **share}


def distill_checkpoint(
    source: Source,
    rounded: Path,
    out: Path,
    text: DistillText,
    config: CalibrationConfig,
    progress: Progress | None = None,
) -> Distilled:
    """Train the checkpoint in `rounded` towards `source` and write the result to `out`.

    source  the full-precision model that it was made from
    Raises CalibrationError if the loss is not finite.
    """
    device = choose_device(config.device)
    checkpoint = open_source(rounded)
    scheme = read_scheme(checkpoint.config)
    assert scheme is not None, "a checkpoint of this calibrator has a scheme"
    teacher = load_source(source, device, torch.float32)
    student = Student(checkpoint, scheme, device, config.distill_codes)
    found = Training(teacher, student, text, config, progress or Silent()).run()
    _write(student if found.is_better else None, checkpoint, rounded, out, found)
    return found


@dataclass
class Training:
    """One run of training; see distill_checkpoint."""

    teacher: Model
    student: Student
    text: DistillText
    config: CalibrationConfig
    progress: Progress

    def run(self) -> Distilled:
        """Train for the configured steps, fewer if these would take longer than the configured seconds."""
        started = time.perf_counter()
        before = self.divergence(self.text.held_back)
        steps, done, tokens = self.config.distill_steps or 0, 0, 0
        paced = 0.0  # when the pace began to count
        records = not any(rope.kind == "dynamic" for rope in self.student.model.model.ropes())
        if not records:
            log.info("dynamic RoPE: training steps are launched kernel by kernel, which takes several times as long")
        learning = self.student.parameters()
        step = TrainingStep(self.gradients, learning, self.config.distill_rate, records)
        way = WayBack([*learning.codes, *learning.factors, *learning.plain, *learning.weights])
        last: Tensor | None = None
        for batch in self._batches(self.text.training):
            if done == steps:
                break
            loss = step(batch, schedule(done, steps, WARM_UP_STEPS))
            self._check(last, done, steps)  # of the step before: this one may still be running
            last = loss
            done, tokens = done + 1, tokens + batch.numel()
            if done % RECENTRED_STEPS == 0:
                self.student.recentre(self.text.training[:FIRST_TOKENS])
            if last is not None and done in PACED_STEPS:
                self._check(last, done, steps)
                now = time.perf_counter()
                if done == PACED_STEPS[0]:
                    paced = now
                else:
                    pace = (now - paced) / (done - PACED_STEPS[0])
                    left = self.config.distill_seconds - (now - started)
                    steps = max(done, min(steps, done + int(left / pace)))
        self._check(last, done, steps)
        del step
        tried = way.best(self._divergence_recentred, before)
        self.student.recentre(self.text.training[:FIRST_TOKENS])
        return Distilled(done, tokens, before, tried, time.perf_counter() - started)

    def _divergence_recentred(self) -> float:
        """The divergence on held-back text, with the centres of keys where what was learned wants them."""
        self.student.recentre(self.text.training[:FIRST_TOKENS])
        return self.divergence(self.text.held_back)

    def _check(self, loss: Tensor | None, step: int, steps: int) -> None:
        """Show the loss of `step`; CalibrationError if it is not finite."""
        if loss is None:
            return
        found = loss.item()
        if not math.isfinite(found):
            raise CalibrationError(
                f"the distillation loss became {found} at step {step}; lower --distill-rate from "
                f"{self.config.distill_rate:g}"
            )
        self.progress.step(step, steps, found)

    def gradients(self, tokens: Tensor) -> Tensor:
        """The mean divergence over tokens [windows, length]; gradients are added to the student's parameters."""
        hidden = self.student.hidden(tokens)
        expected = self._expected(tokens)
        leaf = hidden.detach().requires_grad_()
        total = torch.zeros((), device=leaf.device)
        for rows in self._chunks(len(leaf)):
            loss = self._kl(leaf[rows], expected[rows]) / len(leaf)
            loss.backward()
            total += loss.detach()
        hidden.backward(leaf.grad)
        return total

    @torch.no_grad()
    def divergence(self, tokens: Tensor) -> float:
        """Mean KL(full || rounded) over tokens [windows, length], in nats."""
        total = 0.0
        for batch in tokens.split(self._batch_size(tokens)):
            hidden, expected = self.student.hidden(batch), self._expected(batch)
            total += sum(float(self._kl(hidden[rows], expected[rows])) for rows in self._chunks(len(hidden)))
        return total / tokens.numel()

    @torch.no_grad()
    def _expected(self, tokens: Tensor) -> Tensor:
        """The full model's hidden states [windows * length, hidden_size]."""
        kv = TrainingKV(self.teacher.config, len(tokens), device=self.student.device)
        hidden: Tensor = self.teacher(tokens.to(self.student.device).flatten(), kv.positions(tokens.shape[1]), kv)
        return hidden

    def _kl(self, hidden: Tensor, expected: Tensor) -> Tensor:
        """The sum over tokens of KL(full || rounded), from hidden states."""
        found = self.student.model.logits(hidden).float().log_softmax(-1)
        with torch.no_grad():
            wanted = self.teacher.logits(expected).float().log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)

    def _chunks(self, rows: int) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (4 * self.teacher.config.vocab_size))
        for start in range(0, rows, size):
            yield slice(start, start + size)

    def _batch_size(self, tokens: Tensor) -> int:
        return max(1, self.config.distill_tokens // tokens.shape[1])

    def _batches(self, tokens: Tensor) -> Iterator[Tensor]:
        """Batches of whole windows in an order drawn anew every time round, without end."""
        draw = random.Random(self.config.seed)
        size = min(self._batch_size(tokens), len(tokens))
        order = list(range(len(tokens)))
        while True:
            draw.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                yield tokens[order[start : start + size]]


def _write(student: Student | None, checkpoint: Source, rounded: Path, out: Path, found: Distilled) -> None:
    """The checkpoint with what was learned in the place of what was rounded; all of it as it was without a student."""
    layers = sorted({name.split(".")[2] for name in checkpoint.names() if name.startswith("model.layers.")}, key=int)
    writer = CheckpointWriter(out, {"distilled": rounded.name}, len(layers) + 1, resume=True)
    for number, index in enumerate([None, *map(int, layers)], 1):
        own = [name for name in checkpoint.names() if _belongs(name, index) and not name.endswith(f".{REST}")]
        learned = {} if student is None else dict(student.tensors(index))
        tensors = {name: checkpoint.get(name) for name in own}
        for name, tensor in learned.items():
            tensors[name] = tensor.to(tensors[name].dtype)
        writer.write_shard(number, tensors)
    report = {**read_json(rounded / REPORT_FILE), "distilled": found.to_dict()}
    weights = (".safetensors", "config.json", REPORT_FILE, "model.safetensors.index.json", RUN_FILE)
    files = [file for file in rounded.iterdir() if not file.name.endswith(weights) or file.name in _EXTRA]
    writer.finish(dict(checkpoint.config), report, files)


_EXTRA = ("generation_config.json", "tokenizer_config.json")  # end like config.json and are not it


def _belongs(name: str, index: int | None) -> bool:
    is_layer = name.startswith("model.layers.")
    return not is_layer if index is None else name.startswith(f"model.layers.{index}.")
