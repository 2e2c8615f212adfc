"""Image codes as a column of a dataset."""

import json

import datasets
import pytest
import torch

from ett.data_ett.codes import CODES_FEATURES, codes_to_row, read_tokenization, row_to_codes
from ett.train import ETTCollator, PreparedDataset


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 32, 32)])
def test_codes_come_back_from_a_dataset(shape):
    codes = torch.randint(0, 131_072, shape, generator=torch.Generator().manual_seed(0))
    (row,) = datasets.Dataset.from_list([codes_to_row(codes)], features=CODES_FEATURES)
    found = row_to_codes(row, 131_072)
    assert found.dtype == torch.long and torch.equal(found, codes)


def test_a_row_without_images_has_no_codes():
    row = codes_to_row(None)
    assert row == {"image_codes": []} and row_to_codes(row, 512).shape == (0, 0, 0)


@pytest.mark.parametrize("code", [-1, 5])
def test_a_code_out_of_range_is_an_error(code):
    with pytest.raises(ValueError, match=f"between {min(code, 1)} and {max(code, 1)}; expected .* and 0 to 4"):
        row_to_codes({"image_codes": [[[1, code]]]}, 5)


@pytest.mark.parametrize("codes", [[[[1, 2], [3]]], [1, 2], [[[1, None]]]])
def test_what_is_no_grid_is_an_error(codes):
    with pytest.raises(ValueError, match="Its 'image_codes'"):
        row_to_codes({"image_codes": codes}, 5)


def test_codes_of_the_former_layout_are_refused(tmp_path):
    record = {"num_rows": 1, "rows_per_shard": 1, "num_codes": 32}
    (tmp_path / "tokenization.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="layout of another version; make them again with `ett tokenize`"):
        read_tokenization(tmp_path)


def test_examples_with_codes_are_prepared_as_those_with_images_are(processor):
    codes = torch.arange(128).reshape(2, 8, 8)
    caption = {"image_codes": codes[:1], "text": "a red circle"}
    prepared = PreparedDataset([caption, {"image_codes": codes[:0], "text": "a circle"}], "caption", processor)
    assert prepared[0]["input_ids"].count(processor.image_token_id) == 81
    assert torch.equal(prepared[0]["image_codes"], codes[:1])
    assert "image_codes" not in prepared[1] and processor.image_token_id not in prepared[1]["input_ids"]
    batch = ETTCollator(processor.tokenizer.pad_token_id)([prepared[0], prepared[1]])
    assert torch.equal(batch["image_codes"], codes[:1])


def test_images_of_several_sizes_do_not_share_a_batch():
    items = [{"image_codes": torch.zeros(1, 2, 2).long()}, {"image_codes": torch.zeros(1, 2, 3).long()}]
    with pytest.raises(ValueError, match="A batch has images of 2 x 2 and 2 x 3 codes"):
        ETTCollator()(items)
