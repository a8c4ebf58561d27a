"""Which function runs a PTX instruction."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .ptx_arithmetic import (
    add_bf16,
    bf16x2,
    binary,
    cvt,
    divide,
    fma,
    funnel,
    high,
    mad,
    mov,
    prmt,
    s16x2,
    selp,
    setp,
    shift,
    unary,
    wide,
)
from .ptx_block_scaled import mma_block_scaled
from .ptx_exchange import (
    arrive,
    atomic,
    bar,
    bulk,
    count,
    elect,
    ldmatrix,
    mbarrier,
    memory_op,
    mma,
    movmatrix,
    nothing,
    redux,
    shfl,
    vote,
)
from .ptx_warp import Warp

HANDLERS: list[tuple[str, Callable[[Warp, str, list[Any]], Any]]] = [
    (r"(ld|st)\..*", memory_op), (r"atom\..*", atomic),
    (r"mul\.wide.*|mad\.wide.*", wide), (r"mul\.hi\..*", high), (r"mad\.lo.*", mad), (r"fma\..*", fma),
    (r"(add|sub|mul)\.rn\.bf16x2|(min|max)\.bf16x2", bf16x2), (r"add\.(rn\.)?bf16", add_bf16),
    (r"(min|max)(\.relu)?\.s16x2", s16x2),
    (r"add\.(?!bf16).*", binary(lambda a, b: a + b)), (r"sub\.(?!bf16).*", binary(lambda a, b: a - b)),
    (r"mul\.(?!bf16).*", binary(lambda a, b: a * b)),
    (r"div\..*", binary(divide)), (r"rem\..*", binary(lambda a, b: np.fmod(a, b))),
    (r"max\.NaN\..*", binary(np.maximum)),
    (r"min\..*", binary(np.fmin)), (r"max\..*", binary(np.fmax)),
    (r"and\..*", binary(lambda a, b: a & b)), (r"or\..*", binary(lambda a, b: a | b)),
    (r"xor\..*", binary(lambda a, b: a ^ b)), (r"not\.pred", unary(lambda a: ~a)), (r"not\..*", unary(lambda a: ~a)),
    (r"neg\..*", unary(lambda a: -a)), (r"abs\..*", unary(np.abs)),
    (r"shl\..*", shift(True)), (r"shr\..*", shift(False)), (r"shf\..*", funnel),
    (r"setp\..*", setp), (r"selp\..*", selp), (r"prmt\..*", prmt), (r"mov\..*", mov), (r"cvt\..*", cvt),
    (r"cvta\..*", mov),
    (r"ex2\..*", unary(np.exp2)), (r"lg2\..*", unary(np.log2)), (r"rcp\..*", unary(lambda a: 1 / a)),
    (r"sqrt\..*", unary(np.sqrt)), (r"red\.shared\.add\.s32", count),
    (r"shfl\..*", shfl), (r"redux\..*", redux), (r"vote\..*", vote), (r"elect\..*", elect),
    (r"movmatrix\..*", movmatrix),
    (r"ldmatrix\..*", ldmatrix), (r"mma\.sync\.aligned\.kind::mxf4nvf4\.block_scale\..*", mma_block_scaled),
    (r"mma\..*", mma), (r"bar\.sync|barrier\.sync.*", bar),
    (r"bar\.arrive|barrier(\.cta)?\.arrive", arrive),
    (r"mbarrier\..*", mbarrier),
    (r"cp\.async\.bulk\..*", bulk), (r"griddepcontrol.*|fence.*|prefetch.*|bar\.warp\.sync", nothing),
]  # fmt: skip
_found: dict[str, Callable[[Warp, str, list[Any]], Any]] = {}


def handler(op: str) -> Callable[[Warp, str, list[Any]], Any]:
    """What runs an instruction: (warp, op, arguments) -> False if it must be tried again."""
    if op not in _found:
        for pattern, run in HANDLERS:
            if re.fullmatch(pattern, op):
                _found[op] = run
                break
        else:
            raise NotImplementedError(f"the emulator does not know {op}; add it to HANDLERS")
    return _found[op]
