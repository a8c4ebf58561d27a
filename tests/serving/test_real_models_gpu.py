"""The engine through the GPU's kernels on real models, against the torch reference, transformers and `atom eval`.

ATOM_TEST_MODELS names a directory whose sub-directories are models or Atom checkpoints; ATOM_TEST_TEXT a text file for
perplexity (the prompts below otherwise). What was found is printed: run with -s.
"""

import gc
import json
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

DEVICE = "cuda"
NEW = 200
VARIANTS = 8  # runs of the reference that are rounded otherwise
TIE = 4.0  # standard deviations of its own rounding within which the reference has not decided
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


class Reference:
    """Our model on torch alone."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.model: Any = load_model(path, DEVICE, dtype, kernels="reference")
        self.layers = list(self.model.model.decoder_layers())

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Those of the last `count` tokens, [count, vocab_size]."""
        kv = scheme_cache(self.model)
        hidden = self.model(ids, kv.positions(len(ids)), kv)
        found: Tensor = self.model.logits(hidden[-count:])
        return found


class Transformers:
    """The model as transformers computes it."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE).eval()
        self.layers = self.model.model.layers

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Those of the last `count` tokens, [count, vocab_size]."""
        found: Tensor = self.model(ids[None], logits_to_keep=count).logits[0]
        return found


Definition = type[Reference] | type[Transformers]


def is_quantized(path: Path) -> bool:
    return "quantization_config" in json.loads((path / "config.json").read_text())


def has_window(path: Path) -> bool:
    """Its newest tokens are read exactly, but not behind prefixes of others."""
    config = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    return bool(config.get("scheme", {}).get("kv_recent"))


DEFINED: list[tuple[Path, Definition, int]] = [
    (path, definition, guesses)
    for path in MODELS
    for definition, guesses in ((Reference, 0), (Transformers, 0), (Reference, 4))
    if definition is Reference or not is_quantized(path)
]
each_definition = pytest.mark.parametrize(
    ("path", "definition", "guesses"),
    DEFINED,
    ids=[f"{path.name}-{kind.__name__.lower()}{'-guesses' * (guesses > 0)}" for path, kind, guesses in DEFINED],
)


@torch.inference_mode()
def score(model: Reference | Transformers, prompt: list[int], answer: list[int]) -> Tensor:
    """The logits [len(answer), vocab_size] from which a model would have chosen an answer's tokens."""
    ids = torch.tensor([*prompt, *answer[:-1]], device=DEVICE)
    return model.logits(ids, len(answer)).float().cpu()


