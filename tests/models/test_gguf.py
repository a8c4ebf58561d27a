"""GGUF files: a tiny one written here, converted and run; and files that cannot be read."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from atom.errors import CheckpointError, UnsupportedError
from atom.models.gguf import convert, file_sha256, read_header
from atom.models.gguf_reader import one_reading
from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_tokenizer
from atom.models.model import Model
from atom.models.source import open_source

from .random_models import LLAMA, QWEN2, random_model

gguf = pytest.importorskip("gguf")

TOKENS = [chr(code) for code in range(33, 92)] + ["AC", "AB"]  # a byte-level BPE of 59 characters and two merges
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, *inner = stem.split(".")
        return f"blk.{index}.{NAMES['.'.join(inner)]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them for Llama: RoPE's pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    model: Model, path: Path, architecture: str, q8: tuple[str, ...] = (), adds_bos: bool | None = None
) -> Path:
    """Write a model with llama.cpp's own library; tensors whose name ends as in `q8` become Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["A B", "A C"])  # transformers 5.17 takes a list of one for its element
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if q8 and name.endswith(q8):
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half_model(raw: dict[str, Any]) -> Model:
    """A float32 model whose weights are fp16 values, so that conversion loses nothing."""
    return random_model(raw).half().float()


def logits(model: Model) -> torch.Tensor:
    kv = DenseKV(model.config)
    tokens = torch.arange(9)
    with torch.inference_mode():
        return model.logits(model(tokens, kv.positions(9), kv))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("architecture", "raw"), [("llama", LLAMA), ("qwen2", QWEN2)])
def test_a_gguf_file_runs(architecture: str, raw: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    model = half_model(raw)
    path = write_gguf(model, tmp_path / "tiny.gguf", architecture)
    torch.testing.assert_close(logits(load_model(path)), logits(model), atol=1e-5, rtol=1e-5)
    assert load_tokenizer(path).encode("CABD", add_special_tokens=False) == [34, 60, 35]
    source = open_source(path)
    assert source.provenance == {
        "source": "tiny.gguf",
        "kind": "gguf",
        "source_sha256": file_sha256(path),
        "source_types": {"F32": len(model.state_dict())},
    }
    assert {source.dtype(name) for name in source.names()} == {torch.float16}
    assert "quantization_config" not in source.config
    assert [entry.name for entry in (cache / "gguf").iterdir()] == [source.path.name]  # nothing partial is left


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    model = half_model(LLAMA)
    path = write_gguf(model, tmp_path / "tiny.gguf", "llama", q8=("o_proj.weight", "up_proj.weight"))
    assert read_header(path).types == {"F32": len(model.state_dict()) - 4, "Q8_0": 4}
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "up_proj.weight")):
            packed = gguf.quants.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            values = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
            assert not torch.equal(values, parameter)
            parameter.data = values.half().float()
    converted = load_model(convert(path, tmp_path / "cache"))
    torch.testing.assert_close(logits(converted), logits(model), atol=1e-5, rtol=1e-5)


def test_a_conversion_parses_the_file_once(tmp_path: Path) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama", q8=("up_proj.weight",))
    plain = gguf.GGUFReader
    expected = plain(path)
    with one_reading():
        found = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is found
    assert gguf.GGUFReader is plain
    assert list(found.fields) == list(expected.fields)
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        np.testing.assert_array_equal(a.data, b.data)


def test_a_tokenizer_that_was_misread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram([("A", -1.0), ("B", -2.0)], 0))
    misread = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: misread)
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    with pytest.raises(UnsupportedError, match=r"misreads the tokenizer of .*tiny\.gguf.*install transformers 5\.23"):
        convert(path, tmp_path / "cache")
    assert not any((tmp_path / "cache" / "gguf").iterdir())


def test_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    first = convert(path, tmp_path / "cache")
    monkeypatch.setattr("atom.models.gguf._write", lambda *_: pytest.fail("converted again"))
    assert convert(path, tmp_path / "cache") == first
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(path.read_bytes())
    assert convert(copy, tmp_path / "cache") == first  # by content, not by name


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")

    def fail(_: Path, header: object, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr("atom.models.gguf._write", fail)
    with pytest.raises(
        CheckpointError, match=r"could not be converted into .*: disk full; .* set ATOM_CACHE to another"
    ):
        convert(path, tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_not_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(CheckpointError, match=r"begins with b'PK.*; a GGUF file begins with b'GGUF'"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes, too few"):
        open_source(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    """Cut in the metadata, in the table of tensors, and in the weights."""
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"download (it|the file) again"):
        read_header(path)


def test_an_old_version(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(UnsupportedError, match="is GGUF version 1; versions 2 and 3 can be read"):
        read_header(path)


def table(kind: int) -> bytes:
    """A file of one tensor of 32 values in ggml type `kind`, without its data."""
    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 32, kind, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry


def test_a_type_that_no_one_knows(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(table(255) + bytes(64))
    message = r"tensor blk\.0\.attn_q\.weight has ggml type 255, which cannot be read; known types: F32, F16"
    with pytest.raises(UnsupportedError, match=message):
        read_header(path)


def test_a_type_that_transformers_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("Dequantization for Q1_0 is not supported")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UnsupportedError, match=r"cannot read .*Q1_0 is not supported\); .* use another quantization"):
        convert(path, tmp_path / "cache")


def test_an_architecture_that_atom_does_not_run(tmp_path: Path) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(UnsupportedError, match=r"[Bb]loom"):
        convert(path, tmp_path / "cache")
    assert not any((tmp_path / "cache").rglob("config.json"))


def test_provenance_is_kept_beside_the_weights(tmp_path: Path) -> None:
    path = write_gguf(half_model(LLAMA), tmp_path / "tiny.gguf", "llama")
    kept = json.loads((convert(path, tmp_path / "cache") / "atom_source.json").read_text())
    assert kept["source"] == "tiny.gguf"
    assert kept["source_sha256"] == file_sha256(path)


@pytest.mark.parametrize("adds_bos", [None, False, True])
def test_texts_begin_with_bos_where_the_file_says_so(adds_bos: bool | None, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(half_model(QWEN2), tmp_path / "tiny.gguf", "qwen2", adds_bos=adds_bos)
    assert read_header(path).adds_bos is adds_bos
    ids = load_tokenizer(path).encode("A")
    assert (len(ids) == 2 and ids[0] == 1) if adds_bos else len(ids) == 1
