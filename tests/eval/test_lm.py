"""AtomLM against lm-eval's own `hf` model on the same tiny Llama, in float32."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from atom.errors import UnsupportedError
from atom.eval.engine import EngineGenerator
from atom.eval.generate import generate
from atom.eval.lm import AtomLM
from atom.eval.load import Loaded

from .conftest import CONTEXT, SENTENCES

LONG = " ".join(SENTENCES * 4)  # several contexts long


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=index) for index, args in enumerate(arguments)]


@pytest.fixture(scope="module", params=["no-bos", "bos"])
def pair(request: pytest.FixtureRequest) -> tuple[AtomLM, Any]:
    bos = request.param == "bos"
    folder = request.getfixturevalue("bos_model_dir" if bos else "model_dir")
    loaded = request.getfixturevalue("bos_loaded" if bos else "loaded")
    return AtomLM(loaded, batch_size=3), HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog."),
    ("The quick brown fox", " jumps"),
    ("Question: what is two plus two?\nAnswer:", " four"),
    ("Question: what is two plus two?\nAnswer:", " five"),
    ("Question: what is two plus two?\nAnswer:", " f"),
    ("trailing spaces move to the continuation  ", "x"),
    ("", "an empty context"),
    ("<s>begins with BOS", " already"),
    (LONG, " loses its beginning"),
    ("x", "y"),
]


def test_loglikelihood(pair: tuple[AtomLM, Any]) -> None:
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for lm in pair)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3, rel=1e-5)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]


def test_greedy_continuations_are_recognised(loaded: Loaded) -> None:
    context = loaded.tokenizer.encode("The quick brown fox")
    best = generate(loaded.model, [context], 4, is_finished=lambda _: False)[0]
    wrong = [*best[:3], best[3] ^ 1]
    requests = [(None, context, best), (None, context, wrong), (None, context, best[:1])]
    scores = AtomLM(loaded)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in scores] == [True, False, True]


def test_rolling(pair: tuple[AtomLM, Any]) -> None:
    texts = [(LONG,), ("short",), (LONG[:200],), ("",), (SENTENCES[1],)]
    ours, theirs = (
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True) for lm in pair
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert min(ours) < -100


def test_generate_until(pair: tuple[AtomLM, Any]) -> None:
    until = {"until": ["e", "\n"], "max_gen_toks": 12}
    prompts = [(sentence[:cut], until) for sentence in SENTENCES for cut in (9, 12, 30)]
    prompts += [(LONG, {"until": ["."], "max_gen_toks": 20}), (SENTENCES[0], {"until": [], "max_gen_toks": 5})]
    ours, theirs = (lm.generate_until(instances("generate_until", prompts), disable_tqdm=True) for lm in pair)
    assert ours == theirs
    assert all("e" not in text and "\n" not in text for text in ours[: len(SENTENCES) * 3])
    assert any(ours)


def test_the_engine_continues_as_the_model_does(loaded: Loaded, model_dir: Path) -> None:
    prompts = [(sentence[:cut], {"until": ["e"], "max_gen_toks": 12}) for sentence in SENTENCES for cut in (9, 12, 30)]
    alone = AtomLM(loaded).generate_until(instances("generate_until", prompts), disable_tqdm=True)
    with EngineGenerator(str(model_dir), device="cpu", kv_cache_bytes="1MiB") as engine:
        served = AtomLM(loaded, engine=engine).generate_until(instances("generate_until", prompts), disable_tqdm=True)
    assert served == alone and any(served)


@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
def test_batch_size_changes_nothing(loaded: Loaded, batch_size: int | str) -> None:
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    one, many = AtomLM(loaded, batch_size=2), AtomLM(loaded, batch_size=batch_size)
    expected = one.loglikelihood(instances("loglikelihood", shuffled), disable_tqdm=True)
    found = many.loglikelihood(instances("loglikelihood", shuffled), disable_tqdm=True)
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], rel=1e-5)
    prompts = [(sentence[: 8 + 3 * i], {"until": ["."], "max_gen_toks": 10}) for i, sentence in enumerate(SENTENCES)]
    requests = instances("generate_until", prompts)
    assert many.generate_until(requests, disable_tqdm=True) == one.generate_until(requests, disable_tqdm=True)


def test_requests_that_share_their_input_run_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sizes = AtomLM(loaded, batch_size=8), []
    score = lm._score
    monkeypatch.setattr(lm, "_score", lambda feeds, *rest: (sizes.append(len(feeds)), score(feeds, *rest))[1])
    answers = [("Question: two or four?\nAnswer:", letter) for letter in "abcd"]
    lm.loglikelihood(instances("loglikelihood", answers), disable_tqdm=True)
    assert sizes == [1]


def test_sampling_repeats_for_a_seed(loaded: Loaded) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    requests = instances("generate_until", [(sentence, options) for sentence in SENTENCES])
    runs = [AtomLM(loaded, seed=seed).generate_until(requests, disable_tqdm=True) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_temperature_without_sampling_is_greedy(loaded: Loaded) -> None:
    lm = AtomLM(loaded)

    def continued(**options: object) -> list[str]:
        requests = instances("generate_until", [("The quick", {"until": [], "max_gen_toks": 8, **options})])
        return lm.generate_until(requests, disable_tqdm=True)

    assert continued(do_sample=False, temperature=0.0) == continued(do_sample=False, temperature=0.7) == continued()


def test_chat_template(bos_model_dir: Path) -> None:
    lm = AtomLM(str(bos_model_dir), device="cpu")
    lm.tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    user = {"role": "user", "content": "hi"}
    assert lm.apply_chat_template([user]) == "<s>[user]hi[assistant]"
    assert lm.apply_chat_template([{"role": "system", "content": "be kind"}, user]) == "<s>[user]hi[assistant]"
    assert lm.tok_encode("<s>[user]hi").count(lm.tokenizer.bos_token_id) == 1
    assert lm.tokenizer_name.endswith(str(bos_model_dir).replace("/", "__"))


def test_refusals(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="batch_size is 'many'; it must be a positive number or 'auto'"):
        AtomLM(loaded, batch_size="many")
    lm = AtomLM(loaded)
    with pytest.raises(UnsupportedError, match="generation options num_beams are not supported; supported are until"):
        lm.generate_until(instances("generate_until", [("x", {"until": [], "num_beams": 4})]), disable_tqdm=True)
    with pytest.raises(ValueError, match=f"max_gen_toks={CONTEXT} leaves no room for a prompt"):
        lm.generate_until(instances("generate_until", [("x", {"max_gen_toks": CONTEXT})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="the continuation fits max_length=4"):
        AtomLM(loaded, max_length=4).loglikelihood(instances("loglikelihood", PAIRS[:1]), disable_tqdm=True)


def test_registered_under_its_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("atom") is AtomLM
