"""Prompts: exact counts, shared segments, the same in every run, and text that encodes to what was asked for."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atom.errors import UnsupportedError
from atom.serving.bench.prompts import Vocabulary
from atom.serving.bench.workload import Segment, WorkItem

REAL = os.environ.get("ATOM_TEST_MODELS")


def item(*segments: tuple[str, int]) -> WorkItem:
    return WorkItem(tuple(Segment(key, length) for key, length in segments), 1)


def word_tokenizer() -> Any:
    """A BPE-like tokenizer of whole words (" aa", " ab", ...) with a special and an added token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefgh"
    vocabulary = {f" {a}{b}": i for i, (a, b) in enumerate((a, b) for a in letters for b in letters)}
    vocabulary |= {"<unk>": 64, "<s>": 65}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.add_tokens(["<extra>"])
    return made


def test_ids_are_plain_and_as_many_as_asked_for() -> None:
    vocabulary = Vocabulary.of_tokenizer(word_tokenizer())
    assert vocabulary.ids.tolist() == list(range(64)), "no special, no added token"
    for count in (1, 7, 1000):
        ids = vocabulary.token_ids(item(("a", count)), seed=0)
        assert len(ids) == count and set(ids) <= set(range(64))
    assert len(set(vocabulary.token_ids(item(("a", 1000)), 0))) > 60, "all of the vocabulary"


def test_equal_keys_give_equal_tokens() -> None:
    vocabulary = Vocabulary.of_range(100, 5000)
    long = vocabulary.token_ids(item(("block 0", 512), ("block 1", 512)), seed=0)
    short = vocabulary.token_ids(item(("block 0", 512), ("block 1", 88)), seed=0)
    other = vocabulary.token_ids(item(("block 0", 512), ("block 2", 88)), seed=0)
    assert long[:600] == short and other[:512] == short[:512] and other[512:] != short[512:]
    assert vocabulary.token_ids(item(("block 0", 512)), seed=1) != long[:512]
    assert min(long) >= 100 and max(long) < 5000


def test_the_same_on_every_machine() -> None:
    """Draws are part of a benchmark's definition: these may not change between versions."""
    assert Vocabulary.of_range(0, 1000).token_ids(item(("request 0", 4)), seed=0) == FIRST


FIRST = [735, 553, 455, 773]


def test_text_encodes_to_the_count() -> None:
    tokenizer = word_tokenizer()
    vocabulary = Vocabulary.of_tokenizer(tokenizer)
    for count in (1, 2, 50):
        text = vocabulary.text(item(("a", count)), seed=0)
        assert len(tokenizer.encode(text, add_special_tokens=False)) == count
    shared = vocabulary.text(item(("a", 5), ("b", 3)), 0)
    assert shared.startswith(vocabulary.text(item(("a", 5)), 0))


def test_text_needs_a_tokenizer_with_words() -> None:
    with pytest.raises(UnsupportedError, match=r"found are 0, needed 32; name the model's tokenizer"):
        Vocabulary.of_range(0, 100).text(item(("a", 5)), 0)
    with pytest.raises(ValueError, match="are no range; write LOW:HIGH"):
        Vocabulary.of_range(5, 5)


def test_a_tokenizer_that_merges_is_refused() -> None:
    class Merging:
        """Pairs of equal tokens stand, pairs of different ones become one."""

        all_special_ids: tuple[int, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {chr(97 + i): i for i in range(26)} | {chr(65 + i): 26 + i for i in range(26)}

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def decode(self, token_ids: list[int]) -> str:
            return "".join(chr(97 + i) if i < 26 else chr(39 + i) for i in token_ids)

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            ids = [ord(c) - 97 if c >= "a" else ord(c) - 39 for c in text]
            return ids if len(set(ids)) == 1 else ids[:1]

    vocabulary = Vocabulary.of_tokenizer(Merging())  # type: ignore[arg-type]
    assert len(vocabulary.words) == 52
    with pytest.raises(UnsupportedError, match="encodes to 1 tokens"):
        vocabulary.text(item(("a", 9)), 0)


@pytest.mark.skipif(not REAL, reason="real tokenizers: set ATOM_TEST_MODELS to a folder of models")
@pytest.mark.parametrize("name", ["smollm2-fp16", "qwen-0.5b-fp16", "gemma-270m-fp16"])
def test_real_tokenizers(name: str) -> None:
    folder = Path(REAL or "") / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in ATOM_TEST_MODELS")
    from atom.models.loader import load_tokenizer

    tokenizer = load_tokenizer(folder)
    vocabulary = Vocabulary.of_tokenizer(tokenizer)
    assert len(vocabulary.words) > 3000
    rng = np.random.default_rng(0)
    for number in range(30):
        count = int(rng.integers(1, 700))
        text = vocabulary.text(item((f"r{number}", count)), seed=1)
        assert len(tokenizer.encode(text, add_special_tokens=False)) == count
