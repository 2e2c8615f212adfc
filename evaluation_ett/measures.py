"""What is measured of reconstructions, as running sums: any number of images in the same memory.

- PSNR, SSIM and LPIPS are means over images; PSNR and SSIM of values in [0, 1].
- Codebook usage and perplexity are over the codes of all images together.
- rFID is the Fréchet distance between the features of all originals and those of all reconstructions.
"""

import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from ett.common_ett.metrics import codebook_use, psnr_of


class Measures:
    """Running sums over pairs of originals and reconstructions.

    Args:
        num_codes (`int`): Codebook size K.
        truncate (`bool`): PSNR and SSIM see images cut down to 256 levels, as published numbers do, and not floats.
        judges (`nn.ModuleDict`, *optional*): See [`build_judges`]: `rfid` maps images in `[0, 1]` to features
            `(B, num_features)`; each of the others maps two batches in `[-1, 1]` to a distance a pair.
        device: Where the networks and the statistics of the features are.
    """

    def __init__(
        self,
        num_codes: int,
        truncate: bool = False,
        judges: nn.ModuleDict | None = None,
        device: torch.device | str = "cpu",
    ):
        judges = dict(judges.to(device).items()) if judges else {}
        inception = judges.pop("rfid", None)
        self.fid = None
        if inception is not None:
            self.fid = FrechetInceptionDistance(inception, normalize=True).to(device)
        self.truncate, self.perceptual = truncate, judges
        self.count = 0
        self.code_counts = torch.zeros(num_codes, dtype=torch.long)
        self.sums = {name: torch.zeros((), dtype=torch.double) for name in ("psnr", "ssim", *judges)}

    @torch.inference_mode()
    def add(self, originals: torch.Tensor, reconstructions: torch.Tensor, codes: torch.LongTensor):
        """
        Args:
            originals, reconstructions (`torch.Tensor` of shape `(B, 3, H, W)`): In `[-1, 1]`.
            codes (`torch.LongTensor` of shape `(B, h, w)`): Those that the reconstructions were made from.
        """
        self.count += len(originals)
        self.code_counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.code_counts))
        for name, distance in self.perceptual.items():
            self._sum(name, distance(originals, reconstructions).flatten())
        pair = [(pixels + 1) / 2 for pixels in (originals, reconstructions)]
        if self.fid is not None:
            for images, real in zip(pair, (True, False), strict=True):
                self.fid.update(images, real=real)
        if self.truncate:
            pair = [truncated(images) for images in pair]
        self._sum("psnr", psnr_of((pair[0] - pair[1]).square().mean(dim=(1, 2, 3)), 1.0))
        # In float32 the variance of an even background is lost to rounding.
        pair = [images.double() for images in pair]
        self._sum("ssim", structural_similarity_index_measure(*pair, data_range=1.0, reduction="none"))

    def _sum(self, name: str, values: torch.Tensor):
        self.sums[name] += values.double().sum().cpu()

    def mean(self, name: str) -> float:
        """Mean over the images so far of `psnr`, `ssim` or one of the judges' distances."""
        return (self.sums[name] / self.count).item()

    def results(self) -> dict[str, float | None]:
        """`images`, their number; `psnr` in dB; `ssim`; `codebook_usage`, the share of all codes that occur;
        `perplexity` of the codes; and by judges `rfid` (`None` for a single image), `lpips_alex` and `lpips_vgg`.

        Raises:
            ValueError: There was no image.
        """
        if not self.count:
            raise ValueError("There is no image to reconstruct; give at least one.")
        results = {"images": self.count, **{name: self.mean(name) for name in self.sums}}
        if self.fid is not None:
            results["rfid"] = self.fid.compute().item() if self.count > 1 else None
        usage, perplexity = codebook_use(self.code_counts)
        return results | {"codebook_usage": usage, "perplexity": perplexity}

    def state(self) -> dict[str, torch.Tensor]:
        """All sums as tensors, whose size does not depend on the number of images."""
        state = {"count": torch.tensor(self.count), "code_counts": self.code_counts, **self.sums}
        if self.fid is not None:
            state |= {f"fid.{name}": tensor.cpu() for name, tensor in self.fid.metric_state.items()}
        return state

    def load_state(self, state: dict[str, torch.Tensor]):
        """Goes on from what [`~Measures.state`] gave."""
        self.count, self.code_counts = int(state["count"]), state["code_counts"]
        self.sums = {name: state[name] for name in self.sums}
        if self.fid is not None:
            for name, tensor in self.fid.metric_state.items():
                setattr(self.fid, name, state[f"fid.{name}"].to(tensor.device))
            # torchmetrics learns it in an update, and there may be none left.
            self.fid.orig_dtype = torch.float32


def truncated(images: torch.Tensor) -> torch.Tensor:
    """Images in `[0, 1]` cut down to the 256 levels of 8 bits, still in `[0, 1]`."""
    # In float32 a level may lie just under itself.
    return (255 * images + 1e-3).floor() / 255


__all__ = ["Measures", "truncated"]
