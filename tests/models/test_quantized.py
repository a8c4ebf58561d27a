"""A quantized model against the float model whose weights and linear inputs are rounded from outside.

The reference undoes every permutation: weights are put back into the source's order, and hooks round each linear's
input. What the quantized model folds into rows, gathers at run time and fuses into producers must come to the same.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atom.errors import CheckpointError, UnsupportedError
from atom.models.family import family_of
from atom.models.kv import DenseKV
from atom.models.layout import PERM, layer_prefix
from atom.models.loader import load_model
from atom.models.model import Model
from atom.models.quantized import Quantized, QuantizedLinear, quantize_layer_
from atom.quant.mixed import dequantize_weight, fake_quantize_activation
from atom.quant.permutation import invert
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.rotation import unrotate
from atom.quant.schemes import LinearScheme, OutlierSpec, Override, RotationSpec, Scheme, TensorSpec

from .random_models import CONFIGS, LLAMA, QWEN2, quantized_state, random_model, save_state

TOKENS = torch.randint(0, 61, (2 * 13,), generator=torch.Generator().manual_seed(5))


def small(scheme: Scheme) -> Scheme:
    """A preset with an outlier count that fits the tiny models."""
    return replace(scheme, outliers=replace(scheme.outliers, count=16)) if scheme.outliers.count else scheme


W4A4 = small(get_scheme("w4a4"))
SCHEMES = {name: small(scheme) for name, scheme in PRESETS.items()} | {
    "w4a4 without outliers": replace(W4A4, outliers=OutlierSpec()),
    "w4a4 with bf16 outliers": replace(W4A4, outliers=OutlierSpec(32, "bf16")),
    "w4a4 rotated": replace(W4A4, rotation=RotationSpec("block_hadamard", 16)),
    "w4a4 in order": replace(W4A4, reorder=False, outliers=OutlierSpec()),
    "w4a4 pre-rope": replace(W4A4, kv_pre_rope=True, kv_offset="mean", kv_rotation="none"),
    "w4a4, attention in full precision": replace(W4A4, overrides=(Override("*.self_attn.*", LinearScheme()),)),
    "w4a4, last layer in w8a8": replace(
        W4A4, overrides=(Override("model.layers.1.*", PRESETS["w8a8"].default_linear),)
    ),
}


def whole_zeros(kv: TensorSpec | None) -> TensorSpec | None:
    """Under whole zero points: those that keep the mean show every sum's last bit, and weights are what is tested."""
    return kv if kv is None else replace(kv, zero="whole")


