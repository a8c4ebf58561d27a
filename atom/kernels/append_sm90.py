"""The sm_90a append kernel as an implementation of rope_append_kv: its config, and arguments as it reads them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quant.formats import get_format
from ..quant.rounding import largest_scale
from .attention_config import AppendConfig
from .attention_kernels import append_kernel
from .head_norm import HeadNorms
from .kv_layout import KVLayout

FEW_TOKENS = 2048  # up to which a warp of the append kernel takes one task: 7.5 us against 8.0 at 1024, on an H200
MANY_PARTS = 2  # tasks that it takes of more: 51.2 us against 52.0 at 8192


class OffsetWords:
    """Key offsets as the kernels read them, converted once: a model's parameters keep their place."""

    def __init__(self) -> None:
        self._words: dict[int, tuple[Tensor, Tensor]] = {}  # the offset itself is kept, so that nothing takes its place

    def get(self, offset: Tensor) -> Tensor:
        """[num_kv_heads, head_dim] -> bfloat16 pairs, uint32 [num_kv_heads, head_dim / 2]."""
        key = offset.data_ptr()
        if key not in self._words:
            self._words[key] = (offset, as_words(offset.bfloat16()))
        return self._words[key][1]


class RopeAppendSm90:
    """rope_append_kv on Hopper; called as rope_append_kv_reference's function is. Negative slots store nothing."""

    def __init__(self, layout: KVLayout, pre_rope: bool = False, rotates: bool = False) -> None:
        assert not pre_rope
        self.layout = layout
        self.rotates = rotates
        spec = layout.spec
        self.kv = layout.kv
        self.clip = 1.0 if spec is None else float(spec.clip)
        self.largest = 1.0 if spec is None else largest_scale(get_format(spec.format))
        self.kernels: dict[AppendConfig, Any] = {}
        self.offsets = OffsetWords()
        self.norms: dict[int, tuple[HeadNorms, Tensor]] = {}
        self.centres: dict[int, tuple[Tensor, Tensor]] = {}
        self.nothing: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, layer: Tensor,
        offset: Tensor | None = None, centre: Tensor | None = None, norms: HeadNorms | None = None,
        exact: Tensor | None = None, exact_slots: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not len(q):
            return out
        dim, parts = self.layout.head_dim, 1 if len(q) <= FEW_TOKENS else MANY_PARTS
        norm = "none" if norms is None else "shifted" if norms.offset else "plain"
        config = AppendConfig(
            self.kv, dim, self.layout.block_size, self.clip, offset is not None, parts, norm=norm,
            has_centre=centre is not None, rotates=self.rotates, has_mirror=centre is not None and centre.ndim == 3,
            zero_bias=self.layout.zero_bias, has_recent=exact is not None,
        )  # fmt: skip
        if config not in self.kernels:  # with its sibling, so that the first long prompt does not wait for a compiler
            for each in (replace(config, parts=1), replace(config, parts=MANY_PARTS)):
                self.kernels[each] = append_kernel(each)
        if self.nothing is None:  # where a kernel has no use for an argument
            self.nothing = (
                torch.zeros(1, dim, device=q.device),
                as_words(torch.zeros(1, dim, device=q.device).bfloat16()),
            )
        floats, words = self.nothing
        if centre is not None:
            floats = self._rows(centre)
        self.kernels[config](
            _heads(q), _heads(k), _heads(v), cos.contiguous(), sin.contiguous(), slots,
            words if offset is None else self.offsets.get(offset), floats,
            words if norms is None else self._norm_words(norms), layer, as_words(out),
            None if exact is None else as_words(exact), exact_slots, self.largest, 0.0 if norms is None else norms.eps,
        )  # fmt: skip
        return out

    def _rows(self, centre: Tensor) -> Tensor:
        """The rows of a layer's centre, mirrors behind it: float32 [heads or twice as many, head_dim]; made once."""
        key = centre.data_ptr()
        if key not in self.centres:
            self.centres[key] = (centre, centre.float().contiguous().view(-1, centre.shape[-1]))
        return self.centres[key][1]

    def _norm_words(self, norms: HeadNorms) -> Tensor:
        """The weights of both norms as the kernel reads them: uint32 [2, head_dim / 2]; made once for a layer."""
        key = norms.q.data_ptr()
        if key not in self.norms:
            self.norms[key] = (norms, as_words(torch.stack((norms.q, norms.k)).bfloat16()))
        return self.norms[key][1]


def _heads(x: Tensor) -> Tensor:
    """bfloat16 [T, heads, head_dim] as uint32 pairs, where it lies if the heads of a token lie side by side."""
    side_by_side = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) % 8 == 0
    return x.view(torch.int32).view(torch.uint32) if side_by_side else as_words(x)


def as_words(x: Tensor) -> Tensor:
    """bfloat16 [..., n] as uint32 [..., n / 2]."""
    return x.contiguous().view(torch.int32).view(torch.uint32)
