"""Whether captions can tune a tokenizer: the gradient's path through its quantizer, on images.

- Measured are the latents that the encoder makes of the images; see [`measure_gradient_path`].
- Nothing is trained: the answer comes before stage 2, for instance of a public checkpoint.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ett.common_ett.metrics import codebook_use
from ett.modeling_ett.gradient_path import GradientPath, is_closed, measure_gradient_path
from ett.modeling_ett.modeling_ibq import IBQModel

from .common import evaluating
from .data_sets import Images, SceneImages, describe_skipped, none_readable

OPEN_FROM = 0.1
"""Gradient ratio from which the path counts as open, if at least half of the tokens are alive."""

ROWS = {
    "images": ("Images", "{:,}"),
    "ratio": ("Gradient ratio", "{:.3g}"),
    "largest_probability": ("Largest probability", "{:.4f}"),
    "dead_tokens": ("Dead tokens", "{:.1%}"),
    "codebook_usage": ("Codebook usage", "{:.2%}"),
    "perplexity": ("Perplexity", "{:,.1f}"),
}
"""Every measure in the order in which it is shown, its name and its form."""


def inspect_tokenizer(
    tokenizer: IBQModel, images: Images | SceneImages, model: str, batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """
    Args:
        tokenizer ([`IBQModel`]): The tokenizer, in float32.
        model (`str`): Its name, for the record.

    Returns:
        - `measures`: `images`, their number; `ratio`, `largest_probability` and `dead_tokens` of [`GradientPath`];
          `codebook_usage` and `perplexity`.
        - `path`: `"open"`, `"narrow"` or `"closed"`; `verdict`: a sentence on it.
        - `skipped`: a list of {row, name, reason}; `settings`: all that moves a number.

    Raises:
        ValueError: None of the images can be read.
    """
    counts = torch.zeros(tokenizer.config.num_vq_embeddings, dtype=torch.long)
    paths, skipped, number = [], [], 0
    bar = tqdm(desc="Inspection", unit=" images", disable=not progress, total=len(images))
    with evaluating(tokenizer), bar:
        for step, items in enumerate(DataLoader(images, batch_size, collate_fn=list)):
            readable = [item for item in items if isinstance(item, torch.Tensor)]
            skipped += [item for item in items if not isinstance(item, torch.Tensor)]
            if readable:
                number += len(readable)
                latents = tokenizer.encode(torch.stack(readable).to(tokenizer.device)).latents
                codes = tokenizer.quantize(latents, return_losses=False).codes
                counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
                paths.append(measure_gradient_path(tokenizer.quantize, latents, seed=step))
            bar.update(len(items))
    if not paths:
        raise none_readable(images, skipped)
    path = {name: value.item() for name, value in GradientPath.join(paths).summary().items()}
    quantizer = tokenizer.quantize
    usage, perplexity = codebook_use(counts)
    return {
        "measures": {"images": number, **path, "codebook_usage": usage, "perplexity": perplexity},
        **judge(**path, logit_scale=quantizer.logit_scale),
        "skipped": skipped,
        "settings": {
            "model": model,
            "codebook_size": len(counts),
            "l2_normalize": quantizer.l2_normalize,
            "logit_scale": quantizer.logit_scale,
            "straight_through_weight": quantizer.straight_through_weight,
            "upstream": "unit Gaussian, the same in every run",
            **images.settings(),
            "batch_size": batch_size,
            "device": tokenizer.device.type,
        },
    }


def judge(ratio: float, largest_probability: float, dead_tokens: float, logit_scale: float) -> dict[str, str]:
    """The `path` and its `verdict`, as [`inspect_tokenizer`] returns them."""
    if ratio >= OPEN_FROM and dead_tokens <= 0.5:
        return {"path": "open", "verdict": "The path is open: captions can tune this tokenizer in stage 2 as it is."}
    # A softmax that is even over the codebook passes as little as one that is all on one code.
    direction = "lower" if largest_probability > 0.5 else "higher"
    remedy = f"a {direction} model.logit_scale than {logit_scale:g}, or model.straight_through_weight=0.1"
    if is_closed(ratio, dead_tokens):
        verdict = f"The path is closed: captions cannot tune this tokenizer; give stage 2 {remedy}."
        return {"path": "closed", "verdict": verdict}
    found = f"the gradient ratio is {ratio:.3g}, and {dead_tokens:.0%} of the tokens are dead"
    return {"path": "narrow", "verdict": f"The path is narrow: {found}; {remedy}, widens it in stage 2."}


def describe_inspection(result: dict[str, Any]) -> str:
    """What [`inspect_tokenizer`] returns as a short table, with what was skipped below it, and the verdict last."""
    lines = [f"{name:<21}{form.format(result['measures'][measure])}" for measure, (name, form) in ROWS.items()]
    return "\n".join([*lines, *describe_skipped(result, "the file of --json"), result["verdict"]])


__all__ = ["describe_inspection", "inspect_tokenizer", "judge"]
