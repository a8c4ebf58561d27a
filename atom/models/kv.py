"""The KV cache as models see it: a protocol of one method, and the dense cache of calibration and tests.

A model hands over queries, keys and values *before* RoPE. The cache owns the rest: it rotates, rounds, stores, and
attends over what it has stored, so that batch structure, storage format and the place of RoPE stay out of the model.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels.dense_attention import AttentionSpec, attend_dense
from ..kernels.recent_attention import attend_recent
from ..quant.keys import prepare_keys, prepare_queries
from ..quant.rounding import fake_quantize
from ..quant.schemes import Scheme, TensorSpec
from .config import ModelConfig
from .rope import Rotation

SOFT_CAP = (
    "keys less their centre (kv_offset 'centre') do not fit attention with a soft cap, which would notice; "
    "quantize with --kv-offset mean --kv-rotation none."
)


def refuse_recent(config: ModelConfig, recent: int) -> None:
    """Raise UnsupportedError where a model's attention cannot read its `recent` newest tokens exactly."""
    if recent and config.attention_soft_cap is not None:
        raise UnsupportedError(
            f"a recent window (kv_recent {recent}) came for attention with a soft cap, whose parts cannot be merged; "
            "it needs plain softmax; quantize with --kv-recent 0."
        )
    narrow = [window for window in config.windows if window is not None and window <= recent]
    if recent and narrow:
        raise UnsupportedError(
            f"a recent window of {recent} tokens came for a sliding window of {min(narrow)}; it must be smaller than "
            "that; quantize with a smaller --kv-recent, or 0."
        )


class KV(Protocol):
    """What a model needs of a cache.

    takes_norms  query and key heads come before their norm, which stands in the spec
    """

    takes_norms: bool

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        """Store these tokens' keys and values, and attend causally over all tokens of each sequence.

        q         [T, num_heads, head_dim]      before RoPE
        k, v      [T, num_kv_heads, head_dim]   k before RoPE
        rotation  of these T tokens
        returns   [T, num_heads, head_dim]
        """
        ...


