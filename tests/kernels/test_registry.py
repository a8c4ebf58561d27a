"""Which implementation runs: decided once, visible, never silently another."""

import pytest

from atom.errors import UnsupportedError
from atom.kernels.activation import PERMUTE_QUANTIZE
from atom.kernels.gated import GATED_QUANTIZE
from atom.kernels.greedy import GREEDY
from atom.kernels.linear import LINEAR, LINEAR_ADD
from atom.kernels.norm import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from atom.kernels.paged_attention import PAGED_ATTENTION
from atom.kernels.registry import Implementation, Op, Problem, device_arch
from atom.kernels.rope_append import ROPE_APPEND_KV

OPS = (
    LINEAR,
    LINEAR_ADD,
    RMS_NORM_QUANTIZE,
    ADD_RMS_NORM_QUANTIZE,
    PERMUTE_QUANTIZE,
    GATED_QUANTIZE,
    ROPE_APPEND_KV,
    PAGED_ATTENTION,
    GREEDY,
)


def reference() -> str:
    return "reference"


def fast() -> str:
    return "fast"


def implementation(name: str, reason: str | None) -> Implementation:
    return Implementation(name, f"{__name__}:fast", lambda problem: reason)


def op(*implementations: Implementation) -> Op:
    return Op("double", "2 x", reference, implementations)


def test_cpu_and_asking_run_the_reference() -> None:
    both = op(implementation("fast_sm90", None))
    for choice in (both.choose(Problem("cpu")), both.choose(Problem("sm_90"), "reference")):
        assert choice.name == "reference" and choice.build is reference and choice.op == "double"


def test_first_that_accepts_wins_and_refusals_are_kept() -> None:
    several = op(implementation("a", "needs sm_100"), implementation("b", None), implementation("c", None))
    choice = several.choose(Problem("sm_90"))
    assert choice.name == "b" and choice.build is fast
    assert choice.refusals == (("a", "needs sm_100"),)


def test_none_that_accepts_is_an_error_with_all_reasons() -> None:
    several = op(implementation("a", "needs sm_100"), implementation("b", "K is no multiple of 64"))
    with pytest.raises(UnsupportedError) as error:
        several.choose(Problem("sm_90"))
    for part in ("op double", "sm_90", "a: needs sm_100", "b: K is no multiple of 64", "Pass --kernels reference"):
        assert part in str(error.value)


def test_no_kernel_at_all_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"no kernel is registered for it.*--kernels reference"):
        op().choose(Problem("sm_80"))


def test_a_refused_implementation_is_never_imported() -> None:
    broken = Implementation("broken", "atom.no_such_module:f", lambda problem: "not here")
    assert op(broken, implementation("b", None)).choose(Problem("sm_90")).name == "b"
    with pytest.raises(ModuleNotFoundError):
        Implementation("broken", "atom.no_such_module:f", lambda problem: None).load()


@pytest.mark.parametrize("each", OPS, ids=lambda o: o.name)
@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_op_answers_for_every_gpu(each: Op, arch: str) -> None:
    """A choice, or words: no problem makes a refusal fail. (What is chosen is not imported here.)"""
    problem = Problem(arch, N=64, K=64)
    reasons = [i.refuses(problem) for i in each.implementations]
    assert all(reason is None or reason.strip() for reason in reasons)
    assert each.choose(problem, "reference").build is each.reference
    assert each.formula


def test_device_arch() -> None:
    assert device_arch("cpu") == "cpu"
    with pytest.raises(UnsupportedError, match="meta is neither cpu nor cuda"):
        device_arch("meta")