def run(model: Model, scheme: Scheme, tokens: Tensor = TOKENS, batch: int = 2) -> Tensor:
    kv = DenseKV(model.config, batch, whole_zeros(scheme.kv), scheme.kv_pre_rope)
    with torch.inference_mode():
        return model.logits(model(tokens, kv.positions(len(tokens) // batch), kv))


def round_from_outside(model: Model, scheme: Scheme, quantized: dict[str, Any], orders: dict[str, Tensor]) -> None:
    """Give a float model the quantized model's weights and activations, all in the source's order."""
    for index in range(model.config.num_layers):
        prefix = layer_prefix(index)
        down = f"{prefix}.mlp.down_proj"
        for name in model.family.linears:
            full = f"{prefix}.{name}"
            if full not in quantized:
                continue
            linear, rounded = model.get_submodule(full), scheme.for_linear(full)
            weight = dequantize_weight(quantized[full], rounded)
            weight = unrotated(weight, rounded)[:, invert(orders[full])]
            if name in ("mlp.gate_proj", "mlp.up_proj") and down in orders:
                weight = weight[invert(orders[down])]
            linear.weight.data = weight
            linear.register_forward_pre_hook(input_rounder(rounded, orders[full]))


def unrotated(x: Tensor, linear: LinearScheme) -> Tensor:
    """Undo the rotation of normal columns: rounding done, the product is the same in either basis."""
    if linear.rotation is None:
        return x
    normal, _ = linear.split(x.shape[-1])
    return torch.cat((unrotate(x[..., :normal], linear.rotation), x[..., normal:]), -1)


def input_rounder(linear: LinearScheme, order: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rounded = unrotated(fake_quantize_activation(inputs[0][..., order], linear), linear)
        return (rounded[..., invert(order)],)

    return hook


# all schemes on the plain layer and on the one with four norms; the other families share the code of the first
CASES = [(name, family) for name in SCHEMES for family in ("llama", "gemma3")]
CASES += [(name, family) for name in ("w4a4", "nvfp4") for family in ("qwen2", "qwen3", "mistral")]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_quantized_model_equals_rounding_from_outside(name: str, family: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    reference = random_model(CONFIGS[family])
    state, weights, orders = quantized_state(reference, scheme)
    reference.scheme = scheme
    loaded = load_model(save_state(state, reference, tmp_path / "model", shards=2))
    round_from_outside(reference, scheme, weights, orders)

    got, expected = run(loaded, scheme), run(reference, scheme)
    # the same sums in another order; where that tips a rounding, one step of one value shows in the logits; a rotation
    # is one more sum
    close = torch.isclose(got, expected, atol=1e-3, rtol=1e-3).float().mean()
    assert close > (0.97 if scheme.rotation is None else 0.8), (
        f"{close:.3f} of the logits agree, largest difference {(got - expected).abs().max():.4f}"
    )


def test_decode_equals_prefill() -> None:
    """Rounding is per token, so it cannot matter when a token came."""
    for scheme in (W4A4, SCHEMES["w4a4 pre-rope"], SCHEMES["nvfp4"]):
        model = quantize_in_place(random_model(LLAMA), scheme)
        whole = run(model, scheme, TOKENS[:13], batch=1)
        kv = DenseKV(model.config, 1, whole_zeros(scheme.kv), scheme.kv_pre_rope, max_len=13)
        with torch.inference_mode():
            steps = [model.logits(model(token[None], kv.positions(1), kv))[0] for token in TOKENS[:13]]
        close = torch.isclose(torch.stack(steps), whole, atol=1e-3, rtol=1e-3).float().mean()
        assert close > 0.97


def quantize_in_place(model: Model, scheme: Scheme, drop: str = "", change: dict[str, Tensor] | None = None) -> Model:
    """Swap all layers from memory, as calibration does; `drop` removes a tensor, `change` replaces some."""
    state, _, _ = quantized_state(model, scheme)
    state.pop(drop, None)
    state.update(change or {})
    for index, layer in enumerate(model.model.decoder_layers()):
        quantize_layer_(layer, model.family, scheme, state, layer_prefix(index))
    return model


def test_swap_in_memory_equals_loading(tmp_path: Path) -> None:
    for raw in (QWEN2, {**LLAMA, "attention_bias": True, "mlp_bias": True}):  # biases of gate and up are rows too
        model = random_model(raw)
        state, _, _ = quantized_state(model, W4A4)
        model.scheme = W4A4
        loaded = load_model(save_state(state, model, tmp_path / raw["model_type"]))
        swapped = quantize_in_place(random_model(raw), W4A4)
        torch.testing.assert_close(run(loaded, W4A4), run(swapped, W4A4), atol=0, rtol=0)


def test_every_twin_says_what_runs() -> None:
    model = quantize_in_place(random_model(LLAMA), W4A4)
    twins = [module for module in model.modules() if isinstance(module, Quantized)]
    assert len(twins) == 2 * (7 + 4)
    assert {twin.implementation for twin in twins} == {"reference"}
    assert "64 -> 100, int4, group:128" in repr(model)


def test_missing_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale .* quantize again"):
        quantize_in_place(random_model(LLAMA), W4A4, drop="model.layers.1.mlp.up_proj.weight_scale")


def test_wrong_shape_is_named() -> None:
    name = "model.layers.0.self_attn.o_proj.weight_packed"
    with pytest.raises(
        CheckpointError, match=r"o_proj\.weight_packed has shape \[64, 23\], the config asks for \[64, 24\]"
    ):
        quantize_in_place(random_model(LLAMA), W4A4, change={name: torch.zeros(64, 23, dtype=torch.uint8)})


def test_permutation_must_be_one() -> None:
    name = f"model.layers.0.self_attn.q_proj.{PERM}"
    with pytest.raises(CheckpointError, match=r"no permutation of 0\.\.63"):
        quantize_in_place(random_model(LLAMA), W4A4, change={name: torch.zeros(64, dtype=torch.int32)})


def test_linears_that_share_an_input_share_its_order() -> None:
    name = f"model.layers.0.self_attn.v_proj.{PERM}"
    with pytest.raises(CheckpointError, match="share an input share its order"):
        quantize_in_place(random_model(LLAMA), W4A4, change={name: torch.arange(64, dtype=torch.int32)})


def test_overrides_must_agree_about_a_shared_input() -> None:
    scheme = replace(W4A4, overrides=(Override("*.v_proj", PRESETS["w8a8"].default_linear),))
    with pytest.raises(UnsupportedError, match="they take one input"):
        quantize_layer_(random_model(LLAMA).model.layers[0], family_of(LLAMA), scheme, {}, "model.layers.0")


def test_output_has_the_models_dtype() -> None:
    model = quantize_in_place(random_model(LLAMA).to(torch.bfloat16), W4A4)
    kv = DenseKV(model.config, 2, W4A4.kv, dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model(TOKENS, kv.positions(13), kv)
    assert hidden.dtype == torch.bfloat16
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QuantizedLinear)
