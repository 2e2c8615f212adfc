"""The LAION aesthetic score, by which the paper chooses images to draw from (section 4.1): Schuhmann's "Improved
Aesthetic Predictor" (2022)."""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

CLIP_NAME = "openai/clip-vit-large-patch14"
HEAD_NAME = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
"""The published sac+logos+ava1-l14-linearMSE.pth, on the Hub."""


class AestheticHead(nn.Module):
    """A CLIP embedding of length 1 to a score, about 1 to 10. There is nothing nonlinear between the layers; names are
    the published ones (`layers.0.weight` and so on).

    Args:
        width (`int`): Of the embedding; 768 of CLIP ViT-L/14.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            *(nn.Linear(64, 16), nn.Linear(16, 1)),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """`(n, width)` to scores `(n,)`."""
        return self.layers(embeddings)[:, 0]


class AestheticPredictor(nn.Module):
    """CLIP's image embedding, scaled to length 1, through an [`AestheticHead`]."""

    def __init__(self, clip: CLIPVisionModelWithProjection, head: AestheticHead, image_processor: CLIPImageProcessor):
        super().__init__()
        self.clip, self.head, self.image_processor = clip, head, image_processor

    @classmethod
    def from_pretrained(cls, model: str = CLIP_NAME, head: str = HEAD_NAME) -> "AestheticPredictor":
        """
        Args:
            model: Folder or Hub name of the CLIP model that the head was trained on.
            head: As [`find_head`] takes it.

        Raises:
            ValueError: Weights are missing, or the two do not belong together.
        """
        file = find_head(head)
        try:
            clip = CLIPVisionModelWithProjection.from_pretrained(model, dtype=torch.float32)
            image_processor = CLIPImageProcessor.from_pretrained(model)
        except OSError as error:
            raise ValueError(
                f"The aesthetic score needs CLIP's weights and preprocessor_config.json of '{model}', which are "
                f"neither in such a folder nor to be had from the Hub: {error}"
            ) from error
        predictor = AestheticHead(clip.config.projection_dim)
        try:
            predictor.load_state_dict(_read_weights(file))
        except RuntimeError as error:
            raise ValueError(
                f"'{file}' is no head of the aesthetic predictor for '{model}', whose embeddings have "
                f"{clip.config.projection_dim} numbers: {error}"
            ) from error
        return cls(clip, predictor, image_processor).eval()

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """An image as CLIP takes it, `(3, H, W)`."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Preprocessed images `(n, 3, H, W)` to scores `(n,)`, about 1 to 10."""
        embeddings = self.clip(pixel_values.to(self.clip.device)).image_embeds
        return self.head(F.normalize(embeddings, dim=-1))


def find_head(name: str) -> Path:
    """The file of a head: a local one (`.safetensors`, or the published `.pth`), or one on the Hub, as
    `owner/repository/file`.

    Raises:
        ValueError: There is none.
    """
    if Path(name).is_file():
        return Path(name)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    try:
        if file and owner not in ("", ".", "..", "~"):
            return Path(hf_hub_download(f"{owner}/{repository}", file))
        cause = "there is no such file"
    except (OSError, ValueError) as error:
        cause = str(error)
    raise ValueError(
        f"The head of the aesthetic predictor '{name}' is missing: {cause}. Give head=FILE, the published "
        "sac+logos+ava1-l14-linearMSE.pth (github.com/christophschuhmann/improved-aesthetic-predictor), or "
        "column=NAME, where the data hold scores."
    )


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"'{file}' cannot be read as weights: {error}") from error


__all__ = ["CLIP_NAME", "HEAD_NAME", "AestheticHead", "AestheticPredictor", "find_head"]
