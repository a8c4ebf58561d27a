"""Shared by all tests: tiny random models on disk with a byte tokenizer and a text to calibrate on.

Tests marked `gpu` skip, with the reason, where there is no fitting GPU.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from atom.calibration.config import CalibrationConfig
from atom.models.family import model_config
from atom.models.generate import scheme_cache
from atom.models.loader import load_model
from atom.models.model import build_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 192,  # more than the 128 outlier channels of w4a4, and no multiple of its groups
    "intermediate_size": 280,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-biased": {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "mistral": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
    "gemma3": {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
}


def save_tiny_model(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Seeded weights with a few loud channels, as real models have them."""
    folder.mkdir(parents=True)
    raw = MODELS[name]
    model = build_model(model_config(raw))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if key.endswith("norm.weight"):
            noise = noise * 0.1 + (0.0 if name == "gemma3" else 1.0)
            noise[::37] += 4.0
        else:
            noise *= 1.0 if "embed" in key else 0.06
        state[key] = noise.to(dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    make_tokenizer(adds_bos=name == "gemma3").save_pretrained(folder)
    return folder


def make_tokenizer(adds_bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small are done before a second thread wakes; on a shared machine waiting for it costs minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model by its name in MODELS, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else save_tiny_model(folder, name)

    return get


def words(lines: int, seed: int) -> str:
    """Lines of words from a small seeded vocabulary; `seed` draws the lines, the vocabulary is always the same."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(300)]
    draw = random.Random(seed)
    return "\n".join(" ".join(draw.choices(vocabulary, k=12)) for _ in range(lines))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(200, seed=1))
    return path


Logits = Callable[[Path], Tensor]


@pytest.fixture(scope="session")
def logits() -> Logits:
    """Logits [T, vocab] of the model in a directory on text like that of `text_file`, and not in it."""
    ids = make_tokenizer(adds_bos=False).encode(words(2, seed=2), add_special_tokens=False)[:100]

    def run(folder: Path) -> Tensor:
        model = load_model(folder)
        kv = scheme_cache(model, 1, len(ids))
        with torch.no_grad():
            return model.logits(model(torch.tensor(ids), kv.positions(len(ids)), kv))

    return run


@pytest.fixture(scope="session")
def logit_error(logits: Logits) -> Callable[[Path, Path], float]:
    """Relative error of a quantized model's logits against its source's."""

    def measure(found: Path, source: Path) -> float:
        exact = logits(source)
        return float((logits(found) - exact).norm() / exact.norm())

    return measure


@pytest.fixture
def quick(text_file: Path) -> CalibrationConfig:
    """Enough text that 192 channels have a Hessian of full rank."""
    return CalibrationConfig(
        calib=str(text_file), windows=10, window_length=48, batch_tokens=200, distill_tokens=200, device="cpu"
    )


@pytest.fixture
def tiny_run(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """What every accuracy script is asked in tests: a tiny model on few short windows, into a part."""
    return {
        "model": str(tiny("llama")),
        "name": "tiny",
        "output": tmp_path / "part.json",
        "calib": str(text_file),
        "text": (str(text_file),),
        "windows": 4,
        "window_length": 32,
        "eval_window": 32,
        "limit": 2,
        "device": "cpu",
        "scratch": tmp_path / "scratch",
    }


def missing_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU of compute capability 9.0, and there is none"
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"needs compute capability 9.0, this GPU has {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
