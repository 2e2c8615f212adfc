"""From prepared examples to batches."""

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
PADDING_BRANCH = -1


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in 0..255 to floats in `[-1, 1]`."""
    return pixels.float() / 127.5 - 1


def branch_layout(branches: torch.LongTensor) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Who sees whom, `(batch_size, 1, length, length)`, and positions `(batch_size, length)`, for sequences whose
    branches `(batch_size, length)` number the turns behind a shared part 0: a token sees the shared part and its own
    branch, up to itself, and each branch goes on where the shared part ends.

    >>> mask, positions = branch_layout(torch.tensor([[0, 0, 1, 1, 2]]))
    >>> positions.tolist()
    [[0, 1, 2, 3, 2]]
    >>> mask[0, 0, 4].tolist()
    [True, True, False, False, True]
    """
    sees = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    sees &= torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return sees[:, None], sees.sum(dim=-1) - 1


@dataclass
class ETTCollator:
    """Prepared examples to a batch, padded on the right.

    `input_ids`, `attention_mask` `(batch_size, length)`; `labels` of the same shape, left out for drawing;
    `pixel_values` `(num_images, 3, H, W)` in `[-1, 1]` or `image_codes` `(num_images, h, w)`; for drawing from codes
    also `code_labels`. Where examples have a `name`, the batch has `names`, for reports.

    >>> items = [{"input_ids": [7, 8], "labels": [-100, 8]}, {"input_ids": [9], "labels": [9]}]
    >>> batch = ETTCollator(pad_token_id=0)(items)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8], [9, 0]], [[-100, 8], [9, -100]])
    """

    pad_token_id: int = 0
    is_drawing: bool = False

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"names": [item["name"] for item in items]} if "name" in items[0] else {}
        if "input_ids" in items[0]:
            batch["input_ids"] = self._pad([item["input_ids"] for item in items], self.pad_token_id)
            batch["attention_mask"] = self._pad([[1] * len(item["input_ids"]) for item in items], 0)
            if not self.is_drawing:
                batch["labels"] = self._pad([item["labels"] for item in items], IGNORED)
        if "branches" in items[0]:
            branches = self._pad([item["branches"] for item in items], PADDING_BRANCH)
            batch["attention_mask"], batch["position_ids"] = branch_layout(branches)
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        codes = [item["image_codes"] for item in items if "image_codes" in item]
        if pixels:
            batch["pixel_values"] = to_unit_range(torch.cat(pixels))
        if codes:
            batch["image_codes"] = self._join_codes(codes)
            if self.is_drawing:
                batch["code_labels"] = batch["image_codes"]
        return batch

    @staticmethod
    def _join_codes(codes: list[torch.LongTensor]) -> torch.LongTensor:
        sizes = sorted({tuple(own.shape[1:]) for own in codes})
        if len(sizes) > 1:
            told = " and ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"A batch has pictures of {told} codes; make the codes of all pictures at one size.")
        return torch.cat(codes)

    @staticmethod
    def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


__all__ = ["IGNORED", "ETTCollator", "branch_layout", "to_unit_range"]
