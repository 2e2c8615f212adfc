"""From prepared examples to batches."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ett.common_ett.images import to_unit_range

IGNORED = -100
PADDING_BRANCH = -1


def branch_layout(
    branches: torch.LongTensor, documents: torch.LongTensor | None = None
) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """Who sees whom, `(batch_size, 1, length, length)`, and positions `(batch_size, length)`, for sequences whose
    branches `(batch_size, length)` number the turns behind a shared part 0: a token sees the shared part and its own
    branch, up to itself, and each branch goes on where the shared part ends. Where `documents` number several examples
    in a row, each sees itself alone.

    >>> mask, positions = branch_layout(torch.tensor([[0, 0, 1, 1, 2]]))
    >>> positions.tolist()
    [[0, 1, 2, 3, 2]]
    >>> mask[0, 0, 4].tolist()
    [True, True, False, False, True]
    """
    sees = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    if documents is not None:
        sees &= documents[:, None, :] == documents[:, :, None]
    sees &= torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return sees[:, None], sees.sum(dim=-1) - 1


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Which examples share a row of at most `row_length` tokens: each goes into the first row with room for it.

    >>> pack([5, 4, 3, 2], 8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        fitting = next((row for row, left in enumerate(room) if left >= length), None)
        if fitting is None:
            rows.append([index])
            room.append(row_length - length)
        else:
            rows[fitting].append(index)
            room[fitting] -= length
    return rows


@dataclass
class ETTCollator:
    """Prepared examples to a batch, padded on the right.

    `input_ids`, `attention_mask` `(batch_size, length)`; `labels` of the same shape, left out for drawing;
    `pixel_values` `(num_images, 3, H, W)` in `[-1, 1]` or `image_codes` `(num_images, h, w)`; for drawing also
    `predict_codes`. Where examples have a `name`, the batch has `names`, for reports.

    With `packed_length`, examples share rows of at most so many tokens, and none sees another: `position_ids` begin
    anew with each, which attention (eager, sdpa or flex) takes as the border where there is no `attention_mask`.
    Flash attention looks for borders in batches of one row only.

    >>> items = [{"input_ids": [7, 8], "labels": [-100, 8]}, {"input_ids": [9], "labels": [9]}]
    >>> batch = ETTCollator(pad_token_id=0)(items)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[7, 8], [9, 0]], [[-100, 8], [9, -100]])
    """

    pad_token_id: int = 0
    predicts_codes: bool = False
    packed_length: int | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [[index] for index in range(len(items))]
        if self.packed_length is not None and "input_ids" in items[0]:
            rows = pack([len(item["input_ids"]) for item in items], self.packed_length)
            items = [items[index] for row in rows for index in row]
        batch: dict[str, Any] = {"names": [item["name"] for item in items]} if "name" in items[0] else {}
        if "input_ids" in items[0]:
            ends = list(itertools.accumulate(map(len, rows)))
            batch |= self._texts([items[end - len(row) : end] for row, end in zip(rows, ends, strict=True)])
        pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
        codes = [item["image_codes"] for item in items if "image_codes" in item]
        if pixels:
            batch["pixel_values"] = to_unit_range(torch.cat(pixels))
        if codes:
            batch["image_codes"] = self._join_codes(codes)
        if self.predicts_codes:
            batch["predict_codes"] = True
        return batch

    def _texts(self, rows: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Rows of examples to token ids, labels, and who sees whom."""

        def tensor(values: Callable[[int, dict[str, Any]], list[int]], padding: int) -> torch.Tensor:
            joined = [list(itertools.chain(*itertools.starmap(values, enumerate(row)))) for row in rows]
            return self._pad(joined, padding)

        batch = {"input_ids": tensor(lambda _, item: item["input_ids"], self.pad_token_id)}
        if not self.predicts_codes:
            batch["labels"] = tensor(lambda _, item: item["labels"], IGNORED)
        if "branches" in rows[0][0]:
            branches = tensor(lambda _, item: item["branches"], PADDING_BRANCH)
            documents = tensor(lambda number, item: [number] * len(item["input_ids"]), -1)
            batch["attention_mask"], batch["position_ids"] = branch_layout(branches, documents)
        elif self.packed_length is not None:
            batch["position_ids"] = tensor(lambda _, item: list(range(len(item["input_ids"]))), 0)
        else:
            batch["attention_mask"] = tensor(lambda _, item: [1] * len(item["input_ids"]), 0)
        return batch

    @staticmethod
    def _join_codes(codes: list[torch.LongTensor]) -> torch.LongTensor:
        sizes = sorted({tuple(own.shape[1:]) for own in codes})
        if len(sizes) > 1:
            told = " and ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"A batch has images of {told} codes; make the codes of all images at one size.")
        return torch.cat(codes)

    @staticmethod
    def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


__all__ = ["IGNORED", "ETTCollator", "branch_layout", "pack"]
