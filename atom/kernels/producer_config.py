"""Which producer kernel a scheme's activation runs with: pure arithmetic, no GPU, no cutlass."""

from dataclasses import dataclass, replace
from functools import partial
from math import frexp
from typing import Literal

import torch

from ..quant.formats import get_format
from ..quant.rounding import largest_scale
from ..quant.scales import LARGEST_DYNAMIC
from ..quant.schemes import LinearScheme

CHUNK = 8  # columns that a thread reads, rounds and writes together
UNIT_CHUNKS = 16  # chunks of the 128 columns to which normal columns in bytes are filled up
SHARED_BYTES = 220 * 1024  # of an SM, for rows
FEW_TOKENS = 64  # up to so many, a launch is laid out for latency, beyond for bandwidth


@dataclass(frozen=True)
class ProducerConfig:
    """Compile-time choices of one producer kernel.

    source         "norm" (RMSNorm), "add_norm" (of x + residual, which is written too), "silu" or "gelu_tanh"
                   (act(gate) x up), "plain"
    rounding       "group": codes in bytes, a scale per 128 columns; "token": codes in bytes, one per row; "factor":
                   code x factor of its 32, 64 or 128 columns in bytes, one scale per row; "small": code x scale as
                   bfloat16, a scale per 16 or 32 columns; "none": bfloat16
    format         of the codes: int3, int4, int8, e2m1 or fp8_e4m3; bf16 without rounding
    ratio          scale = largest magnitude x ratio
    scale_format   how a scale is stored: fp32, bf16, uint4 or e4m3 (under a float32 per token) or e8m0
    largest_scale  where scales saturate, so that codes x scale stay finite
    permuted       whether columns are gathered by a permutation
    rotation       columns of a block of the Hadamard rotation, or 0
    columns        of a row, which lies in memory filled up to whole chunks (filled_rows.py)
    outliers       INT8 columns at the end of a row, under one scale of their own
    strided        whether rows of the inputs lie further apart than they are long (halves of a fused GEMM's output)
    dtype          of the input: bfloat16, float16 or float32
    threads        of a CTA
    chunks         slots (see `place`) of one thread
    parts          CTAs of a token
    ctas_per_sm    so many stay on an SM and take one token after another; 0: one token, as many CTAs as it takes
    stages         rows of a CTA that stays, in shared memory: one is rounded while the others are on their way
    """

    source: str
    rounding: Literal["group", "token", "factor", "small", "none"]
    format: str
    ratio: float
    scale_format: str
    largest_scale: float
    group_size: int
    permuted: bool
    rotation: int
    columns: int
    outliers: int
    strided: bool
    dtype: str
    threads: int = 0
    chunks: int = 0
    parts: int = 1
    ctas_per_sm: int = 0
    stages: int = 2

    @property
    def code_range(self) -> tuple[int, int]:
        return get_format(self.format).code_range(True)

    @property
    def writes_bf16(self) -> bool:
        return self.rounding in ("small", "none")

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def is_norm(self) -> bool:
        return self.source in ("norm", "add_norm")

    @property
    def is_gated(self) -> bool:
        return self.source in ("silu", "gelu_tanh")

    @property
    def is_exact(self) -> bool:
        """Whether codes are atom/quant's bit for bit: no sum or exponential before them leaves a last bit open."""
        return self.source == "plain" and not self.rotation

    @property
    def turns_all(self) -> bool:
        """Whether the rotation turns every column."""
        return self.rotation > 0 and self.rotated == self.slots * CHUNK

    @property
    def lacks_factor(self) -> bool:
        """Whether values lack a factor until they are rounded: the norm's, the rotation's where it is one for all."""
        return self.is_norm or self.turns_all

    @property
    def reads_two(self) -> bool:
        return self.source not in ("norm", "plain")

    @property
    def needs_row_max(self) -> bool:
        """Whether a scale covers the whole row."""
        return self.rounding in ("token", "factor") or (self.rounding == "small" and self.scale_format == "e4m3")

    @property
    def clustered(self) -> bool:
        """Whether the CTAs of a token tell each other what they found in their parts of it."""
        return self.parts > 1 and (self.needs_row_max or (self.is_norm and not self.permuted))

    @property
    def reaches_below(self) -> bool:
        """Whether a value under its scale may lie below the smallest code: not where the clip is mild and codes few."""
        reach = (1 + 2**-8) / self.ratio  # a bfloat16 scale may be rounded down
        return not (self.rounding == "group" and self.format != "int8" and reach < 0.5 - self.code_range[0])

    @property
    def stays_in_range(self) -> bool:
        """Whether no value under its scale lies beyond the codes, so that none need be clamped."""
        return self.rounding == "token" and self.scale_format == "fp32" and self.code_range[1] + 0.4 > 1 / self.ratio

    @property
    def run(self) -> int:
        """Neighbouring slots of one thread: all it has where it gathers or turns them and they share a scale, else one.

        Only of CTAs that stay: columns and gains of runs are loaded badly, which must be worth it.
        """
        if self.ctas_per_sm == 0 or self.writes_bf16:
            return 1
        groups = self.rounding != "token"
        gathers = self.permuted and not self.rotation and self.chunks in (2, 4, 8)
        turns = not self.permuted and self.turns_all and self.rotation in (32, 64) and self.chunks == 4 and groups
        return self.chunks if (gathers or turns) and not (groups and self.chunks > self.group_chunks) else 1

    @property
    def turns_runs(self) -> bool:
        """Whether a thread turns the 32 columns of a run by itself."""
        return self.run > 1 and not self.permuted

    @property
    def reorders(self) -> bool:
        """Whether a thread gathers a chunk's columns in an order of its own (gather_order.py)."""
        return self.permuted and self.ctas_per_sm > 0 and not self.rotation and not self.writes_bf16

    @property
    def outer_ratio(self) -> float:
        """The outer scale is the largest inner scale times this."""
        return 1.0 / LARGEST_DYNAMIC[self.scale_format]

    @property
    def exponents(self) -> tuple[int, int]:
        """(the exponent of the format's largest value, the largest exponent of a scale), for e8m0."""
        return frexp(get_format(self.format).max)[1] - 1, frexp(self.largest_scale)[1] - 1

    # Slots: the chunks of the output in order, one after another: normal columns, zeros that fill up the last 128,
    # outliers, zeros that fill up their last 64. Lanes of a warp hold neighbouring slots, or runs of such, and
    # what shares a scale lies within a warp.

    @property
    def group_chunks(self) -> int:
        """Chunks under one scale or factor, where there are groups."""
        return self.group_size // CHUNK

    @property
    def row_chunks(self) -> int:
        """Chunks of a row as it is read."""
        return -(-self.columns // CHUNK)

    @property
    def normal_chunks(self) -> int:
        return -(-(self.columns - self.outliers) // CHUNK)

    @property
    def units(self) -> int:
        """Of 128 normal columns."""
        return -(-self.normal_chunks // UNIT_CHUNKS)

    @property
    def filled_chunks(self) -> int:
        """Normal chunks and the zeros that fill up their last unit."""
        return self.normal_chunks if self.writes_bf16 else self.units * UNIT_CHUNKS

    @property
    def outlier_slot(self) -> int:
        """Slot of the first outlier: more than 128 of them take a warp of their own."""
        step = 32 if self.outliers > 128 else UNIT_CHUNKS
        return -(-self.filled_chunks // step) * step if self.outliers else self.filled_chunks

    @property
    def rotated(self) -> int:
        """Columns that the rotation turns: whole blocks of normal ones."""
        return (self.columns - self.outliers) // self.rotation * self.rotation if self.rotation else 0

    @property
    def slots(self) -> int:
        return self.outlier_slot + -(-self.outliers // 64) * 8

    @property
    def width(self) -> int:
        """Columns of a row as it is written."""
        return (self.slots - self.outlier_slot + self.filled_chunks) * CHUNK

    def slot_columns(self) -> list[int]:
        """The column (behind the permutation) that each place of the slots holds, `columns` where it holds none."""
        found = [self.columns] * (self.slots * CHUNK)
        normal = self.columns - self.outliers
        found[:normal] = range(normal)
        start = self.outlier_slot * CHUNK
        found[start : start + self.outliers] = range(normal, self.columns)
        return found


def producer_config(
    source: str, linear: LinearScheme, dtype: torch.dtype, K: int, permuted: bool, strided: bool, tokens: int
) -> ProducerConfig:
    """The kernel of an activation of so many tokens; `linear` is one that refusals_sm90.py lets pass."""
    spec = linear.activation
    make = partial(
        ProducerConfig,
        source=source,
        permuted=permuted,
        rotation=0 if linear.rotation is None else linear.rotation.block,
        columns=K,
        outliers=linear.outliers.count,
        strided=strided,
        dtype=str(dtype).removeprefix("torch."),
    )
    if spec is None:
        config = make(rounding="none", format="bf16", ratio=1.0, scale_format="fp32", largest_scale=1.0, group_size=0)
        return with_layout(config, tokens)
    fmt = get_format(spec.format)
    levels = (2**fmt.bits - 1) / 2 if spec.scale_rule == "range" else fmt.max
    assert spec.clip != "mse"
    size = spec.group_size or 0
    config = make(
        rounding="token"
        if not size
        else "factor"
        if spec.scale_format == "uint4"
        else "group"
        if size == 128
        else "small",
        format=spec.format,
        ratio=float(spec.clip) if spec.scale_format == "e8m0" else float(spec.clip) / levels,
        scale_format=spec.scale_format,
        largest_scale=largest_scale(fmt),
        group_size=size,
    )
    return with_layout(config, tokens)


def with_layout(config: ProducerConfig, tokens: int) -> ProducerConfig:
    """The config with threads, chunks and parts for so many tokens; docs/kernels/producers.md has the measurements."""
    few = tokens <= FEW_TOKENS
    needs_row = config.is_norm or config.needs_row_max
    if not (needs_row or config.permuted):
        return lay_out(config, 128, 1, config.slots) if few else lay_out(config, 256, 2, config.slots)
    if few and config.permuted:
        return lay_out(config, 256, 1, 8)  # each CTA reads the whole row: that costs nothing while SMs are to spare
    if few and config.slots > 1024:
        return lay_out(config, 128, 1, 8)
    # a meeting in a cluster costs a quarter of a microsecond: one CTA a token
    threads = 256 if config.slots <= 1024 else 1024
    if few or config.reads_two:
        return lay_out(config, threads, 2, 1)
    if config.permuted:
        return lay_out(config, threads, 2, 1, 768 if config.is_norm else 1024)  # registers: indices, and gains too
    if config.rotation and not config.writes_bf16 and (config.is_norm or config.rounding != "token"):
        stays = lay_out(config, threads // 2, 4, 1, 512)
        return stays if config.is_norm or stays.turns_runs else replace(stays, ctas_per_sm=0)
    return lay_out(config, threads, 2, 1, 1024 if config.is_norm and not config.writes_bf16 else 0)


def lay_out(config: ProducerConfig, threads: int, chunks: int, most_parts: int, stay: int = 0) -> ProducerConfig:
    """About so many threads of so many chunks each, over as many CTAs as a token takes; more chunks if they must.

    stay   threads that stay on an SM, as their registers allow; 0: none does
    """
    parts = min(-(-config.slots // (threads * chunks)), most_parts)
    while -(-config.slots // (parts * chunks)) > 1024:
        chunks += 1
    threads = -(-config.slots // (parts * chunks * 32)) * 32
    ctas_per_sm = 0
    if stay:  # with two rows each
        row_bytes = config.columns * config.dtype_bytes
        ctas_per_sm = min(max(1, stay // threads), 12, SHARED_BYTES // (2 * row_bytes))
    return replace(config, threads=threads, chunks=chunks, parts=parts, ctas_per_sm=ctas_per_sm)
