"""What the FP4 GEMMs of both Blackwells share: operands behind codes and scales, and how a sum becomes an output."""

from typing import Any

from cutlass import BFloat16, Float32, cute
from cutlass.cute.runtime import make_fake_stream

from .dsl.arguments import row_major
from .fp4_config import Fp4Config


class Fp4Output:
    """The end of a kernel: sums under the outer scales, bias, bfloat16."""

    def __init__(self, config: Fp4Config) -> None:
        self.config = config

    @cute.jit
    def feature_values(self, mC, mB, feature):
        """(outer scale, bias) of an output feature that there is."""
        factor = mC[feature] if self.config.channel_scaled else mC[0]
        offset = Float32(mB[feature]) if self.config.bias else Float32(0.0)
        return factor, offset

    @cute.jit
    def put(self, mS, mY, value, factor, offset, token, feature):
        """Store one sum, of a token and a feature that there are."""
        value = value * factor
        if self.config.token_scaled:
            value = value * mS[token]
        mY[token, feature] = BFloat16(value + offset)


def compile_fp4(kernel: Any, weight: tuple[Any, Any], x: tuple[Any, Any], sizes: tuple[Any, Any], options: str) -> Any:
    """Compile one kernel without a GPU.

    weight, x   fake tensors of codes and scales
    sizes       symbols of tokens and features
    Returns the TVM-FFI function of what the kernel's __call__ takes, on the caller's current stream.
    """
    outer, of_tokens = (row_major(Float32, (cute.sym_int(),), 4) for _ in range(2))
    bias, y = row_major(BFloat16, (cute.sym_int(),), 2), row_major(BFloat16, sizes, 2)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *weight, *x, outer, of_tokens, bias, y, stream, options=f"--enable-tvm-ffi {options}")
