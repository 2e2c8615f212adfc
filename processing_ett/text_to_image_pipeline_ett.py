"""`ETTTextToImagePipeline.from_pretrained("ett-gen")("a red circle").images`: drawing, as a pipeline of diffusers."""

import os
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig, PreTrainedModel, ProcessorMixin

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Options of `from_pretrained` that the processor takes as well as the model."""


class ETTTextToImagePipeline(DiffusionPipeline):
    """
    Draws images for prompts, code by code.

        pipe = ETTTextToImagePipeline.from_pretrained("ett-gen").to("cuda")
        pipe("a red circle and a blue square", guidance_scale=3.0).images[0].save("drawing.png")

    There is no noise and no scheduler: a step is one code of every image, in raster order. Its folder is that of the
    model and the processor, as training leaves it.

    Args:
        model (`ETTForConditionalGeneration`): One with a visual head.
        processor (`ETTProcessor`): The model's.

    Raises:
        ValueError: The model cannot draw.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        super().__init__()
        model.require_visual_head()
        self.register_modules(model=model, processor=processor)
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, torch_dtype: torch.dtype | None = None, **kwargs
    ) -> "ETTTextToImagePipeline":
        """
        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder or Hub repository of an ETT model.
            torch_dtype (`torch.dtype`, *optional*): Of the language model; the vision tokenizer stays in float32.
            kwargs: As of `PreTrainedModel.from_pretrained`.
        """
        if torch_dtype is not None:
            kwargs["dtype"] = torch_dtype
        model = AutoModelForImageTextToText.from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        return cls(model.eval(), AutoProcessor.from_pretrained(pretrained_model_name_or_path, **hub))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Writes an ordinary model folder, which everything else that takes one loads, too.

        Args:
            save_directory (`str` or `Path`): Folder.
            kwargs: As of `PreTrainedModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    @property
    def interrupt(self) -> bool:
        """Whether drawing stops after this step; set by `pipe._interrupt = True`, for instance in a callback."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Image.Image | str | list | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        jacobi_window: int = 1,
        compile_config: CompileConfig | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ETTTextToImagePipeline", int, int, dict], object] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Args:
            prompt (`str` or `list[str]`): What to draw.
            image (image, path, URL or a list of them, *optional*): Images that the prompt speaks of; for a list of
                prompts a list with an entry for each, an image or a list of them. They stand where the prompt has
                `processor.image_token`, and otherwise before it.
            height, width (`int`, *optional*): Pixels, multiples of the tokenizer's factor; by default those of
                `config.image_size`.
            num_images_per_prompt (`int`): Images of each prompt, one after the other.
            guidance_scale (`float`, *optional*): Classifier-free guidance, from 1, which is none.
            temperature, top_k, top_p (*optional*): Sampling, as in `generate`. What is not given is as the model's
                generation configuration says.
            generator (`torch.Generator` or a list of one an image, *optional*): Source of randomness. With a list, an
                image does not depend on those it is drawn with.
            jacobi_window, compile_config: The same images, sooner; as in `generate`.
            output_type (`"pil"`, `"np"`, `"pt"` or `"latent"`): Images; arrays `(num_images, H, W, 3)` or tensors
                `(num_images, 3, H, W)` in `[0, 1]`; or codes `(num_images, h, w)`.
            return_dict (`bool`): Return an `ImagePipelineOutput`, or else a tuple of one.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": codes})` after each code, both
                numbers being its place; where codes `(num_images, h, w)` are -1, nothing was drawn yet. What it
                returns is not used; with `pipe._interrupt = True` it ends the drawing.

        Returns:
            Images, grey where drawing was stopped before.

        Raises:
            ImageError: An image cannot be used.
            ValueError: A prompt is empty or, with the image's codes, longer than the language model's context; the
                size does not fit the tokenizer; an option is out of range; images or generators are of a wrong
                number. Nothing was drawn then.
        """
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        self.processor.check_prompts(prompts, generation_mode="image")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}.")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; expected at least 1.")
        config, images = self.model.config, None
        image_size = (config.image_size if height is None else height, config.image_size if width is None else width)
        grid = self.processor.code_grid(image_size)
        if image is not None:
            images = self._images_by_prompt([image] if isinstance(prompt, str) else image, len(prompts))
            prompts = [self._with_placeholders(text, len(group)) for text, group in zip(prompts, images, strict=True)]
        inputs = self.processor(text=prompts, images=images, generation_mode="image").to(self._execution_device)
        stream = self.model.stream_image_codes(
            **inputs,
            image_size=image_size,
            num_return_sequences=num_images_per_prompt,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            jacobi_window=jacobi_window,
            compile_config=compile_config,
        )
        if hasattr(self.model, "_hf_hook"):
            # Offloading waits for the model's `forward`, and drawing calls its parts.
            self.model._hf_hook.pre_forward(self.model)
        self._interrupt = False
        codes = inputs["input_ids"].new_full((len(prompts) * num_images_per_prompt, *grid), -1)
        with self.progress_bar(total=codes[0].numel()) as progress:
            for place, (code, _) in enumerate(stream):
                codes.flatten(1)[:, place] = code
                progress.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, place, place, {"latents": codes})
                if self.interrupt:
                    break
        images = codes if output_type == "latent" else self._decode(codes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, codes: torch.LongTensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
        pixels = self.model.decode_image_tokens(codes)
        if output_type == "pil":
            return self.processor.post_process_images(pixels)
        pixels = (pixels.float() + 1) / 2
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()

    @staticmethod
    def _images_by_prompt(images: list, num_prompts: int) -> list[list]:
        if not isinstance(images, (list, tuple)) or len(images) != num_prompts:
            given = f"{len(images)} entries" if isinstance(images, (list, tuple)) else "one image"
            raise ValueError(
                f"There are {num_prompts} prompts, and image has {given}; give a list with one entry a prompt, a "
                "image or a list of them."
            )
        return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]

    def _with_placeholders(self, prompt: str, num_images: int) -> str:
        token = self.processor.image_token
        return prompt if token in prompt else token * num_images + prompt


__all__ = ["ETTTextToImagePipeline"]
