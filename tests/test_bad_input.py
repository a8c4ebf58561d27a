"""What a user reads who gave something wrong: one sentence with what came and what to do, never a traceback.

Every item here also has tests beside the code that finds it (a full disk: calibration/test_stream.py); these go
through the command, as a user does.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from atom.cli import main

Tiny = Callable[[str], Path]
SHARD = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def set_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def another_architecture(model: Path) -> None:
    set_config(model, architectures=["MambaForCausalLM"])


def another_tools(model: Path) -> None:
    set_config(model, quantization_config={"quant_method": "gptq", "bits": 4})


def newer_version(model: Path) -> None:
    set_config(model, quantization_config={"quant_method": "atom", "version": 7, "scheme": {}})


def unknown_format(model: Path) -> None:
    scheme = {"name": "mine", "weight": {"format": "int5", "granularity": "channel"}}
    set_config(model, quantization_config={"quant_method": "atom", "version": 1, "scheme": scheme})


def missing_shard(model: Path) -> None:
    names = dict.fromkeys(load_file(model / SHARD), "model-00001-of-00002.safetensors")
    (model / SHARD).rename(model / "model-00001-of-00002.safetensors")
    names[UP] = "model-00002-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncated_shard(model: Path) -> None:
    (model / SHARD).write_bytes((model / SHARD).read_bytes()[:-1000])


def wrong_shape(model: Path) -> None:
    state = load_file(model / SHARD)
    save_file({**state, UP: state[UP][:-1].clone()}, model / SHARD, {"format": "pt"})


def nan_weight(model: Path) -> None:
    state = load_file(model / SHARD)
    state[UP][3, 4] = float("nan")
    save_file(state, model / SHARD, {"format": "pt"})


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


MODELS: dict[Callable[[Path], None], str] = {
    another_architecture: "MambaForCausalLM is not supported; supported: LlamaForCausalLM",
    another_tools: "says quant_method 'gptq', needed is 'atom' or a full-precision model; start from the original",
    newer_version: "is an Atom checkpoint of version 7, this Atom reads versions 1 to 1; upgrade atom-serving",
    unknown_format: "unknown format 'int5'; use one of int2, int3, int4",
    missing_shard: "lacks 1 of 2 shards: model-00002-of-00002.safetensors; all that",
    truncated_shard: "the file is truncated; download it again",
    wrong_shape: f"{UP} has shape [279, 192], the config asks for [280, 192]",
    nan_weight: f"{UP} holds NaN or infinity; quantization needs finite weights",
    no_tokenizer: "has no tokenizer; one of tokenizer.json, tokenizer.model, vocab.json is needed; copy",
}


def quantize(capsys: pytest.CaptureFixture[str], model: Path, text: Path, out: Path, *more: str) -> tuple[int, str]:
    """Exit code and the last of what `atom quantize` wrote to stderr."""
    options = ["--calib", text, "--windows", 4, "--window-length", 48, "--device", "cpu", "-o", out, *more]
    code = main(["quantize", str(model), *map(str, options)])
    return code, capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("damage", MODELS, ids=lambda f: f.__name__)
def test_models(
    damage: Callable[[Path], None], tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    damage(model)
    code, message = quantize(capsys, model, text_file, tmp_path / "out")
    assert code == 1 and MODELS[damage] in message
    assert not (tmp_path / "out").exists()
    if damage is not nan_weight:  # the others are found before the weights are looked at
        assert main(["eval", str(model), "--ppl", str(text_file)]) == 1
        assert MODELS[damage] in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt does not exist; give the path"),
        ("empty.txt", b" \n", "empty.txt holds no text; give a file with running text"),
        ("short.txt", b"too short", "is too short: it has 9 tokens, one window needs 48"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 50, "is not UTF-8 (byte 0xe9 at 3); convert it"),
        ("text.pdf", b"%PDF", "unknown calibration data"),
    ],
)
def test_calibration_text(
    name: str, content: bytes | None, message: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, found = quantize(capsys, tiny("llama"), tmp_path / name, tmp_path / "out")
    assert code == 1 and message in found


def test_output_directory_that_holds_something(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = quantize(capsys, tiny("llama"), text_file, text_file.parent)
    assert code == 1 and "exists and is not empty; choose another --output" in message


def test_gguf_type_that_no_one_reads(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = b"token_embd.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 32, 32, 99, 0)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(4096))
    code, message = quantize(capsys, tmp_path / "model.gguf", text_file, tmp_path / "out")
    assert code == 1 and "tensor token_embd.weight has ggml type 99, which cannot be read; known types: F32" in message


def test_group_size_that_does_not_divide_is_padded(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize(capsys, tiny("llama"), text_file, out, "--group-size", "50")[0] == 0
    scales = load_file(out / "model-00002-of-00004.safetensors")["model.layers.0.mlp.down_proj.weight_scale"]
    assert scales.shape == (192, 4)  # 280 inputs less 128 outliers: three groups of 50 and one of 2
    assert main(["eval", str(out), "--ppl", str(text_file), "--limit", "1"]) == 0
