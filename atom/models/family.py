"""Families: the declared tree of a decoder layer, and the table that finds it by architecture.

An `InputGroup` names linears that take the same input, what produces that input, and where the input's permutation
lives. Statistics, permutation, quantization and loading all read this declaration, so a new family is one file with
a `FAMILY` and one line in `_MODULES` for each architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import UnsupportedError
from .config import ModelConfig, architecture
from .layers import DecoderLayer

_MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
ARCHITECTURES = tuple(_MODULES)


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that share their input, and hence its permutation.

    linears         names within the layer, in the order in which they may be fused
    producer        the module within the layer whose output they take
    fold_into_rows  linears whose output rows carry this input's permutation; empty where it is a gather at run time
    """

    name: str
    linears: tuple[str, ...]
    producer: str
    fold_into_rows: tuple[str, ...] = ()

    @property
    def is_gathered(self) -> bool:
        """The input is permuted at run time, and its linears carry `input_perm` in a checkpoint."""
        return not self.fold_into_rows


@dataclass(frozen=True)
class Family:
    """What Atom knows of one kind of model.

    read_config  (config.json, generation_config.json) -> ModelConfig
    layer        (config, index) -> a decoder layer in full precision
    groups       every linear of the layer stands in exactly one
    """

    name: str
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]
    layer: Callable[[ModelConfig, int], DecoderLayer]
    groups: tuple[InputGroup, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a decoder layer, by their names within it."""
        return tuple(linear for group in self.groups for linear in group.linears)

    def group_of(self, linear: str) -> InputGroup:
        """The group in which `linear` (its name within the layer) stands; KeyError if in none."""
        for group in self.groups:
            if linear in group.linears:
                return group
        raise KeyError(linear)


def input_groups(mlp_norm: str = "post_attention_layernorm") -> tuple[InputGroup, ...]:
    """The tree of every dense family; they differ in the name of the norm before the MLP."""
    return (
        InputGroup("attention_input", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        InputGroup("o_input", ("self_attn.o_proj",), "self_attn.o_input"),
        InputGroup("mlp_input", ("mlp.gate_proj", "mlp.up_proj"), mlp_norm),
        InputGroup("down_input", ("mlp.down_proj",), "mlp.act", fold_into_rows=("mlp.gate_proj", "mlp.up_proj")),
    )


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of the parsed config.json `raw`; UnsupportedError lists the architectures that Atom runs."""
    name = architecture(raw)
    if name not in _MODULES:
        raise UnsupportedError(
            f"architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}; "
            "choose a model of one of these, or add a family file to atom/models."
        )
    family: Family = import_module(f".{_MODULES[name]}", __package__).FAMILY
    return family


def model_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """What the parsed config.json `raw` says of its model; `generation` (generation_config.json) may add EOS ids.

    Raises UnsupportedError for an architecture, activation or RoPE type that Atom does not run, and CheckpointError
    for a config without a field that every model has.
    """
    return family_of(raw).read_config(raw, generation or {})
