"""The IBQ tokenizer: encoder, quantizer, decoder, in the shape of diffusers' `VQModel`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .loading_ett import one_sentence
from .quantizer_ibq import IBQQuantizer, IBQQuantizerOutput

LARGEST = {"layers_per_block": 100, "patch_size": 256, "in_channels": 1024, "out_channels": 1024}
"""Largest value of a size; of every other one it is 2^24."""

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class IBQModelOutput(DecoderOutput):
    """A reconstruction and what it was made from.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, channels, H, W)`): The reconstruction, not clamped.
        commit_loss (`torch.Tensor` of shape `()`): The quantization loss.
        quantized ([`IBQQuantizerOutput`]): Codes, embeddings and all losses of the quantizer.
    """

    quantized: IBQQuantizerOutput | None = None


class KeptLinear(nn.Module):
    """A linear map that is no `nn.Linear`: engines and quantizers replace every one of those by a layer in half
    precision or of integers, in which attention of the tokenizer would lead to other codes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def reset_parameters(self):
        nn.Linear.reset_parameters(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)


def _keep_linear_maps(module: nn.Module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            module.register_module(name, KeptLinear(child))
        else:
            _keep_linear_maps(child)


class IBQModel(VQModel):
    r"""
    IBQ vision tokenizer (Shi et al. 2024): an image of `(H, W)` pixels becomes `(H / 16, W / 16)` codes and back.

    Encoder and decoder are diffusers' own, which equal IBQ's; the quantizer is index backpropagation quantization.
    Defaults are the ETT paper's tokenizer (section 3.1): factor 16, 131,072 codes of width 256.

    Images may have any sides that are multiples of the factor. For large ones there is [`~IBQModel.enable_tiling`],
    for large batches `enable_slicing`, which sends one image at a time through encoder and decoder.

    Args:
        in_channels, out_channels (`int`): Channels of the images.
        down_block_types, up_block_types (`tuple[str, ...]`): Blocks of the encoder and of the decoder; each but the
            last halves, or doubles, height and width.
        block_out_channels (`tuple[int, ...]`): Widths of the encoder's blocks; the decoder has them in reverse.
        layers_per_block (`int`): Residual blocks per level (one more in the decoder).
        latent_channels (`int`): Channels between encoder and `quant_conv`, and between `post_quant_conv` and decoder.
        num_vq_embeddings (`int`): Codebook size K.
        vq_embed_dim (`int`): Width D of a code.
        norm_num_groups (`int`): Groups of the group normalization.
        mid_block_add_attention (`bool`): Whether the middle blocks of encoder and decoder have attention.
        patch_size (`int`): Side of the pixel blocks folded into channels before the encoder (and unfolded after the
            decoder). 1, as in IBQ, folds nothing; 2 makes a small tokenizer about four times cheaper.
        pixel_mean, pixel_std (`float`): Encoder and decoder see pixels less the mean, divided by the standard
            deviation. 0 and 1, as in IBQ, change nothing; the values of the data let a small tokenizer learn tints
            many times sooner.
        l2_normalize, logit_scale, codebook_loss_weight, entropy_temperature, entropy_over_ranks,
            straight_through_weight: See [`IBQQuantizer`].

    Raises:
        ValueError: A size or number is out of range, or blocks, widths and groups do not fit one another.
    """

    _supports_gradient_checkpointing = True
    blend_h = AutoencoderKL.blend_h
    blend_v = AutoencoderKL.blend_v

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 4,
        latent_channels: int = 256,
        num_vq_embeddings: int = 131072,
        vq_embed_dim: int = 256,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        patch_size: int = 1,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        l2_normalize: bool = False,
        logit_scale: float = 1.0,
        codebook_loss_weight: float = 0.25,
        entropy_temperature: float = 0.01,
        entropy_over_ranks: bool = False,
        straight_through_weight: float = 0.0,
    ):
        _check_sizes(
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            num_vq_embeddings=num_vq_embeddings,
            vq_embed_dim=vq_embed_dim,
            norm_num_groups=norm_num_groups,
            patch_size=patch_size,
        )
        _check_blocks(block_out_channels, down_block_types, up_block_types, norm_num_groups)
        _check_numbers(
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            logit_scale=logit_scale,
            codebook_loss_weight=codebook_loss_weight,
            entropy_temperature=entropy_temperature,
            straight_through_weight=straight_through_weight,
        )
        # VQModel's own constructor would register its configuration over ours and allocate a second codebook.
        super(VQModel, self).__init__()
        self.encoder = Encoder(
            in_channels=in_channels * patch_size**2,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = IBQQuantizer(
            num_vq_embeddings,
            vq_embed_dim,
            l2_normalize=l2_normalize,
            logit_scale=logit_scale,
            codebook_loss_weight=codebook_loss_weight,
            entropy_temperature=entropy_temperature,
            entropy_over_ranks=entropy_over_ranks,
            straight_through_weight=straight_through_weight,
        )
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels * patch_size**2,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        _keep_linear_maps(self)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = 512
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As in diffusers, but for its errors.

        Raises:
            OSError: There is no such folder or repository, a file is missing in it, or its weights cannot be read.
            ValueError: Its configuration is damaged, or the weights do not belong to it.
        """
        with one_sentence(f"The tokenizer '{pretrained_model_name_or_path}'"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, **kwargs):
        with one_sentence(f"The configuration of '{pretrained_model_name_or_path}'"):
            loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        fields = loaded[0] if isinstance(loaded, tuple) else loaded
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise ValueError(
                f"The configuration of '{pretrained_model_name_or_path}' holds a {kind}; expected a mapping of fields."
            )
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        with one_sentence("The configuration of an IBQ tokenizer"):
            # Where an exported folder's code is; diffusers would warn of it, and keep it in what is made of the model.
            own = {name: value for name, value in config_dict.items() if name != "auto_map"}
            return super().extract_init_dict(own, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs):
        """What transformers' trainer calls where diffusers' has [`~IBQModel.enable_gradient_checkpointing`]."""
        self.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable

    def set_gradient_path(self, logit_scale: float | None = None, straight_through_weight: float | None = None):
        """Changes how gradients pass the quantizer, here and in the configuration; codes and images stay the same.

        Args:
            logit_scale, straight_through_weight (`float`, *optional*): See [`IBQQuantizer`]; without, as before.

        Raises:
            ValueError: `logit_scale` is not above 0, or `straight_through_weight` is negative.
        """
        given = {"logit_scale": logit_scale, "straight_through_weight": straight_through_weight}
        fields = {name: getattr(self.quantize, name) if value is None else value for name, value in given.items()}
        self.quantize.set_gradient_path(**fields)
        self.register_to_config(**fields)

    @property
    def spatial_factor(self) -> int:
        """Pixels a code along each side."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def execution_device(self) -> torch.device:
        """Where it computes. While weights are offloaded, which accelerate's hooks see to, `device` is another."""
        devices = (getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in self.modules())
        device = next((device for device in devices if device is not None), None)
        return self.device if device is None else torch.device(device)

    @property
    def tile_latent_min_size(self) -> int:
        """Codes along each side of a tile."""
        return self.tile_sample_min_size // self.spatial_factor

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None):
        """
        From here on, images larger than a tile go through encoder and decoder in overlapping tiles, which are
        blended where they overlap: without gradients, both need memory for a tile instead of the image. Smaller
        images come out exactly as without. Attention and group normalization see one tile at a time, so larger
        ones come out somewhat different, and some of their codes too.

        Args:
            tile_sample_min_size (`int`, *optional*): Pixels along each side of a tile, rounded down to whole codes; at
                first 512.
            tile_overlap_factor (`float`, *optional*): Part of a tile's side, in `[0, 1)`, that it shares with the next
                one; at first 0.25.

        Raises:
            ValueError: A tile would be smaller than a code, or the overlap is not in `[0, 1)`.
        """
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        overlap = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if size < self.spatial_factor:
            raise ValueError(
                f"tile_sample_min_size is {size} pixels; expected at least {self.spatial_factor}, the side of a code."
            )
        if not 0 <= overlap < 1:
            raise ValueError(f"tile_overlap_factor is {overlap}; expected a part of a tile's side, from 0 to below 1.")
        self.tile_sample_min_size, self.tile_overlap_factor = size, overlap
        super().enable_tiling()

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """
        Args:
            x (`torch.Tensor` of shape `(batch_size, channels, H, W)`): Pixels in `[-1, 1]`.

        Returns:
            `VQEncoderOutput` with `latents` of shape `(batch_size, dim, H / spatial_factor, W / spatial_factor)`.

        Raises:
            ValueError: A side of the image is no multiple of `spatial_factor`.
        """
        height, width = x.shape[-2:]
        if height % self.spatial_factor or width % self.spatial_factor or 0 in (height, width):
            raise ValueError(
                f"The images are {height} x {width} pixels (height x width); this tokenizer needs sides that are "
                f"multiples of {self.spatial_factor}. Resize or crop them first, for instance with ETTImageProcessor."
            )
        latents = self._in_parts(self._encode, self.tiled_encode, x, self.spatial_factor)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def tiled_encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels to latents, as [`~IBQModel.encode`] takes and makes them, in tiles whether enabled or not."""
        return self._in_tiles(self._encode, x, side_given=self.spatial_factor, side_made=1)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        centred = (x - self.config.pixel_mean) / self.config.pixel_std
        return self.quant_conv(self.encoder(F.pixel_unshuffle(centred, self.config.patch_size)))

    @apply_forward_hook
    def decode(
        self, h: torch.Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape=None
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            h (`torch.Tensor` of shape `(batch_size, dim, height, width)`): Latents, or with `force_not_quantize` the
                embeddings of their codes.

        Returns:
            `DecoderOutput` with `sample` of shape `(batch_size, channels, H, W)`, nominally in `[-1, 1]` but not
            clamped, and `commit_loss`, the quantization loss where latents were quantized.
        """
        commit_loss = None
        if not force_not_quantize:
            quantized = self.quantize(h)
            h, commit_loss = quantized.embeddings, quantized.quantization_loss
        sample = self._in_parts(self._decode, self.tiled_decode, h, 1)
        return DecoderOutput(sample=sample, commit_loss=commit_loss) if return_dict else (sample, commit_loss)

    def tiled_decode(self, h: torch.Tensor) -> torch.Tensor:
        """Embeddings of codes to pixels, as [`~IBQModel.decode`] does, in tiles whether enabled or not."""
        return self._in_tiles(self._decode, h, side_given=1, side_made=self.spatial_factor)

    def _decode(self, h: torch.Tensor) -> torch.Tensor:
        centred = F.pixel_shuffle(self.decoder(self.post_quant_conv(h)), self.config.patch_size)
        return centred * self.config.pixel_std + self.config.pixel_mean

    def _in_parts(self, whole: Transform, tiled: Transform, x: torch.Tensor, side: int) -> torch.Tensor:
        """`x` through one of the two, an image at a time if slicing is enabled; a code's side is `side` in `x`."""
        is_large = max(x.shape[-2:]) > self.tile_latent_min_size * side
        transform = tiled if self.use_tiling and is_large else whole
        return torch.cat([transform(part) for part in x.split(1)]) if self.use_slicing else transform(x)

    def _in_tiles(self, transform: Transform, x: torch.Tensor, side_given: int, side_made: int) -> torch.Tensor:
        """`transform` of `x` tile by tile; a code's side is `side_given` in `x` and `side_made` in what is made."""
        tile = self.tile_latent_min_size
        stride = tile - int(tile * self.tile_overlap_factor)
        # The last tile ends where the image does, so that none is a sliver with too little around it.
        tops, lefts = (
            [*range(0, side // side_given - tile, stride), max(side // side_given - tile, 0)] for side in x.shape[-2:]
        )
        joined = None
        for top in tops:
            row = None
            for left in lefts:
                rows, columns = (slice(start * side_given, (start + tile) * side_given) for start in (top, left))
                row = _join(row, transform(x[..., rows, columns]), left * side_made, 3, self.blend_h)
            joined = _join(joined, row, top * side_made, 2, self.blend_v)
        return joined

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> IBQModelOutput | tuple:
        """Reconstructs pixels `(batch_size, channels, H, W)` in `[-1, 1]`."""
        quantized = self.quantize(self.encode(sample).latents)
        reconstruction = self.decode(quantized.embeddings, force_not_quantize=True).sample
        output = IBQModelOutput(sample=reconstruction, commit_loss=quantized.quantization_loss, quantized=quantized)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def encode_codes(self, pixels: torch.Tensor) -> torch.LongTensor:
        """Pixels `(batch_size, channels, H, W)` in `[-1, 1]` to codes `(batch_size, height, width)`, in the precision
        of the weights even under autocast and where TF32 is allowed: bfloat16 would change about one code in ten."""
        device = self.execution_device
        with torch.autocast(device.type, enabled=False), _full_precision():
            latents = self.encode(pixels.to(device, self.dtype)).latents
            return self.quantize(latents, return_losses=False).codes

    def codes_to_embeddings(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, height, width)` to their codebook embeddings `(batch_size, dim, height, width)`."""
        return self.quantize.lookup(codes)

    def decode_codes(self, codes: torch.LongTensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Codes `(batch_size, height, width)` to images, as [`~IBQModel.decode`] returns them.

        Raises:
            ValueError: `codes` is not of three dimensions, or a code lies outside the codebook.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes has shape {tuple(codes.shape)}; expected (batch_size, height, width).")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.config.num_vq_embeddings:
            raise ValueError(
                f"codes lie between {codes.min()} and {codes.max()}; this tokenizer's are 0 to "
                f"{self.config.num_vq_embeddings - 1}. Were they made by another tokenizer?"
            )
        return self.decode(self.codes_to_embeddings(codes), force_not_quantize=True, return_dict=return_dict)


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _check_sizes(**sizes: Any):
    for name, value in sizes.items():
        largest = LARGEST.get(name, 2**24)
        if not _is_size(value, largest):
            raise ValueError(f"{name} is {value!r:.100}; expected a whole number from 1 to {largest}.")


def _check_numbers(**numbers: Any):
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30
        if not is_number or (name == "pixel_std" and value <= 0):
            raise ValueError(f"{name} is {value!r:.100}; expected a {'number above 0' if is_number else 'number'}.")


def _check_blocks(widths: Any, down: Any, up: Any, groups: int):
    blocks = {"down_block_types": (down, DOWN_BLOCKS), "up_block_types": (up, UP_BLOCKS)}
    for name, (types, known) in blocks.items():
        if not isinstance(types, (list, tuple)) or not all(kind in known for kind in types):
            raise ValueError(f"{name} is {types!r:.100}; expected a list of {' and '.join(known)}.")
    is_list = isinstance(widths, (list, tuple))
    if not is_list or not all(_is_size(width, 2**16) and width % groups == 0 for width in widths):
        raise ValueError(
            f"block_out_channels is {widths!r:.100}; expected a list of multiples of norm_num_groups={groups}."
        )
    if not len(widths) == len(down) == len(up) or not 0 < len(widths) <= 16:
        raise ValueError(
            f"There are {len(down)} down_block_types, {len(up)} up_block_types and {len(widths)} block_out_channels; "
            "expected the same number of each, from 1 to 16."
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Within it, no convolution or matrix product of float32 is computed in TF32."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _join(joined: torch.Tensor | None, part: torch.Tensor, start: int, dim: int, blend: Callable) -> torch.Tensor:
    """What is `joined` so far with the next `part` from `start` on, blended where both have something."""
    if joined is None:
        return part
    part = blend(joined, part, joined.shape[dim] - start)
    return torch.cat([joined.narrow(dim, 0, start), part], dim=dim)


__all__ = ["IBQModel", "IBQModelOutput"]
