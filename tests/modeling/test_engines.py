"""What production engines call: the processor and the base model exactly as the transformers backend of vLLM does."""

from importlib.metadata import entry_points

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel

from ett import ETTProcessor
from ett.processing_ett import build_word_tokenizer
from ett.registration import register

WORDS = ["a", "red", "circle", "what", "is", "it"]


@pytest.fixture
def processor(make_vision_tokenizer):
    factor = make_vision_tokenizer().spatial_factor
    return ETTProcessor.from_parts(build_word_tokenizer(WORDS), factor, image_size=16)


@pytest.fixture
def folder(make_model, make_language_model, processor, tmp_path):
    """A model with an untied head, whose vision tokenizer has attention."""
    language_model = make_language_model(vocab_size=len(processor.tokenizer), tie_word_embeddings=False)
    make_model(
        language_model,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(processor):
    images = [Image.new("RGB", (20, 16), "red"), Image.new("RGB", (8, 30), "blue")]
    text = f"what is {processor.image_token} a {processor.image_token} red circle"
    options = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True}
    return images, text, processor(images=images, text=text, return_tensors="pt", **options)


def test_the_processor_says_how_many_tokens_images_take_and_where_they_stand(processor, inputs):
    images, text, made = inputs
    sizes = [[image.height, image.width] for image in images]
    numbers = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert numbers["num_image_tokens"] == [16, 16] and numbers["num_image_patches"] == [1, 1]
    places = torch.where(made["mm_token_type_ids"][0] == 1)[0]
    assert torch.equal(made["input_ids"][0, places], torch.full((32,), processor.image_token_id))
    for own in torch.split(places, numbers["num_image_tokens"]):
        assert torch.equal(own, torch.arange(own[0], own[0] + 16)), "the tokens of an image stand together"
    assert processor._get_num_multimodal_tokens(image_sizes=sizes[:1], size={"height": 8, "width": 16})[
        "num_image_tokens"
    ] == [8]
    for offset in made["text_replacement_offsets"][0]:
        start, end = offset["span"]
        assert text[start:end] == processor.image_token and offset["replacement"] == processor.image_placeholder()


def test_the_base_model_and_the_head_give_what_the_model_gives(folder, processor, inputs):
    from ett import ETTForConditionalGeneration

    whole = ETTForConditionalGeneration.from_pretrained(folder).eval()
    base = AutoModel.from_pretrained(folder).eval()
    head = dict(whole.state_dict())["lm_head.weight"]
    made = inputs[2]
    with torch.no_grad():
        features = base.get_image_features(made["pixel_values"], return_dict=True).pooler_output
        embeddings = base.get_input_embeddings()(made["input_ids"])
        mask = made["input_ids"] == processor.image_token_id
        embeddings[mask] = torch.cat([one.flatten(0, -2) for one in torch.split(features, [1, 1])])
        positions = torch.arange(made["input_ids"].shape[1])[None]
        hidden = base(
            input_ids=None, inputs_embeds=embeddings, position_ids=positions, use_cache=False, return_dict=False
        )[0]
        expected = whole(input_ids=made["input_ids"], pixel_values=made["pixel_values"]).logits
    torch.testing.assert_close(hidden @ head.T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", [False, True])
def test_codes_stay_the_same_when_every_linear_layer_is_cast(make_model, make_vision_tokenizer, attention):
    model = make_model(vision_tokenizer=make_vision_tokenizer(mid_block_add_attention=attention))
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.model.vision_tokenizer.encode_codes(pixels)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    assert torch.equal(model.model.vision_tokenizer.encode_codes(pixels), expected)
    assert model.get_image_features(pixels).pooler_output.dtype == torch.bfloat16


def test_vllm_finds_the_registration():
    (plugin,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "ett"]
    assert plugin.load() is register
