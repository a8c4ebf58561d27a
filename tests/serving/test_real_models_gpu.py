"""The engine through the GPU's kernels on real models, against the torch reference and against `atom eval`.

ATOM_TEST_MODELS names a directory whose sub-directories are models or Atom checkpoints; ATOM_TEST_TEXT a text file for
perplexity (the prompts below otherwise). What was found is printed: run with -s.
"""

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atom.eval.perplexity import make_windows, measure_perplexity
from atom.eval.texts import Text
from atom.models.generate import scheme_cache
from atom.models.loader import load_model, load_tokenizer
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams

from .test_real_models import MODELS, PROMPTS

NEW = 200
WINDOW, WINDOWS = 512, 32
MORE = [
    "Question: Why is the sky blue?\nAnswer:",
    "The three primary colours are",
    "In 1969, the first humans",
    "To make bread, you need flour, water,",
    "Dear Sir or Madam,\n\nI am writing to",
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="ATOM_TEST_MODELS names no directory with models"),
]
each_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)


@dataclass(frozen=True)
class Agreement:
    """How two sets of scores agree on the tokens of some texts, at equal context everywhere.

    differs  bool [T], the first set's choice is not the second's
    margins  [T], by how much the second's logit of its own choice exceeds that of the first's choice
    changes  [T], difference of their log-probabilities of the tokens that stand there
    """

    differs: Tensor
    margins: Tensor
    changes: Tensor

    @classmethod
    def of(cls, choice: Tensor, logprobs: Tensor, logits: Tensor, tokens: Tensor) -> "Agreement":
        margins = logits.max(-1).values - logits.gather(1, choice[:, None])[:, 0]
        changes = logprobs - logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return cls(choice != logits.argmax(-1), margins, changes.abs())

    def __str__(self) -> str:
        worst = f", margins to {float(self.margins.max()):.3f}" if self.differs.any() else ""
        return (
            f"{int(self.differs.sum())} of {len(self.differs)} choices differ{worst}; log-probabilities by "
            f"{float(self.changes.mean()):.4f} on average"
        )


@torch.inference_mode()
def score(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """The logits [len(answer), vocab_size] from which a model would have chosen an answer's tokens."""
    ids = torch.tensor([*prompt, *answer[:-1]], device=model.device)
    kv = scheme_cache(model)
    hidden = model(ids, kv.positions(len(ids)), kv)
    return model.logits(hidden[len(prompt) - 1 :]).float().cpu()


@each_model
def test_greedy_text_is_the_references(path: Path) -> None:
    """For 200 tokens on ten prompts, as far as rounding lets it be.

    Engine and reference are compared token by token on the engine's own texts. Where they choose otherwise, that is a
    tie as far as the reference itself is decided: in float32 it differs from itself in bfloat16 as much. Where inputs
    are rounded to 4 bits that is a lot (what moves past half a step moves by a whole one), elsewhere next to nothing.
    """
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in (*PROMPTS, *MORE)]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(path), device="cuda", max_model_len=2048, kv_cache_bytes="1GiB", max_num_seqs=16) as llm:
        answers = [completion.samples[0] for completion in llm.generate(prompts, params)]
        print(f"\n{path.name}: {llm.ready.facts['kernels']}")
        assert llm.engine.stats().used_blocks == 0
    release()
    texts = [list(answer.token_ids) for answer in answers]
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(path, "cuda", dtype, kernels="reference")
        logits[dtype] = [score(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        del model
        release()
    for index, (answer, found) in enumerate(zip(answers, logits[torch.bfloat16], strict=True)):
        tokens = torch.tensor(answer.token_ids)
        places = (found.argmax(-1) != tokens).nonzero()[:, 0].tolist()
        margins = [float(found[place].max() - found[place, tokens[place]]) for place in places[:1]]
        what = f"first differs at {places[0]}, by a margin of {margins[0]:.4f}" if places else f"equal for {NEW} tokens"
        print(f"{path.name}, prompt {index}: {what}")
    tokens, reference = torch.tensor([token for text in texts for token in text]), torch.cat(logits[torch.bfloat16])
    said = torch.tensor([token.logprob for answer in answers for token in answer.logprobs or ()])
    other = torch.cat(logits[torch.float32])
    engine = Agreement.of(tokens, said, reference, tokens)
    itself = Agreement.of(other.argmax(-1), other.log_softmax(-1).gather(1, tokens[:, None])[:, 0], reference, tokens)
    print(f"{path.name}, engine and reference: {engine}")
    print(f"{path.name}, reference in float32 and in bfloat16: {itself}")
    assert engine.changes.mean() <= 1.5 * itself.changes.mean() + 1e-3
    assert engine.differs.sum() <= 1.5 * itself.differs.sum() + 5
    assert engine.margins.max() <= 2 * max(itself.margins.max(), itself.changes.max())


@each_model
def test_perplexity_is_evaluations(path: Path) -> None:
    """Prompt logprobs through the engine, in chunks of other sizes, against `atom eval` on kernels and reference."""
    tokenizer = load_tokenizer(path)
    file = os.environ.get("ATOM_TEST_TEXT")
    text = Text("text", "test", Path(file).read_text() if file else " ".join((*PROMPTS, *MORE)) * 40)
    windows = make_windows(tokenizer, text, window=WINDOW, limit=WINDOWS).tokens.tolist()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    options: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 1000, "kv_cache_bytes": "1GiB"}
    with LLM(str(path), device="cuda", max_model_len=2048, **options) as llm:
        scored = llm.generate(windows, params)
    nll = [-each.logprob for completion in scored for each in completion.prompt_logprobs or ()]
    engine = sum(nll) / len(nll)
    release()
    found = {}
    for kernels in ("auto", "reference"):
        model = load_model(path, "cuda", torch.bfloat16, kernels=kernels)  # type: ignore[arg-type]
        measured = measure_perplexity(model, tokenizer, text, window=WINDOW, limit=WINDOWS)
        assert measured.tokens == len(nll)
        found[kernels] = measured.nll
        del model
        release()
    line = ", ".join(f"{name} {value:.5f}" for name, value in found.items())
    print(f"\n{path.name}: mean nll of {len(nll)} tokens: engine {engine:.5f}, atom eval: {line}")
    assert engine == pytest.approx(found["auto"], abs=5e-3)
    assert engine == pytest.approx(found["reference"], abs=2e-2)  # 4-bit inputs: see above


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
