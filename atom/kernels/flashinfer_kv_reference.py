# What follows is copied into definitions: plain torch, no import of this package.
import torch

LEVELS = {"int4": 15, "int8": 255}


def unpack(codes: torch.Tensor, fmt: str) -> torch.Tensor:
    """Stored codes [..., bytes] as float32 [..., head_dim]: unsigned integers (INT4: low nibble first), E4M3, bf16."""
    if fmt == "int4":
        wide = codes.view(torch.uint8)
        return torch.stack((wide & 15, wide >> 4), -1).flatten(-2).float()
    return codes.view(torch.uint8).float() if fmt == "int8" else codes.float()


def dequantize(
    codes: torch.Tensor, fmt: str, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(code - zero) * scale, rounded to bfloat16 and then float32."""
    x = unpack(codes, fmt)
    x = x if zero is None else x - zero.float()[..., None]
    return x if scale is None else (x * scale.float()[..., None]).bfloat16().float()


def quantize(x: torch.Tensor, fmt: str) -> tuple[torch.Tensor, ...]:
    """Codes, scale and (integers) zero point of heads [..., head_dim]; scales are rounded to bfloat16 first."""
    if fmt == "bf16":
        return (x,)
    x = x.float()
    if fmt == "fp8_e4m3":
        raw = x.abs().amax(-1) * (1.0 / 448.0)
        scale = torch.where(raw > 0, raw, 1.0).clamp_min(2.0**-126).bfloat16()
        scaled = x * scale.float().reciprocal()[..., None]
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale
    top = LEVELS[fmt]
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    raw = (high - low) * (1.0 / top)
    scale = torch.where(raw > 0, raw, 1.0).clamp_min(2.0**-126).bfloat16()
    inverse = scale.float().reciprocal()
    zero = (-low * inverse).round().clamp(0, top)
    codes = ((x * inverse[..., None]).round() + zero[..., None]).clamp(0, top).to(torch.uint8)
    if fmt == "int4":
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.view(torch.int8), scale, zero.bfloat16()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of heads [T, heads, head_dim], channel i with i + head_dim / 2, rounded operation by operation."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