class DenseKV:
    """A cache for `batch` sequences of equal length, their tokens flattened row-major [batch * seq].

    Prefill and decode alike append to it: each call of a model adds its tokens to the end of every sequence. With
    `scheme_kv`, keys and values are rounded on the way in, one scale per token and head, and attention (of the same
    call too) reads the rounded ones; `pre_rope` rounds keys before RoPE and turns them when they are read;
    `offset_apart` rounds keys less their offset, which is added back (turned) when they are read; `centred` rounds
    turned keys less their centre, which is not; `rotates` multiplies their heads, and those of queries, by a Hadamard
    matrix; of the `recent` newest tokens, a query reads keys and values as they were before rounding. `overrides` are
    formats of single layers, where they differ. Storage grows as needed, or is allocated once with `max_len`. A layer
    that is never run takes no memory.
    """

    takes_norms = False

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        scheme_kv: TensorSpec | None = None,
        pre_rope: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_len: int | None = None,
        offset_apart: bool = False,
        centred: bool = False,
        rotates: bool = False,
        overrides: Mapping[int, TensorSpec] | None = None,
        recent: int = 0,
    ) -> None:
        refuse_recent(config, recent)
        if centred and config.attention_soft_cap is not None:
            raise UnsupportedError(SOFT_CAP)
        self.config = config
        self.batch = batch
        self.scheme_kv = scheme_kv
        self.pre_rope = pre_rope
        self.offset_apart = offset_apart
        self.centred = centred
        self.rotates = rotates
        self.recent = recent
        self.overrides = overrides or {}
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_len = max_len
        self._keys: dict[int, Tensor] = {}  # layer -> [batch, num_kv_heads, capacity, head_dim]
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}
        self._newest: dict[int, tuple[Tensor, Tensor]] = {}  # exact, like _keys and _values: recent - 1 at most

    @classmethod
    def for_scheme(
        cls,
        config: ModelConfig,
        scheme: Scheme | None,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_len: int | None = None,
    ) -> "DenseKV":
        """The cache that a scheme asks for; in full precision where there is none."""
        if scheme is None:
            return cls(config, batch, device=device, dtype=dtype, max_len=max_len)
        return cls(
            config,
            batch,
            scheme.kv,
            scheme.kv_pre_rope,
            device,
            dtype,
            max_len,
            offset_apart=scheme.kv_offset in ("bias", "mean"),
            centred=scheme.stores_key_centre,
            rotates=scheme.rotates_keys,
            overrides={override.layer: override.kv for override in scheme.kv_overrides},
            recent=scheme.kv_recent,
        )

    @property
    def length(self) -> int:
        """Tokens stored of each sequence."""
        return max(self._lengths.values(), default=0)

    def positions(self, seq: int) -> Tensor:
        """Positions [batch * seq] (int64) of the next `seq` tokens of every sequence, as a model takes them."""
        return torch.arange(self.length, self.length + seq, device=self.device).repeat(self.batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        """See KV.attend. Raises ValueError if the tokens do not split over the batch or exceed `max_len`."""
        if q.shape[0] % self.batch:
            raise ValueError(
                f"{q.shape[0]} tokens came for a dense cache of {self.batch} sequences; it takes as many of each; "
                f"pass a multiple of {self.batch} tokens, or make the cache with another batch."
            )
        q = rotation.apply(q)
        kv = self.overrides.get(layer, self.scheme_kv)
        offset = spec.key_offset if self.offset_apart and kv is not None else None
        centre = spec.key_centre if self.centred else None
        q = prepare_queries(q, centre, self.rotates)
        if centre is not None or self.rotates:
            exact = prepare_keys(rotation.apply(k), centre, self.rotates)
            k, exact = self._round(exact, kv).to(k.dtype), exact.to(k.dtype)
        else:
            exact = rotation.apply(k) if self.recent else k
            k = self._round_keys(k, kv, offset, rotation)
        keys, values = self._append(layer, self._by_sequence(k), self._by_sequence(self._round(v, kv)))
        if self.pre_rope:
            keys = self._rotate_stored(keys, rotation)
        own, keys, values = self._by_sequence(q), keys.to(q.dtype), values.to(q.dtype)
        if self.recent and kv is not None:
            newest = self._keep_newest(layer, self._by_sequence(exact), self._by_sequence(v))
            out = attend_recent(own, keys, values, *newest, spec, self.recent)
        else:
            out = attend_dense(own, keys, values, spec)
        return out.transpose(1, 2).flatten(0, 1)  # [T, num_heads, head_dim]

    def _keep_newest(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exact k, v [batch, num_kv_heads, seq, head_dim] behind those that are kept of the tokens before them."""
        kept = self._newest.get(layer)
        if kept is not None:
            k, v = torch.cat((kept[0], k), 2), torch.cat((kept[1], v), 2)
        first = max(0, k.shape[2] - self.recent + 1)
        self._newest[layer] = (k[:, :, first:].clone(), v[:, :, first:].clone())  # views would keep all of a prompt
        return k, v

    def _by_sequence(self, x: Tensor) -> Tensor:
        """[batch * seq, heads, head_dim] -> [batch, heads, seq, head_dim]."""
        split: Tensor = x.unflatten(0, (self.batch, x.shape[0] // self.batch))
        return split.transpose(1, 2)

    def _round(self, x: Tensor, kv: TensorSpec | None) -> Tensor:
        return x if kv is None else fake_quantize(x, kv).to(x.dtype)

    def _round_keys(self, k: Tensor, kv: TensorSpec | None, offset: Tensor | None, rotation: Rotation) -> Tensor:
        """Keys [T, num_kv_heads, head_dim] as they are read back, turned unless that is left to the reading."""
        if offset is None:
            return self._round(k if self.pre_rope else rotation.apply(k), kv)
        offset = offset.to(k.dtype).expand_as(k)
        if self.pre_rope:
            return self._round(k - offset, kv) + offset
        return self._round(rotation.apply(k - offset), kv) + rotation.apply(offset)

    def _rotate_stored(self, keys: Tensor, rotation: Rotation) -> Tensor:
        positions = torch.arange(keys.shape[2], device=keys.device)
        turned = rotation.rope(positions).apply(keys.transpose(1, 2))  # heads behind tokens, as apply takes them
        return turned.transpose(1, 2)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [batch, num_kv_heads, seq, head_dim]; all keys and values of the layer so far."""
        start = self._lengths.get(layer, 0)
        end = start + k.shape[2]
        self._lengths[layer] = end
        if self.max_len is None:
            if start:
                k, v = torch.cat((self._keys[layer], k), 2), torch.cat((self._values[layer], v), 2)
            self._keys[layer], self._values[layer] = k.to(self.dtype), v.to(self.dtype)
            return self._keys[layer], self._values[layer]
        if end > self.max_len:
            raise ValueError(
                f"the text reached {end} tokens, the cache holds max_len = {self.max_len}; "
                "give the cache a larger max_len or the model a shorter text."
            )
        if layer not in self._keys:
            shape = (self.batch, k.shape[1], self.max_len, k.shape[3])
            self._keys[layer] = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._values[layer] = torch.empty(shape, dtype=self.dtype, device=self.device)
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]
