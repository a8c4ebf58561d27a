"""The named schemes, and the names that users type: `w4a4`, `w4a8+kv8`, `bf16+kv4`, `w4a8+kv4r16`."""

from dataclasses import replace

from .granularity import Channel, Group, Head, Token
from .schemes import OutlierSpec, RotationSpec, Scheme, TensorSpec

KV2 = TensorSpec("int2", Head(), symmetric=False, dynamic=True, zero="mean")
KV3 = TensorSpec("int3", Head(), symmetric=False, dynamic=True, zero="mean")
KV4 = TensorSpec("int4", Head(), symmetric=False, dynamic=True, zero="mean")
KV4_WHOLE = TensorSpec("int4", Head(), symmetric=False, dynamic=True)
KV8 = TensorSpec("int8", Head(), symmetric=False, dynamic=True)
KVFP8 = TensorSpec("fp8_e4m3", Head(), dynamic=True)
KV_SUFFIXES: dict[str, TensorSpec | None] = {
    "kv2": KV2,
    "kv3": KV3,
    "kv4": KV4,
    "kv8": KV8,
    "kvfp8": KVFP8,
    "kv16": None,
}


def _group_int(bits: int) -> tuple[TensorSpec, TensorSpec]:
    """Atom's weights (GPTQ's grid, its reach searched) and activations, in groups of 128.

    Scales are whole factors 1 to 15 under one float32 a row and a token: code x factor fits a byte, and a GEMM sums all
    of K in INT32. 0.9 is the paper's clip of activations; calibration replaces it by what it measures unless told not
    to.
    """
    weight = TensorSpec(f"int{bits}", Group(128), clip="mse", scale_format="uint4", scale_rule="range", outer="channel")
    activation = TensorSpec(f"int{bits}", Group(128), dynamic=True, clip=0.9, scale_format="uint4", outer="token")
    return weight, activation


def _hadamard_int4() -> tuple[TensorSpec, TensorSpec]:
    """Weights and activations in groups of 32 under the same factors, for channels that Hadamard blocks have mixed.

    No channel is loud behind a block, so none is an outlier; smaller groups cost 4 bits for each 32 values.
    """
    weight, activation = _group_int(4)
    return replace(weight, granularity=Group(32)), replace(activation, granularity=Group(32), clip=0.95)


def _small_groups(fmt: str, size: int, scale_format: str, outer: bool) -> tuple[TensorSpec, TensorSpec]:
    """Groups of 16 or 32 with 8-bit scales, the same for weights and activations."""
    weight = TensorSpec(fmt, Group(size), scale_format=scale_format, outer="tensor" if outer else None)
    return weight, replace(weight, dynamic=True, outer="token" if outer else None)


_W4, _A4 = _group_int(4)
_W4_32, _A4_32 = _hadamard_int4()
_W3, _A3 = _group_int(3)
_A8 = TensorSpec("int8", Token(), dynamic=True, scale_format="fp32")
_W8 = TensorSpec("int8", Channel(), scale_format="fp32")
_FP8_W = TensorSpec("fp8_e4m3", Channel(), scale_format="fp32")
_FP8_A = TensorSpec("fp8_e4m3", Token(), dynamic=True, scale_format="fp32")
_NVFP4 = _small_groups("e2m1", 16, "e4m3", outer=True)
_MXFP4 = _small_groups("e2m1", 32, "e8m0", outer=False)
_NVINT4 = _small_groups("int4", 16, "e4m3", outer=True)


def _with_cache(scheme: Scheme, kv: TensorSpec | None) -> Scheme:
    """`scheme` with another cache; a low-bit one rounds keys less their centre, their heads turned."""
    if kv is None:
        return replace(scheme, kv=None, kv_offset="bias", kv_rotation="none", kv_recent=0)
    return replace(scheme, kv=kv, kv_offset="centre", kv_rotation="hadamard")


PRESETS: dict[str, Scheme] = {
    s.name: _with_cache(s, s.kv)
    for s in (
        Scheme("w4a4", _W4, _A4, KV4, OutlierSpec(128), reorder=True),
        Scheme("w4a8", _W4, _A8, KV4),
        Scheme("w4a4-hadamard", _W4_32, _A4_32, KV4, rotation=RotationSpec("block_hadamard", 64)),
        Scheme("w4a8-hadamard", _W4_32, _A8, KV4, rotation=RotationSpec("block_hadamard", 64)),
        Scheme("w4a16", _W4),
        Scheme("w8a8", _W8, _A8, KV8),
        Scheme("fp8", _FP8_W, _FP8_A, KVFP8),
        Scheme("nvfp4", *_NVFP4, KVFP8),
        Scheme("mxfp4", *_MXFP4, KVFP8),
        Scheme("nvint4", *_NVINT4, KV4),
        Scheme("w3a3", _W3, _A3, KV4, OutlierSpec(128), reorder=True),
        Scheme("bf16"),
    )
}


def get_scheme(text: str) -> Scheme:
    """The scheme called `text`: a preset, optionally with a KV format, as in `w4a4+kv8`.

    An r and a number behind the format say of how many tokens a query reads keys and values exactly: `w4a4+kv4r16`.
    The scheme keeps the preset's bare name: the KV format stands in its `kv`.
    """
    name, *suffixes = text.split("+")
    if name not in PRESETS:
        raise ValueError(
            f"unknown scheme {name!r}; use one of {', '.join(PRESETS)}, "
            f"optionally followed by one of +{', +'.join(KV_SUFFIXES)}"
        )
    if not suffixes:
        return PRESETS[name]
    kv, has_window, recent = suffixes[0].partition("r")
    if len(suffixes) > 1 or kv not in KV_SUFFIXES or (has_window and not recent.isdecimal()):
        raise ValueError(
            f"unknown KV format in {text!r}; use one +suffix of {', '.join(KV_SUFFIXES)}, optionally followed by r16"
        )
    found = _with_cache(PRESETS[name], KV_SUFFIXES[kv])
    return replace(found, kv_recent=int(recent)) if has_window else found


def kv_name(scheme: Scheme) -> str:
    """The cache format as records spell it: int2, int3, int4, int8, fp8 or bf16; of other layers' behind a plus.

    The tokens of a recent window stand behind an r: int4r16.
    """
    specs = (scheme.kv, *(override.kv for override in scheme.kv_overrides))
    names = "+".join(dict.fromkeys("bf16" if s is None else s.format.removesuffix("_e4m3") for s in specs))
    return f"{names}r{scheme.kv_recent}" if scheme.kv_recent else names
