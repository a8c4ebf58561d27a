"""The op registry: which implementation runs a problem, decided once, visibly, without silent fallbacks.

An op is its mathematics, a torch reference, and a tuple of implementations. Each implementation says in words why it
refuses a problem. On a CPU the reference *is* the implementation; on a GPU the reference runs only when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from ..errors import UnsupportedError
from ..quant.schemes import LinearScheme, TensorSpec

Kernels = Literal["auto", "reference"]
REFERENCE = "reference"


@dataclass(frozen=True)
class Problem:
    """What an implementation is asked to run.

    arch     "cpu", or "sm_90" for compute capability 9.0
    linear   the scheme of the linears fed or run, for GEMMs and producers
    N, K     out and in features (0 where they do not matter)

    For attention: the cache's format (None: the model's own), its head_dim, query and KV heads, tokens of a block,
    whether keys are stored before RoPE, less a centre, or turned by a Hadamard matrix, how many of the newest tokens
    are read exactly, and the model's dtype.
    """

    arch: str
    linear: LinearScheme = field(default_factory=LinearScheme)
    N: int = 0
    K: int = 0
    kv: TensorSpec | None = None
    head_dim: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    block_size: int = 16
    kv_pre_rope: bool = False
    kv_centred: bool = False
    kv_rotates: bool = False
    kv_recent: int = 0
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    name      what `atom check` prints, gemm_sm90 say
    target    "module:function" of its builder, imported on first use
    refuses   the reason why it cannot run a problem, or None if it can
    """

    name: str
    target: str
    refuses: Callable[[Problem], str | None]

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        builder: Callable[..., Any] = getattr(import_module(module), function)
        return builder


@dataclass(frozen=True)
class Choice:
    """The outcome for one problem: the implementation's name and builder, and why the others refused."""

    op: str
    name: str
    build: Callable[..., Any]
    refusals: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Op:
    """One fused computation.

    formula      its mathematics, for people
    reference    builder of the torch reference; implementations share its signature
    """

    name: str
    formula: str
    reference: Callable[..., Any]
    implementations: tuple[Implementation, ...] = ()

    def choose(self, problem: Problem, kernels: Kernels = "auto") -> Choice:
        """The implementation that runs `problem`; UnsupportedError says who refused and why."""
        if problem.arch == "cpu" or kernels == REFERENCE:
            return Choice(self.name, REFERENCE, self.reference)
        refusals = self.refusals(problem)
        for implementation in self.implementations:
            if implementation.name not in refusals:
                return Choice(self.name, implementation.name, implementation.load(), tuple(refusals.items()))
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items()) or "no kernel is registered for it"
        raise UnsupportedError(
            f"op {self.name} has no implementation for this problem on {problem.arch} ({why}). "
            "Pass --kernels reference to run its torch reference, or choose another scheme"
        )

    def runs(self, problem: Problem) -> bool:
        """Whether some implementation, other than the reference, takes `problem`."""
        return len(self.refusals(problem)) < len(self.implementations)

    def refusals(self, problem: Problem) -> dict[str, str]:
        """Why each implementation that refuses `problem` does so, by the implementation's name."""
        found = ((i.name, i.refuses(problem)) for i in self.implementations)
        return {name: reason for name, reason in found if reason is not None}


def device_arch(device: Any) -> str:
    """ "cpu", or the compute capability of a CUDA device as "sm_90"."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise UnsupportedError(f"device {device} is neither cpu nor cuda; use one of these")
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
