"""Small tokenizers of each kind that serving meets, made from nothing."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|tool|>")


def byte_level(sequence: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: all bytes, a few merges; `sequence`: its decoder is one of a chain."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "he"), ("l", "l"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ġ", "ðŁ")]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    rust = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if sequence else decoders.ByteLevel()
    return _fast(rust)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: "▁" for spaces, bytes for what the vocabulary lacks, no space at the start of a text."""
    chars = [chr(c) for c in range(33, 127)]
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *chars, "é", "▁h", "he", "▁he", "ll", "▁▁"]
    merges = [("▁", "h"), ("h", "e"), ("▁h", "e"), ("l", "l"), ("▁", "▁")]
    rust = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(rust)


def metaspace() -> PreTrainedTokenizerFast:
    """T5's kind: "▁" and no bytes."""
    tokens = ["<unk>", "▁", *(chr(c) for c in range(33, 127)), "é", "😀", "▁the", "▁a", "ing"]
    rust = Tokenizer(models.Unigram([(t, -1.0 * i) for i, t in enumerate(tokens)], unk_id=0))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    return _fast(rust)


def _fast(rust: Tokenizer) -> PreTrainedTokenizerFast:
    rust.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    rust.add_tokens([AddedToken("<think>", special=False), AddedToken("naïve", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token=None)


ALL = {
    "byte_level": byte_level,
    "byte_level_chain": lambda: byte_level(sequence=True),
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}
