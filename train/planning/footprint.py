"""What a micro-batch holds in memory beside weights, gradients and the optimizer's state: found by running each part
on tensors without data, which have shapes and types but no memory.

The parts' peaks are added up, which is a little more than the peak of all: they do not quite coincide. Not in it are
what the allocator leaves unused, the libraries' own workspaces and the blocks of the quantizer.
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence

import lpips
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.modeling_ett.scoring_head import CHUNK_ELEMENTS

from ..arguments import ETTTrainingArguments


class LiveBytes(TorchDispatchMode):
    """Within it, follows the bytes of tensors that are made and not yet freed: `now`, and at most so far `peak`.

    Args:
        there: Tensors that were there before, and whose views therefore count nothing.
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakKeyDictionary({tensor.untyped_storage(): 0 for tensor in there})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = size = storage.nbytes()
                weakref.finalize(storage, self._free, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return made

    def _free(self, size: int):
        self.now -= size


def peak_bytes(
    run: Callable, module: nn.Module, shape: tuple[int, ...], half: torch.dtype | None = None, back: bool = True
) -> int:
    """Bytes at the peak of `run(module, input)`, without the module's weights and their gradients.

    Args:
        module: On the meta device.
        shape: Of the input, a tensor in float32.
        half: Type of autocast, if any.
        back: Whether gradients come back to the input and to what learns in the module.
    """
    module = copy.deepcopy(module).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in set(module.modules()):
            for name, parameter in part.named_parameters(recurse=False):
                fake = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                if fake.requires_grad:
                    # Gradients are counted elsewhere.
                    fake.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
                setattr(part, name, fake)
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty_like(buffer, device="cpu"))
            if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                # As autocast of a GPU computes them; that of the CPU, which stands in for it here, does not.
                part.forward = lambda x, normalize=part.forward: normalize(x.float())
        tensor = torch.empty(shape, requires_grad=back)
        with LiveBytes([*module.parameters(), *module.buffers(), tensor]) as live, torch.set_grad_enabled(back):
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                output = run(module, tensor)
            if back:
                output.float().sum().backward()
        return live.peak


def activation_bytes(
    model: IBQModel | ETTForConditionalGeneration,
    args: ETTTrainingArguments,
    batch_size: int,
    image_size: int,
    text_tokens: int,
    critics: Sequence[nn.Module] = (),
) -> dict[str, int]:
    """Bytes by part for a micro-batch of one image and `text_tokens` an example.

    Args:
        model: On the meta device; its `requires_grad` tell what learns.
        critics: LPIPS and discriminator where a tokenizer learns, on the meta device.
    """
    is_tokenizer = isinstance(model, IBQModel)
    tokenizer = model if is_tokenizer else model.model.vision_tokenizer
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if args.gradient_checkpointing:
        with warnings.catch_warnings():
            # An old name, which older versions of transformers know, too.
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_enable()
    images = (batch_size, tokenizer.config.in_channels, image_size, image_size)
    found = {}
    if any(parameter.requires_grad for parameter in tokenizer.parameters()):
        found["vision_tokenizer"] = peak_bytes(_reconstruct, tokenizer, images, half=half)
        judged = (min(batch_size, args.critics_batch_size or batch_size), *images[1:])
        for critic in critics:
            found[type(critic).__name__] = peak_bytes(_judge, critic, judged, half=half)
    else:
        found["vision_tokenizer"] = peak_bytes(_encode, tokenizer, images, back=False)
    if is_tokenizer:
        return found
    codes = (image_size // tokenizer.spatial_factor) ** 2
    width = model.config.text_config.hidden_size
    if model.config.visual_embedding == "index":
        # The embeddings of the codes, and their gradients.
        found["index_embedding"] = 2 * 4 * batch_size * codes * width
    else:
        found["projector"] = peak_bytes(
            lambda module, x: module(x, torch.arange(codes, device=x.device), codes),
            model.model.projector,
            (batch_size, codes, tokenizer.config.vq_embed_dim),
            half=half,
        )
    positions = codes + 2 + text_tokens
    found["language_model"] = peak_bytes(_read, model.model.language_model, (batch_size, positions, width), half=half)
    head = model.visual_head if model.config.visual_head else model.lm_head
    labels = batch_size * (codes if model.config.visual_head else text_tokens)
    item = 2 if half else 4
    # The gradients of hidden states and of the head's weights, made with the loss, and a chunk's scores and gradients.
    learned = head.weight.numel() if head.weight.requires_grad else 0
    found["head"] = item * (2 * labels * width + learned) + (8 + item) * min(CHUNK_ELEMENTS, labels * len(head.weight))
    return found


def _reconstruct(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    return tokenizer.decode(tokenizer.encode(pixels).latents, force_not_quantize=True).sample


def _encode(tokenizer: IBQModel, pixels: torch.Tensor) -> torch.Tensor:
    return tokenizer.encode(pixels).latents


def _read(language_model: nn.Module, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return language_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state


def _judge(critic: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return critic(pixels, pixels) if isinstance(critic, lpips.LPIPS) else critic(pixels)


__all__ = ["LiveBytes", "activation_bytes", "peak_bytes"]
