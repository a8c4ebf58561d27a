"""Loading: every way of storing a model gives the same logits, and what is wrong with a checkpoint is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atom.errors import CheckpointError
from atom.models.generate import generate
from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_tokenizer
from atom.models.model import Model
from atom.quant.presets import get_scheme

from .random_models import CONFIGS, LLAMA, quantized_state, random_model, save_model, save_state

TOKENS = torch.arange(11)


def logits(model: Model) -> Tensor:
    kv = DenseKV(model.config, dtype=model.dtype)
    with torch.inference_mode():
        return model.logits(model(TOKENS, kv.positions(len(TOKENS)), kv))


def edit(path: Path, change: Any, file: str = "model.safetensors") -> None:
    """Rewrite one shard after `change(tensors)`."""
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file, {"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_loads_as_it_was_saved(family: str, shards: int, tmp_path: Path) -> None:
    model = random_model(CONFIGS[family])
    loaded = load_model(save_model(model, tmp_path / "model", shards))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_dtype_is_the_callers(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA).half(), tmp_path / "model")
    assert load_model(path).dtype == torch.float32
    loaded = load_model(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize("is_sharded", [False, True])
def test_bin_files(is_sharded: bool, tmp_path: Path) -> None:
    model = random_model(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    state = dict(model.state_dict())
    if is_sharded:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


class Payload:
    """Pickles as a call: what a weights-only reader must never make."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not be printed",))


def test_code_in_a_bin_file_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"model.norm.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read safely: .* convert the model to safetensors"):
        load_model(tmp_path)
    assert "must not be printed" not in capfd.readouterr().out


def test_a_bin_file_of_more_than_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"step": 3, "model": {}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than named tensors"):
        load_model(tmp_path)


def test_missing_bin_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model-1.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: pytorch_model-2\.bin; .* download the missing"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map; it must say which shard holds what"),
        ({"weight_map": {"a": "../pytorch_model-1.bin"}}, "names shards outside its directory"),
        ({"weight_map": {"b": "pytorch_model-1.bin"}}, r"promises tensors that their shards do not hold: b \("),
    ],
)
def test_bin_index_is_checked(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    edit(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of 21 tensors: model\.layers\.1\.mlp\.up_proj\.weight; a whole"
    ):
        load_model(path)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    edit(path, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"has 1 tensors that LlamaForCausalLM does not: model\.layers\.2\.mlp"):
        load_model(path)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    edit_config(path, intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight has shape \[100, 64\], the config asks for \[96, 64\]"
    ):
        load_model(path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is int32, needed is a floating type"):
        load_model(path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model", shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors .* truncated"):
        load_model(path)


def test_tensors_that_no_model_needs(tmp_path: Path) -> None:
    """RoPE tables of old Llama checkpoints; a head beside tied embeddings."""
    model = random_model({**LLAMA, "tie_word_embeddings": True})
    path = save_model(model, tmp_path / "model")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "lm_head.weight": torch.zeros(61, 64)}
    edit(path, lambda tensors: tensors.update(table))
    assert torch.equal(logits(load_model(path)), logits(model))


def atom_checkpoint(path: Path) -> Path:
    model = random_model(LLAMA)
    scheme = get_scheme("nvint4")
    state, _, _ = quantized_state(model, scheme)
    model.scheme = scheme
    return save_state(state, model, path)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = atom_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config={**config, "version": 99})
    with pytest.raises(CheckpointError, match=r"version 99, this Atom reads .*; upgrade"):
        load_model(path)


def test_a_model_quantized_by_others_is_refused(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    edit_config(path, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"says quant_method 'awq'.* start from the original checkpoint"):
        load_model(path)


def test_a_scheme_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = atom_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    config["scheme"]["weight"]["scale_format"] = "bf16"
    config["scheme"]["weight"]["outer"] = None
    edit_config(path, quantization_config=config)
    with pytest.raises(CheckpointError, match=r"tensors that LlamaForCausalLM does not: .*weight_tensor_scale"):
        load_model(path)


def test_a_scale_of_another_dtype_is_refused(tmp_path: Path) -> None:
    path = atom_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    edit(path, lambda tensors: tensors.update({name: tensors[name].float()}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_scale is float32, needed is float8_e4m3fn"):
        load_model(path)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_tokenizer_is_what_auto_tokenizer_makes_of_its_files(tiny: Callable[[str], Path], family: str) -> None:
    from transformers import AutoTokenizer

    folder = tiny(family)
    found, wanted = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(wanted) and found.added_tokens_decoder == wanted.added_tokens_decoder
    assert found.encode("a tie, \u00e9") == wanted.encode("a tie, \u00e9")
    assert found.special_tokens_map == wanted.special_tokens_map and found.chat_template == wanted.chat_template


def test_missing_tokenizer(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer; one of tokenizer\.json.* copy the tokenizer files"):
        load_tokenizer(path)
    (path / "some.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no tokenizer; .* or pass .*some\.gguf itself"):
        load_tokenizer(path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    path = save_model(random_model(LLAMA), tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(path)


def test_generation() -> None:
    """Greedy tokens are the argmax of a full forward at every step; EOS ends the text and is not yielded."""
    model = random_model(LLAMA)
    prompt = [1, 5, 9]
    new = list(generate(model, prompt, 12, eos=()))
    assert len(new) == 12
    kv = DenseKV(model.config)
    text = torch.tensor(prompt + new)
    with torch.inference_mode():
        best = model.logits(model(text, kv.positions(len(text)), kv)).argmax(-1)
    assert best[len(prompt) - 1 : -1].tolist() == new
    assert list(generate(model, prompt, 12, eos={new[4]})) == new[: new.index(new[4])]
    drawn = [list(generate(model, prompt, 12, eos=(), temperature=1.5, seed=seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generation_refuses() -> None:
    model = random_model(LLAMA)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        next(generate(model, [], 3))
    with pytest.raises(ValueError, match="3 tokens of prompt and 62 new ones make 65; the model has 64"):
        next(generate(model, [1, 2, 3], 62))
    with pytest.raises(ValueError, match="temperature must be 0 or more"):
        next(generate(model, [1], 3, temperature=-1.0))
