"""A tiny random Llama on disk with a real byte-level tokenizer, and the same model in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from atom.eval.load import Loaded, load

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Atom rounds weights and activations to four bits, and keeps the largest channels in eight.",
    "Perplexity is the exponential of the mean negative log likelihood of a text.",
    "Question: what is two plus two?\nAnswer: four.",
]
CONTEXT = 64


def make_tokenizer(adds_bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, adds_bos: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(adds_bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.4,  # sharp enough that tokens differ in likelihood
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), adds_bos=False)


@pytest.fixture(scope="session")
def bos_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny-bos"), adds_bos=True)


@pytest.fixture(scope="session")
def loaded(model_dir: Path) -> Loaded:
    return load(str(model_dir), device="cpu")


@pytest.fixture(scope="session")
def bos_loaded(bos_model_dir: Path) -> Loaded:
    return load(str(bos_model_dir), device="cpu")


@pytest.fixture(scope="session")
def hf_model(model_dir: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(SENTENCES * 12) + "\n", encoding="utf-8")
    return path