def round_otherwise(layers: Any, seed: int) -> list[Any]:
    """Have a bfloat16 model round as another order of its sums might: what a half layer adds moves by up to one step.

    Returns the hooks, to be removed.
    """
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def move(module: Any, inputs: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # transformers' attention tells its weights too
            return (move(module, inputs, out[0]), *out[1:])
        steps = torch.rand(out.shape, generator=draw, device=out.device) * 2 - 1
        return (out.float() * (1 + 2**-8 * steps)).to(out.dtype)

    halves = [half for layer in layers for half in (layer.self_attn, layer.mlp)]
    return [half.register_forward_hook(move) for half in halves]


def leads(logits: Tensor, choices: Tensor, others: Tensor) -> Tensor:
    """[T], by how much the logits of `choices` exceed those of `others`."""
    found: Tensor = logits.gather(1, choices[:, None])[:, 0] - logits.gather(1, others[:, None])[:, 0]
    return found


@each_definition
def test_greedy_text_is_the_references(path: Path, definition: Definition, guesses: int) -> None:
    """For 200 tokens on ten prompts, or the first difference is a tie; with speculative decoding, too.

    Engine and reference are compared token by token on the engine's own texts. A tie is where the reference's lead of
    its choice over the engine's is within its own rounding: VARIANTS runs of it, each rounded otherwise, give that
    lead's variance at this very place; half of what counts is the mean of all places, as eight runs tell little of
    one. (SmolLM2's largest of 56 leads is 3.1 standard deviations.) What is rounded to 4 bits moves by a whole step or
    not at all, which eight runs may not show: there a lead may be as large as the largest by which the reference in
    bfloat16 and in float32 choose otherwise. As a whole the engine may be no further off than the reference in float32
    is.
    """
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in (*PROMPTS, *MORE)]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
    options: dict[str, Any] = {"max_num_seqs": 16, "kv_cache_bytes": "1GiB", "num_speculative_tokens": guesses}
    with LLM(str(path), device=DEVICE, max_model_len=2048, **options) as llm:
        answers = [completion.samples[0] for completion in llm.generate(prompts, params)]
        stats = llm.engine.stats()
        print(f"\n{path.name}: {stats.num_accepted_tokens} guesses accepted; {llm.ready.facts['kernels']}")
        assert stats.used_blocks == 0 and (stats.num_accepted_tokens > 0) == (guesses > 0)
    release()
    texts = [list(answer.token_ids) for answer in answers]
    logits: dict[torch.dtype, Tensor] = {}
    tokens = torch.tensor([token for text in texts for token in text])
    others = []  # the variants' leads
    for dtype in (torch.bfloat16, torch.float32):
        model = definition(path, dtype)

        def run(model: Reference | Transformers = model) -> Tensor:
            return torch.cat([score(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)])

        logits[dtype] = run()
        if dtype == torch.bfloat16:
            choices = logits[dtype].argmax(-1)
            for seed in range(VARIANTS):
                hooks = round_otherwise(model.layers, seed)
                others.append(leads(run(), choices, tokens))
                for hook in hooks:
                    hook.remove()
        del model, run
        release()
    reference = logits[torch.bfloat16]
    lead = leads(reference, choices, tokens)
    step = 2.0 ** (reference.max(-1).values.abs().log2().floor() - 7)  # of bfloat16, in which logits are
    moved = torch.stack(others).var(0)
    noise = ((moved + moved.mean()) / 2 + step**2 / 6).sqrt()
    firsts, name = [], f"{path.name}, {definition.__name__}{', guessing' * (guesses > 0)}"
    for index in range(len(prompts)):
        (places,) = (choices != tokens)[NEW * index : NEW * (index + 1)].nonzero(as_tuple=True)
        what = f"equal for {NEW} tokens"
        if len(places):
            first = NEW * index + int(places[0])
            firsts.append(float(lead[first] / noise[first]))
            what = f"first differs at {int(places[0])}: a lead of {lead[first]:.4f}, its rounding {noise[first]:.4f}"
        print(f"{name}, prompt {index}: {what}")
    differs = choices != tokens
    ratios = (lead / noise)[differs]
    if len(ratios):
        print(
            f"{name}: leads of all differences over their rounding: median {ratios.median():.2f}, "
            f"most {ratios.max():.2f}, beyond {TIE}: {int((ratios > TIE).sum())} of {len(ratios)}"
        )
    said = torch.tensor([token.logprob for answer in answers for token in answer.logprobs or ()])
    other = logits[torch.float32]
    engine = Agreement.of(tokens, said, reference, tokens)
    own = other.argmax(-1)
    itself = Agreement.of(own, other.log_softmax(-1).gather(1, tokens[:, None])[:, 0], reference, tokens)
    print(f"{name}, engine and reference: {engine}")
    print(f"{name}, reference in float32 and in bfloat16: {itself}")
    most = TIE if not is_quantized(path) else max(TIE, float((leads(reference, choices, own) / noise).max()))
    print(f"{name}: leads of first differences over their rounding at most {max(firsts, default=0):.2f} of {most:.2f}")
    assert all(ratio <= most for ratio in firsts), f"no tie: {firsts}"
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
    with LLM(str(path), device=DEVICE, max_model_len=2048, **options) as llm:
        scored = llm.generate(windows, params)
    nll = [-each.logprob for completion in scored for each in completion.prompt_logprobs or ()]
    engine = sum(nll) / len(nll)
    release()
    found = {}
    for kernels in ("auto", "reference"):
        model = load_model(path, DEVICE, torch.bfloat16, kernels=kernels)  # type: ignore[arg-type]
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


@each_model
def test_a_text_is_the_same_alone_and_batched(path: Path) -> None:
    """With attention in fixed parts, greedy; and with the prefix cache as without it, while all others come twice."""
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in (*PROMPTS, *MORE)]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    options: dict[str, Any] = {"max_num_seqs": 16, "attention_split_tokens": 256, "kv_cache_bytes": "512MiB"}
    found = []
    for caches in (False,) if has_window(path) else (True, False):
        with LLM(str(path), device=DEVICE, max_model_len=1024, enable_prefix_caching=caches, **options) as llm:

            def texts(asked: list[list[int]], llm: LLM = llm) -> list[list[int]]:
                return [list(completion.token_ids) for completion in llm.generate(asked, params)]

            together, alone = texts(prompts), [text for prompt in prompts for text in texts([prompt])]
            hits = llm.engine.stats().num_prefix_hits
        release()
        print(f"\n{path.name}, prefix cache {caches}: {hits} hits; tokens equal alone and batched: ", end="")
        print([sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(together, alone, strict=True)])
        assert (hits > 0) == caches
        found += [together, alone]
    assert all(texts == found[0] for texts in found)
