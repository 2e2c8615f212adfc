"""However a model is cast after it was loaded, its vision tokenizer stays in float32 and gives the same codes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6
CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to dtype": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to dtype by name": (lambda model: model.to(dtype=torch.float16), torch.float16),
    "to device and dtype": (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    "to a tensor": (lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "type": (lambda model: model.type(torch.bfloat16), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "half and back": (lambda model: model.half().float(), torch.float32),
    "base model": (
        lambda model: (model.model.bfloat16(), model.lm_head.bfloat16(), model.visual_head.bfloat16()),
        None,
    ),
}


@pytest.fixture
def pixels():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def model(make_model, make_vision_tokenizer):
    """With so many codes that rounding to half precision changes some."""
    return make_model(vision_tokenizer=make_vision_tokenizer(num_vq_embeddings=4000))


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_vision_tokenizer_and_its_codes_alone(model, pixels, cast):
    tokenizer, (function, dtype) = model.model.vision_tokenizer, CASTS[cast]
    before, names = weights(tokenizer), [name for name, _ in model.named_parameters()]
    expected = model.model.quantize_pixels(pixels).codes
    images = model.decode_image_tokens(expected)
    function(model)
    assert dtypes(tokenizer) == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert torch.equal(model.model.quantize_pixels(pixels).codes, expected)
    assert torch.equal(model.decode_image_tokens(expected), images)
    assert [name for name, _ in model.named_parameters()] == names
    dtype = torch.bfloat16 if dtype is None else dtype
    for part in (model.model.language_model, model.model.projector, model.lm_head, model.visual_head):
        assert dtypes(part) == {dtype}
    ids = torch.tensor([[IMAGE_START, *[IMAGE] * 16, IMAGE_END, 10, 11]])
    with torch.no_grad():
        assert model(ids, pixel_values=pixels[:1]).logits.dtype == dtype
    drawing = model.generate(torch.tensor([[10, IMAGE_START]]), generation_mode="image", image_size=(8, 8))
    assert tuple(drawing.shape) == (1, 2, 2)


def test_a_vision_tokenizer_that_was_cast_by_itself_gives_other_codes_and_returns_to_float32(model, pixels):
    tokenizer = model.model.vision_tokenizer
    expected = tokenizer.encode_codes(pixels)
    assert not torch.equal(tokenizer.bfloat16().encode_codes(pixels.bfloat16()), expected)
    model.float()
    assert dtypes(tokenizer) == {torch.float32}


def test_evaluation_in_half_precision_keeps_the_codes(model, pixels, tmp_path):
    expected = model.model.quantize_pixels(pixels).codes
    ids = torch.tensor([IMAGE_START, *[IMAGE] * 16, IMAGE_END, 10, 11])
    rows = [{"input_ids": ids, "labels": ids, "pixel_values": image[None]} for image in pixels[:2]]

    def collate(items):
        batch = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "labels")}
        return {**batch, "pixel_values": torch.cat([item["pixel_values"] for item in items])}

    arguments = TrainingArguments(
        tmp_path, use_cpu=True, bf16_full_eval=True, report_to="none", prediction_loss_only=True
    )
    Trainer(model, arguments, data_collator=collate, eval_dataset=rows).evaluate()
    assert model.dtype == torch.bfloat16
    assert dtypes(model.model.vision_tokenizer) == {torch.float32}
    assert torch.equal(model.model.quantize_pixels(pixels).codes, expected)
