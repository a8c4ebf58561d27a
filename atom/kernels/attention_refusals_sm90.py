"""What the sm_90a attention kernels refuse, and why. Imports no kernel, so that the ops can name it."""

from .attention_config import CODE_BITS, MOST_QUERIES
from .recent_config import RECENT_TOKENS
from .registry import Problem


def refuses_attention(problem: Problem) -> str | None:
    """Why the sm_90a attention kernels cannot run a problem, or None."""
    if problem.arch != "sm_90":
        return f"it is built for sm_90, this is {problem.arch}"
    if problem.head_dim % 16 or not 16 <= problem.head_dim <= 256:
        return f"head_dim must be a multiple of 16 up to 256, got {problem.head_dim}"
    queries = problem.num_heads // max(1, problem.num_kv_heads)
    if queries > MOST_QUERIES:
        return f"at most {MOST_QUERIES} query heads may share a KV head, got {queries}"
    if problem.kv is not None and problem.kv.format.startswith("int") and problem.kv.symmetric:
        return f"symmetric {problem.kv.format} keys and values have no kernel yet"
    if problem.kv is not None and problem.kv.format not in CODE_BITS:
        return f"{problem.kv.format} keys and values have no kernel; it reads {', '.join(CODE_BITS)}"
    if problem.kv_pre_rope:
        return "keys stored before RoPE have no kernel yet"
    if problem.kv_recent not in (0, *RECENT_TOKENS):
        sizes = ", ".join(map(str, RECENT_TOKENS))
        return f"a recent window of {problem.kv_recent} tokens has no kernel; there are some of {sizes}"
    if problem.dtype != "bfloat16":
        return f"queries must be bfloat16, got {problem.dtype}"
    if problem.block_size not in (16, 32, 64):
        return f"block_size must be 16, 32 or 64, got {problem.block_size}"
    return None
