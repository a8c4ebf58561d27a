"""Self-attention of one layer: projections, the optional norm of heads, and the call into the cache.

The module knows neither batch nor past. It hands queries, keys and values, all before RoPE, to the cache it is
given (atom/models/kv.py), which may norm heads too, and projects what comes back.
"""

from dataclasses import replace

from torch import Tensor, nn

from ..kernels.dense_attention import AttentionSpec
from ..kernels.head_norm import HeadNorms
from .config import ModelConfig
from .kv import KV
from .norm import HeadNorm
from .rope import Rotation
from .together import run_together


class Attention(nn.Module):
    """Grouped-query attention of layer `index`."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.rules = AttentionSpec(config.attention_scale, config.windows[index], config.attention_soft_cap)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps, config.norm_offset)
            self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps, config.norm_offset)
        self.key_offset: Tensor | None = None  # [num_kv_heads, head_dim], from a checkpoint that stores it
        self.key_centre: Tensor | None = None  # float32, likewise
        self.o_input: nn.Module = nn.Identity()
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)

    def forward(self, x: Tensor, rotation: Rotation, kv: KV) -> Tensor:
        """x, what the norm before produces for T tokens -> [T, hidden_size]."""
        projected = run_together((self.q_proj, self.k_proj, self.v_proj), x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # [T, num_heads or num_kv_heads, head_dim]
        spec = self._spec()
        if kv.takes_norms:
            spec = replace(spec, norms=self._norms())
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        out = kv.attend(self.index, q, k, v, rotation, spec)
        y: Tensor = self.o_proj(self.o_input(out.flatten(1)))
        return y

    def _norms(self) -> HeadNorms | None:
        if not isinstance(self.q_norm, HeadNorm) or not isinstance(self.k_norm, HeadNorm):
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.offset)

    def _spec(self) -> AttentionSpec:
        """The rules, with what keys have in common: as stored, else the bias of k where nothing stands behind it."""
        if self.key_centre is not None:
            return replace(self.rules, key_centre=self.key_centre)
        if self.key_offset is not None:
            return replace(self.rules, key_offset=self.key_offset)
        bias = self.k_proj.bias
        if bias is None or not isinstance(self.k_norm, nn.Identity):
            return self.rules
        return replace(self.rules, key_offset=bias.view(-1, self.head_dim))
