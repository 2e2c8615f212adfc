"""Image codes as bits, and as rows of a data set."""

import doctest

import numpy as np
import pytest
import torch

import ett.data_ett.codes
from ett.data_ett.codes import bits_per_code, pack_codes, pack_row, unpack_codes, unpack_row
from ett.train import ETTCollator, PreparedDataset

NUMBERS = [1, 2, 3, 5, 16, 17, 512, 1000, 8192, 131_071, 131_072, 131_073, 2**18]


@pytest.mark.parametrize("num_codes", NUMBERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 32, 32), (3, 7, 9)])
def test_packed_codes_come_back(num_codes, shape):
    codes = np.random.default_rng(0).integers(0, num_codes, shape)
    codes.flat[-1] = num_codes - 1
    packed = pack_codes(torch.from_numpy(codes), num_codes)
    assert len(packed) == -(-codes.size * bits_per_code(num_codes) // 8)
    unpacked = unpack_codes(packed, shape, num_codes)
    assert unpacked.dtype == torch.long and np.array_equal(unpacked.numpy(), codes)


def test_codes_lie_one_after_the_other_with_their_highest_bit_first():
    assert pack_codes(np.array([1, 2, 7]), 8) == bytes([0b00101011, 0b10000000])


def test_a_picture_of_512_pixels_takes_2176_bytes():
    assert len(pack_codes(np.zeros((32, 32), int), 131_072)) == 2176


@pytest.mark.parametrize("code", [-1, 8])
def test_a_code_out_of_range_is_not_packed(code):
    with pytest.raises(ValueError, match=f"between {min(code, 0)} and {max(code, 0)}; expected 0 to 7"):
        pack_codes(np.array([0, code]), 8)


def test_bytes_that_do_not_fit_the_shape_are_an_error():
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\) with 3 bits each take 2 bytes; there are 3"):
        unpack_codes(bytes(3), (1, 2, 2), 8)


def test_a_damaged_code_is_an_error():
    with pytest.raises(ValueError, match="There is a code 7; expected 0 to 4"):
        unpack_codes(bytes([255]), (1, 1, 2), 5)


def test_a_row_without_pictures_has_no_codes():
    row = pack_row(None, 512)
    assert row == {"image_codes": b"", "image_codes_shape": [0, 0, 0]}
    assert unpack_row(row, 512).shape == (0, 0, 0)


def test_examples_with_codes_are_prepared_as_those_with_pictures_are(processor):
    codes = torch.arange(128).reshape(2, 8, 8)
    caption = {"image_codes": codes[:1], "text": "a red circle"}
    prepared = PreparedDataset([caption, {"image_codes": codes[:0], "text": "a circle"}], "caption", processor)
    assert prepared[0]["input_ids"].count(processor.image_token_id) == 81
    assert torch.equal(prepared[0]["image_codes"], codes[:1])
    assert "image_codes" not in prepared[1] and processor.image_token_id not in prepared[1]["input_ids"]
    batch = ETTCollator(processor.tokenizer.pad_token_id)([prepared[0], prepared[1]])
    assert torch.equal(batch["image_codes"], codes[:1])


def test_pictures_of_several_sizes_do_not_share_a_batch():
    items = [{"image_codes": torch.zeros(1, 2, 2).long()}, {"image_codes": torch.zeros(1, 2, 3).long()}]
    with pytest.raises(ValueError, match="A batch has pictures of 2 x 2 and 2 x 3 codes"):
        ETTCollator()(items)


def test_the_examples_in_the_documentation_are_true():
    assert doctest.testmod(ett.data_ett.codes) == (0, 1)
