"""Another size for a trained tokenizer's codebook, as the paper adjusts IBQ's from 262,144 to 131,072 codes (section
3.1). Encoder and decoder stay as they are.

- A smaller codebook keeps the codes that the training data use most.
- A larger one splits them: each becomes two that lie slightly apart on either side (Linde, Buzo and Gray 1980), across
  its own direction: codes are chosen by dot product, and of two on one ray the longer would get every latent.
"""

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ett.common_ett.images import to_unit_range
from ett.modeling_ett.modeling_ibq import IBQModel

SPLIT_DISTANCE = 0.01
"""How far a split moves either code, as a share of the code's length."""


def resize_codebook(tokenizer: IBQModel, size: int, counts: torch.Tensor, seed: int = 0) -> IBQModel:
    """The same tokenizer with a codebook of `size` codes; kept codes stay in their order, new ones follow.

    Args:
        counts (`torch.LongTensor` of shape `(K,)`): How often each code is used. Among equals the lower number goes
            first.
        seed: Of the directions in which codes are split.
    """
    table, counts = tokenizer.quantize.embedding.weight.detach().cpu().clone(), counts.clone()
    if size < len(table):
        table = table[most_used(counts, size).sort().values]
    generator = torch.Generator().manual_seed(seed)
    while len(table) < size:
        split = most_used(counts, min(size - len(table), len(table)))
        codes = table[split]
        unit = F.normalize(codes, dim=-1)
        noise = torch.randn(codes.shape, generator=generator)
        across = F.normalize(noise - (noise * unit).sum(dim=-1, keepdim=True) * unit, dim=-1)
        step = SPLIT_DISTANCE * codes.norm(dim=-1, keepdim=True) * across
        table = torch.cat([table.index_add(0, split, step), codes - step])
        halves = counts[split] // 2
        counts = torch.cat([counts.index_add(0, split, -halves), halves])
    resized = IBQModel.from_config(tokenizer.config, num_vq_embeddings=size)
    resized.load_state_dict({**tokenizer.state_dict(), "quantize.embedding.weight": table})
    return resized


def most_used(counts: torch.Tensor, number: int) -> torch.Tensor:
    """Numbers of the `number` codes with the highest counts; among equals the lower ones.

    >>> most_used(torch.tensor([0, 5, 2, 5]), 3).tolist()
    [1, 3, 2]
    """
    return counts.sort(descending=True, stable=True).indices[:number]


@torch.no_grad()
def count_codes(
    tokenizer: IBQModel, dataset: Dataset, num_images: int, batch_size: int, progress: bool = True
) -> torch.Tensor:
    """How often each code stands for a place in images from all over the data, `(K,)`.

    Args:
        dataset: Prepared examples, with `pixel_values` `(n, 3, H, W)` of uint8.
        num_images: How many examples are looked at, at most.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    size = tokenizer.config.num_vq_embeddings
    counts = torch.zeros(size, dtype=torch.long)
    number = min(num_images, len(dataset))
    chosen = [index * len(dataset) // number for index in range(number)]
    with tqdm(total=number, desc="Counting codes", unit=" images", leave=False, disable=not progress) as bar:
        for start in range(0, number, batch_size):
            indices = chosen[start : start + batch_size]
            pixels = to_unit_range(torch.cat([dataset[index]["pixel_values"] for index in indices]))
            counts += torch.bincount(tokenizer.encode_codes(pixels).flatten(), minlength=size).cpu()
            bar.update(len(indices))
    tokenizer.train(was_training)
    return counts


__all__ = ["count_codes", "most_used", "resize_codebook"]
