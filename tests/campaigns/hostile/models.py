"""Models of a few thousand weights, as training and conversion leave them."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor, build_word_tokenizer
from ett.train.models.conversion import EMA_PREFIX, source_name

WORDS = ("a", "red", "blue", "circle", "square", "cat", "what", "color", "is", "the", "?", "1", "2")
IMAGE_SIZE = 16


def save_models(folder: Path):
    """Saves `ett-tokenizer`, `ett-chat` and `ett-gen`, for images of 16 x 16 pixels and 4 x 4 codes; `shards`, the
    second with its weights in several files; and `ibq.ckpt`, a checkpoint of IBQ's own code."""
    torch.manual_seed(0)
    vision_tokenizer = _make_vision_tokenizer(width=8, levels=3, groups=4)
    vision_tokenizer.save_pretrained(folder / "ett-tokenizer")
    for name in ("ett-chat", "ett-gen"):
        tokenizer = build_word_tokenizer(WORDS)
        processor = ETTProcessor.from_parts(tokenizer, vision_tokenizer, image_size=IMAGE_SIZE)
        language_model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                bos_token_id=None,
            )
        )
        is_chat = name == "ett-chat"
        model = ETTForConditionalGeneration.from_parts(
            language_model,
            vision_tokenizer,
            processor,
            image_size=IMAGE_SIZE,
            visual_head=not is_chat,
            answers=is_chat,
        )
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        if is_chat:
            model.save_pretrained(folder / "shards", max_shard_size="20KB")
            processor.save_pretrained(folder / "shards")
    processor.image_processor.save_pretrained(folder / "ett-tokenizer")
    torch.save(_ibq_checkpoint(), folder / "ibq.ckpt")


def _make_vision_tokenizer(width: int, levels: int, groups: int) -> IBQModel:
    return IBQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(width,) * levels,
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        norm_num_groups=groups,
    )


def _ibq_checkpoint() -> dict[str, dict[str, torch.Tensor]]:
    """Weights and their moving average under the names of IBQ's own code, which has 32 groups of normalization."""
    state = _make_vision_tokenizer(width=32, levels=2, groups=32).state_dict()
    raw = {source_name(name, num_levels=2): tensor for name, tensor in state.items()}
    return {"state_dict": {**raw, **{EMA_PREFIX + name.replace(".", ""): tensor for name, tensor in raw.items()}}}


__all__ = ["IMAGE_SIZE", "WORDS", "save_models"]
