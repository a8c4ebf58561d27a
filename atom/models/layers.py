"""The parts of a decoder layer in full precision: norm, gated activation, MLP, and the layer itself.

Tensors are packed: [T, channels], all tokens of all sequences one after another; who belongs to whom is the
cache's business. Module names are those of Hugging Face checkpoints. Three modules produce what a linear takes
(the two norms before attention and MLP, `self_attn.o_input`, `mlp.act`); in a quantized model these and the
linears are replaced (atom/models/quantized.py) and every `forward` here stays as it is.
"""

from torch import Tensor, nn
from torch.nn import functional

from .attention import Attention
from .config import ModelConfig
from .kv import KV
from .norm import RMSNorm
from .rope import Rope, Rotation
from .together import run_together


class GatedActivation(nn.Module):
    """act(gate) * up: SwiGLU for "silu", GeGLU for "gelu_tanh" (arXiv:2002.05202)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [T, intermediate_size] -> the same."""
        return activate(self.kind, gate) * up

    def extra_repr(self) -> str:
        return self.kind


def activate(kind: str, gate: Tensor) -> Tensor:
    """The gate's activation by its name in ModelConfig."""
    if kind == "silu":
        return functional.silu(gate)
    assert kind == "gelu_tanh", kind
    return functional.gelu(gate, approximate="tanh")


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.act = GatedActivation(config.activation)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x, what the norm before produces for T tokens -> [T, hidden_size]."""
        y: Tensor = self.down_proj(self.act(*run_together((self.gate_proj, self.up_proj), x)))
        return y


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added back to it (Llama's order)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.rope = Rope(config.ropes[index], config.head_dim)
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = norm(config)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rotation: Rotation, kv: KV) -> Tensor:
        """hidden [T, hidden_size] -> the same; `rotation` is `self.rope(positions)`, shared by like layers."""
        hidden, update = self.step(hidden, None, rotation, kv)
        return hidden + update

    def step(self, hidden: Tensor, update: Tensor | None, rotation: Rotation, kv: KV) -> tuple[Tensor, Tensor]:
        """The layer with its adds put off: each norm adds what the half layer before it returned.

        hidden, update  the residual stream [T, hidden_size] is their sum; None before the first layer
        returns         the same of what the layer returns
        """
        hidden, x = self.input_layernorm.after(hidden, update)
        hidden, x = self.post_attention_layernorm.after(hidden, self.self_attn(x, rotation, kv))
        return hidden, self.mlp(x)


def norm(config: ModelConfig) -> RMSNorm:
    """An RMSNorm over the hidden size."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
