"""Tiny data for training: prepared examples for models of 40 tokens, and a processor for the scenes."""

import datasets
import pytest
import torch

from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import ETTProcessor, build_word_tokenizer
from ett.scenes_ett import WORDS, vocabulary
from ett.train import ETTTrainingArguments
from ett.train.models.building import join, new_language_model
from ett.train.recipes import ModelSection

IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6
IGNORED = -100


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Datasets read by a test are not kept for the next one, nor in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def arguments(tmp_path):
    """Makes training arguments of two steps of two examples on the CPU, without perceptual loss."""

    def make(**changes):
        fields = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "perceptual_weight": 0.0,
            "discriminator_width": 8,
            "discriminator_layers": 1,
            "seed": 3,
        }
        return ETTTrainingArguments(**{**fields, **changes})

    return make


@pytest.fixture
def make_items():
    """Makes prepared examples: an image of 16 x 16 pixels, or its 16 codes, and a caption of one to five words."""

    def make(count=4, codes=False):
        generator = torch.Generator().manual_seed(0)
        items = []
        for index in range(count):
            image = [IMAGE_START, *[IMAGE] * 16, IMAGE_END]
            words = torch.randint(10, 40, (1 + 3 * index % 5,), generator=generator).tolist()
            pixels = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
            item = {"input_ids": image + words, "labels": [IGNORED] * len(image) + words}
            if codes:
                item["image_codes"] = pixels[:, 0, ::4, ::4].long() % 32
            else:
                item["pixel_values"] = pixels
            items.append(item)
        return items

    return make


@pytest.fixture(scope="session")
def processor():
    """A processor with every word of the scenes, for images of 72 x 72 pixels and 9 x 9 codes."""
    return ETTProcessor.from_parts(build_word_tokenizer(vocabulary(), WORDS), 8, image_size=72)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of an untrained ETT model with the scenes' words."""
    torch.manual_seed(0)
    tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        norm_num_groups=4,
        patch_size=2,
    )
    words = build_word_tokenizer(vocabulary())
    processor = ETTProcessor.from_parts(words, tokenizer.spatial_factor, 16)
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    language_model = new_language_model({**fields, "num_key_value_heads": 2}, words)
    folder = tmp_path_factory.mktemp("base") / "model"
    join(language_model, tokenizer, processor, ModelSection(image_size=16)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
