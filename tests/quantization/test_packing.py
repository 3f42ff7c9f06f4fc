"""Packed integers: what goes in comes out, in the byte order of ONNX and Core ML."""

import pytest
import torch

from edgedit_hf.errors import EdgeDiTError
from edgedit_hf.quantization.packing import lookup, pack, packed_size, unpack


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_packing_and_unpacking(bits, count):
    values = torch.randint(
        0, 1 << bits, (3, 5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), values)


def test_the_first_value_is_in_the_lowest_bits():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0b11000001]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_lookup_is_the_value_of_every_code_in_its_rows_table(bits, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 1 << bits, (6, 11), dtype=torch.uint8, generator=generator)
    tables = torch.randint(0, 100, (3, 1 << bits), generator=generator).to(dtype)
    table_of_row = torch.tensor([0, 0, 2, 1, 2, 0], dtype=torch.int32)
    found = lookup(pack(values, bits), tables, bits, 11, table_of_row)
    assert found.dtype == dtype and torch.equal(found, tables[table_of_row.long()].gather(1, values.long()))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(EdgeDiTError, match="4 bits.*below 16"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(EdgeDiTError, match="int64"):
        pack(torch.tensor([1]), 4)
    with pytest.raises(EdgeDiTError, match="bits is 3; it must be one of 1, 2, 4, 8"):
        pack(torch.tensor([1], dtype=torch.uint8), 3)
