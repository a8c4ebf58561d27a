"""Kernel arguments read before a launch waits for the one in front.

Arguments lie in constant memory, and the first read of a line of it takes a launch hundreds of cycles on every SM. The
compiler reads an argument where it is used, behind that wait, unless something before it depends on the argument.
"""

from typing import Any

from cutlass import cute


@cute.jit
def hold_address(address: Any):
    """Have an argument's address in a register from here on: traps if it is 0."""
    cute.arch.inline_ptx("{ .reg .pred p; setp.eq.s64 p, {$r0}, 0; @p trap; }", read_only_args=[address])


@cute.jit
def hold_word(word: Any):
    """The same of 32 bits: traps if they are 0x80000000, the smallest int32 or minus zero."""
    cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 t; mov.b32 t, {$r0}; setp.eq.u32 p, t, 0x80000000; @p trap; }",
        read_only_args=[word],
    )
