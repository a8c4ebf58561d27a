"""How a paged KV cache lies in memory: bytes, in every format, as the kernels read them.

One layer is uint8 [num_blocks, num_kv_heads, tile_bytes]. A *tile* holds the keys and values of one block and KV head:

    key words      block_size x 32 bits      scale (bfloat16, low half) and zero point (bfloat16, high half) of a token
    value words    block_size x 32 bits
    key codes      block_size x row_bytes    row by row, packed as atom/quant/packing.py packs: lowest bits first
    value codes    block_size x row_bytes
    filling        to a multiple of 128 bytes

so that one bulk copy brings all that a KV head of a block is, in whole cache lines. Integer codes are unsigned under a
zero point (a symmetric format's is constant; one that keeps the mean is stored less half the codes); FP8's zero point
is 0. Keys and values in full precision have no words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..quant.formats import get_format
from ..quant.granularity import Group
from ..quant.granularity import Tensor as PerTensor
from ..quant.mean_zero import half_codes
from ..quant.packing import pack, packed_columns, unpack_bits
from ..quant.rounding import choose_scale, encode
from ..quant.schemes import TensorSpec

FORMATS = ("int2", "int3", "int4", "int8", "fp8_e4m3")
LINE_BYTES = 128


@dataclass(frozen=True)
class KVLayout:
    """The layout of one layer's cache.

    spec   how keys and values are rounded; None: they are kept in `dtype`
    dtype  of the model, in which keys and values are handed in and read back
    Raises UnsupportedError for a format that has no layout.
    """

    spec: TensorSpec | None
    dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        spec = self.spec
        if spec is None:
            return
        if spec.format not in FORMATS or spec.outer is not None or spec.scale_format != "bf16":
            raise UnsupportedError(
                f"a paged KV cache in {spec} is not supported; it holds {', '.join(FORMATS)} under bf16 scales; "
                "choose one of +kv2, +kv3, +kv4, +kv8, +kvfp8, +kv16."
            )
        if isinstance(spec.granularity, Group | PerTensor):
            raise UnsupportedError(
                f"a paged KV cache with one scale per {spec.granularity} is not supported; it has one scale per token "
                "and head; use granularity head."
            )

    @property
    def kv(self) -> str:
        """The format of codes by name; bf16 where there are none."""
        return "bf16" if self.spec is None else self.spec.format

    @property
    def row_bytes(self) -> int:
        """Codes of one token and head, keys or values."""
        if self.spec is None:
            return self.head_dim * self.dtype.itemsize
        fmt = get_format(self.spec.format)
        return packed_columns(self.head_dim, fmt) * fmt.dtype.itemsize

    @property
    def word_bytes(self) -> int:
        """Scale and zero point of one token and head, keys or values."""
        return 0 if self.spec is None else 4

    @property
    def zero_bias(self) -> int:
        """What stored zero points are less of (atom/quant/mean_zero.py)."""
        return 0 if self.spec is None else zero_bias(self.spec)

    @property
    def tile_bytes(self) -> int:
        used = 2 * self.block_size * (self.word_bytes + self.row_bytes)
        return -(-used // LINE_BYTES) * LINE_BYTES

    @property
    def block_bytes(self) -> int:
        """One block of one layer."""
        return self.num_kv_heads * self.tile_bytes

    def shape(self, num_blocks: int) -> tuple[int, int, int]:
        """Of one layer's storage (uint8)."""
        return (num_blocks, self.num_kv_heads, self.tile_bytes)

    def words(self, tiles: Tensor, part: int) -> Tensor:
        """tiles [..., tile_bytes] -> bfloat16 [..., block_size, 2] of keys (part 0) or values (1); a view."""
        size = self.block_size * self.word_bytes
        words = tiles[..., part * size : (part + 1) * size].view(torch.bfloat16)
        split: Tensor = words.unflatten(-1, (self.block_size, 2))
        return split

    def codes(self, tiles: Tensor, part: int) -> Tensor:
        """tiles [..., tile_bytes] -> uint8 [..., block_size, row_bytes] of keys (part 0) or values (1); a view."""
        size = self.block_size * self.row_bytes
        start = 2 * self.block_size * self.word_bytes + part * size
        rows: Tensor = tiles[..., start : start + size].unflatten(-1, (self.block_size, self.row_bytes))
        return rows

    def write(self, layer: Tensor, slots: Tensor, part: int, x: Tensor) -> None:
        """Round x [T, num_kv_heads, head_dim] and store it: keys (part 0) or values (1) of the tokens at `slots` [T].

        slots  int64, block * block_size + place within the block, each at most once
        """
        blocks, places = slots // self.block_size, slots % self.block_size
        if self.spec is None:
            rows = x.to(self.dtype).contiguous().view(torch.uint8)
        else:
            rows, words = encode_rows(x, self.spec)
            self.words(layer, part)[blocks, :, places] = words
        self.codes(layer, part)[blocks, :, places] = rows

    def tile_rows(self, blocks: Tensor) -> Tensor:
        """Where the tiles of `blocks` [...] stand in a layer: int64 [num_kv_heads, ...], for `gather`."""
        heads = torch.arange(self.num_kv_heads, device=blocks.device)
        return blocks.long() * self.num_kv_heads + heads.view(-1, *(1,) * blocks.ndim)

    def gather(self, layer: Tensor, rows: Tensor) -> Tensor:
        """The tiles at `rows` [...] of a layer: uint8 [..., tile_bytes] in new memory."""
        tiles = layer.view(-1, self.tile_bytes).view(torch.int64).index_select(0, rows.flatten())
        found: Tensor = tiles.view(torch.uint8).unflatten(0, rows.shape)
        return found

    def read(self, tiles: Tensor, part: int) -> Tensor:
        """tiles [..., tile_bytes] -> keys (part 0) or values (1) [..., block_size, head_dim] in `dtype`."""
        rows = self.codes(tiles, part)
        if self.spec is None:
            return rows.view(self.dtype)
        words = self.words(tiles, part).float()
        values = code_floats(rows, self.spec, self.head_dim)
        if get_format(self.spec.format).is_integer:
            values.sub_(words[..., 1:] + self.zero_bias)
        return values.mul_(words[..., :1]).to(self.dtype)


