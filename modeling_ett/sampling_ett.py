"""Choosing an image's codes by their scores, without waiting for a value."""

import torch


class CodeSampler:
    """
    Chooses codes place by place. Each place of an image has noise of its own, drawn in the places' order; the code is
    a function of the scores and that noise, so whoever asks again for a place, with better scores, does not roll the
    dice again.

    With noise of the exponential distribution, the largest of `probability / noise` falls on a code as often as its
    probability says.

    Args:
        generator (`torch.Generator` or a list of one an image): Source of the noise, on the device of the scores or
            the CPU.
        do_sample (`bool`): Sample, or take the best code each time.
        temperature (`float`): Divides scores.
        top_k (`int`, *optional*): Choose from the k best codes, equal ones together.
        top_p (`float`): Choose from the smallest set whose probabilities sum to this or more, equal ones together.
    """

    def __init__(
        self,
        generator: torch.Generator | list[torch.Generator] | None = None,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ):
        self.generator, self.do_sample = generator, do_sample
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.first, self.noise = 0, []

    def __call__(self, scores: torch.Tensor, first: int) -> torch.LongTensor:
        """
        Args:
            scores (`torch.FloatTensor` of shape `(num_images, num_places, K)`): Of consecutive places.
            first (`int`): The first one; noise of those before it is forgotten.

        Returns:
            Codes of shape `(num_images, num_places)`.
        """
        if not self.do_sample:
            return scores.argmax(dim=-1)
        del self.noise[: first - self.first]
        self.first = first
        while len(self.noise) < scores.shape[1]:
            self.noise.append(self._new_noise(scores[:, 0]))
        noise = torch.stack(self.noise[: scores.shape[1]], dim=1)
        return (self.filter(scores) - noise.log()).argmax(dim=-1)

    def filter(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores divided by the temperature, `-inf` for codes that are not to be chosen."""
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            threshold = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < threshold, -torch.inf)
        if self.top_p < 1:
            probabilities = scores.softmax(dim=-1)
            scores = scores.masked_fill(probabilities < nucleus_threshold(probabilities, self.top_p), -torch.inf)
        return scores

    def _new_noise(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the exponential distribution, for each of `scores` `(num_images, K)`; drawn where the generator is."""
        if not isinstance(self.generator, (list, tuple)):
            return self._exponential(scores, self.generator)
        return torch.stack([self._exponential(row, own) for row, own in zip(scores, self.generator, strict=True)])

    @staticmethod
    def _exponential(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        device = like.device if generator is None else generator.device
        return torch.empty_like(like, device=device).exponential_(generator=generator).to(like.device)


def nucleus_threshold(probabilities: torch.FloatTensor, top_p: float) -> torch.FloatTensor:
    """The least probability `(..., 1)` in the smallest set of a row of `probabilities` `(..., K)` that sums to `top_p`
    or more."""
    ordered = probabilities.sort(dim=-1, descending=True).values
    is_surplus = ordered.cumsum(dim=-1) - ordered >= top_p
    return ordered.masked_fill(is_surplus, 1).amin(dim=-1, keepdim=True)


__all__ = ["CodeSampler", "nucleus_threshold"]
