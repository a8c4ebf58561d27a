"""Packing: round trips bit for bit, and the bytes against a definition with Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom.quant.formats import FORMATS, Format
from atom.quant.packing import pack, packed_columns, packed_dtype, unpack

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
PACKED = [f for f in FORMATS.values() if f.is_packed]


def random_codes(fmt: Format, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if fmt.bits > 8:
        return torch.randn(shape, generator=g).to(fmt.dtype)
    if fmt.is_integer:
        qmin, qmax = fmt.code_range(symmetric=True)
        return torch.randint(qmin, qmax + 1, shape, generator=g, dtype=torch.int8)
    return torch.randint(0, 2**fmt.bits, shape, generator=g, dtype=torch.uint8).view(fmt.dtype)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """As integers: NaN codes of 8-bit floats compare equal too."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


@every_format
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 7, 8, 9, 37, 448])  # around a byte of INT4, three bytes of INT3; odd
def test_round_trip(fmt: Format, columns: int) -> None:
    for shape in ((columns,), (3, columns), (2, 3, columns), (0, columns)):
        codes = random_codes(fmt, shape)
        packed = pack(codes, fmt)
        assert packed.shape == (*shape[:-1], packed_columns(columns, fmt)) and packed.dtype == packed_dtype(fmt)
        back = unpack(packed, fmt, columns)
        assert back.dtype == codes.dtype
        assert torch.equal(bits_of(back), bits_of(codes))


@pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_bytes_are_a_little_endian_bit_stream(fmt: Format, data: st.DataObject) -> None:
    """Code i stands at bits [i * bits, (i + 1) * bits) of the row: low nibble first, INT3 across bytes."""
    low, high = fmt.code_range(True) if fmt.is_integer else (0, 2**fmt.bits - 1)
    codes = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=30))
    stream = sum((c & (2**fmt.bits - 1)) << (fmt.bits * i) for i, c in enumerate(codes))
    packed = pack(torch.tensor(codes, dtype=fmt.dtype), fmt)
    assert bytes(packed.tolist()) == stream.to_bytes(len(packed), "little")
    assert unpack(packed, fmt, len(codes)).tolist() == codes


@pytest.mark.parametrize("fmt", [f for f in PACKED if f.is_integer], ids=lambda f: f.name)
def test_unsigned_codes_keep_their_bits(fmt: Format) -> None:
    """Asymmetric codes are unsigned: the low bits of what unpack sign-extends."""
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    back = unpack(pack(codes, fmt), fmt, codes.numel())
    assert torch.equal(back.view(torch.uint8) & (2**fmt.bits - 1), codes)


@every_format
def test_not_contiguous_codes(fmt: Format) -> None:
    codes = random_codes(fmt, (10, 3))
    assert torch.equal(bits_of(unpack(pack(codes.T, fmt), fmt, 10)), bits_of(codes.T))
