"""A tokenizer with the compiler of its guides, and what a guide allows."""

from typing import Any

import numpy as np

from atom.serving.guidance import GuideCompiler
from atom.serving.guide import Guide, mask_words

PADDING = 37  # tokens of the model that its tokenizer has not


class Tokens:
    """A tokenizer, its EOS, and the compiler of its guides."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.vocab_size = len(hf) + PADDING
        self.eos = (hf.eos_token_id,)
        self.compiler = GuideCompiler(hf, self.vocab_size, self.eos)


def allowed(guide: Guide, output: list[int]) -> set[int]:
    row = np.zeros(mask_words(guide.vocab_size), dtype=np.int32)
    guide.start(output).fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())