def encode_rows(x: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Codes and words of x [..., head_dim]: uint8 [..., row_bytes] and bfloat16 [..., 2], as KVLayout stores them."""
    fmt = get_format(spec.format)
    scale = choose_scale(x, spec)
    codes = encode(x, scale, spec)
    zero = torch.zeros_like(scale.scale) if scale.zero_point is None else scale.zero_point + 0.0  # no minus zero
    if fmt.is_integer and spec.symmetric:
        half = 1 << (fmt.bits - 1)
        codes, zero = (codes.to(torch.int16) + half).to(torch.uint8), zero + half
    zero = zero - zero_bias(spec)
    codes = codes.view(torch.uint8)
    if fmt.bits < 8:
        codes = pack(codes, fmt)
    return codes, torch.cat((scale.scale, zero), -1).to(torch.bfloat16)


def zero_bias(spec: TensorSpec) -> int:
    """KVLayout.zero_bias."""
    return half_codes(get_format(spec.format).code_range(symmetric=False)[1]) if spec.zero == "mean" else 0


def code_floats(rows: Tensor, spec: TensorSpec, columns: int) -> Tensor:
    """Stored rows uint8 [..., row_bytes] -> the numbers of their codes, float32 [..., columns], in new memory."""
    fmt = get_format(spec.format)
    if fmt.bits == 8:
        return (rows if fmt.is_integer else rows.view(fmt.dtype)).float()
    if fmt.bits < 4:
        return unpack_bits(rows, fmt.bits, columns).float()
    values = torch.empty((*rows.shape, 2), dtype=torch.float32, device=rows.device)
    values[..., 0] = rows & 15
    values[..., 1] = rows >> 4
    return values.flatten(-2)[..., :columns]
