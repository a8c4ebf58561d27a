# What follows is copied into definitions: plain torch, no import of this package.
import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = {"int3": 3.0, "int4": 7.0, "int8": 127.0, "e2m1": 6.0, "fp8_e4m3": 448.0}


def unpack4(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Two codes a byte, the low nibble first: int8 [N, bytes] -> int64 [N, columns] in 0 .. 15."""
    wide = packed.view(torch.uint8).long()
    codes: torch.Tensor = torch.stack((wide & 15, wide >> 4), -1).flatten(-2)[..., :columns]
    return codes


def values(codes: torch.Tensor, fmt: str) -> torch.Tensor:
    """Codes as float32: two's complement nibbles, bytes, E2M1 nibbles, or E4M3 as it is."""
    if fmt == "e2m1":
        table = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=codes.device)
        return table[codes.long()]
    if fmt == "int4":
        return ((codes.long() ^ 8) - 8).float()
    return codes.float()


def spread(scale: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    return scale.repeat_interleave(group, 1)[:, :columns] if group else scale


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    _, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - 1)


def choose_scales(
    x: torch.Tensor, fmt: str, group: int, scale_format: str, ratio: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale [T, groups], outer scale [T, 1] or None) of x float32 [T, K]."""
    columns = x.shape[1]
    size = group or columns
    blocks: torch.Tensor = torch.nn.functional.pad(x, (0, -columns % size)).unflatten(1, (-1, size))
    largest = blocks.abs().amax(-1)
    if scale_format == "e8m0":
        return torch.where(largest > 0, power_of_two(largest * ratio) / 4, 1.0), None
    raw = largest * ratio
    if scale_format == "e4m3":
        outer = raw.amax(1, keepdim=True) * (1.0 / 448.0)
        outer = torch.where(outer > 0, outer.clamp_min(2.0**-117), 1.0)
        return (raw * outer.reciprocal()).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float(), outer
    if scale_format == "uint4":
        outer = raw.amax(1, keepdim=True) * (1.0 / 15.0)
        outer = torch.where(outer > 0, outer.clamp_min(2.0**-117), 1.0)
        return (raw * outer.reciprocal()).round().clamp(1, 15), outer
    scale = torch.where(raw > 0, raw, 1.0).clamp_min(2.0**-126)
    return (scale.bfloat16().float() if scale_format == "bf16" else scale), None


def round_to(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """x, already scaled, on the format's grid, as float32."""
    if fmt == "e2m1":
        x = x.clamp(-6, 6)
        step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
        return (x / step).round() * step
    if fmt == "fp8_e4m3":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    high = LARGEST[fmt]
    return x.round().clamp(-high - 1, high)


def quantize(
    x: torch.Tensor, fmt: str, group: int, scale_format: str, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(values on the grid [T, K], scale, outer) of x float32; see choose_scales."""
    scale, outer = choose_scales(x, fmt, group, scale_format, ratio)
    effective = spread(scale if outer is None else scale * outer, group, x.shape[1])
    return round_to(x * effective.reciprocal(), fmt), scale, outer


def turn(x: torch.Tensor, block: int, outliers: int) -> torch.Tensor:
    """x float32 [T, K], each whole block of its normal columns times Sylvester's matrix over sqrt(block)."""
    H = torch.ones(1, 1, device=x.device)
    while len(H) < block:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    whole = (x.shape[1] - outliers) // block * block
    turned = (x[:, :whole].unflatten(1, (-1, block)) @ (H * block**-0.5)).flatten(1)
    return torch.cat((turned, x[:, whole:]), 1)


def round_activation(x: torch.Tensor, spec: tuple[str, int, str, float] | None, outliers: int) -> torch.Tensor:
    """x float32 [T, K] rounded and dequantized; its last `outliers` columns are INT8 under one scale a token."""
    normal = x.shape[1] - outliers
    if spec is None:
        return x
    grid, scale, outer = quantize(x[:, :normal], *spec)
    rounded = grid * spread(scale if outer is None else scale * outer, spec[1], normal)
    if outliers:
        tail, tail_scale, _ = quantize(x[:, normal:], "int8", 0, "bf16", 1.0 / 127.0)
        rounded = torch.cat((rounded, tail * tail_scale), 1)
    return rounded
