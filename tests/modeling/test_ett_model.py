"""The model: three ways in for images, one gradient from captions to the tokenizer, exact folders."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ett.modeling_ett.configuration_ett import ETTConfig
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration, ETTModel

IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6
IGNORED = -100


@pytest.fixture
def inputs():
    """Two texts of an image (16 codes) and five words, with the words as labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor([[IMAGE_START, *[IMAGE] * 16, IMAGE_END]]).repeat(2, 1)
    words = torch.randint(10, 40, (2, 5), generator=generator)
    return {
        "input_ids": torch.cat([image, words], dim=1),
        "pixel_values": torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1,
        "labels": torch.cat([torch.full_like(image, IGNORED), words], dim=1),
    }


def logits(model, inputs, **images):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], **images).logits


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_pixels_codes_and_embeddings_give_the_same_logits(make_model, make_vision_tokenizer, inputs, l2_normalize):
    model = make_model(vision_tokenizer=make_vision_tokenizer(l2_normalize=l2_normalize))
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        quantized = model.model.quantize_pixels(pixels)
    embeddings = quantized.embeddings.flatten(2).transpose(1, 2)
    expected = logits(model, inputs, pixel_values=pixels)
    assert torch.equal(logits(model, inputs, image_codes=quantized.codes), expected)
    assert torch.equal(logits(model, inputs, codebook_embeds=embeddings), expected)


def test_other_pixels_give_other_logits(make_model, inputs):
    model, pixels = make_model(), inputs["pixel_values"]
    difference = logits(model, inputs, pixel_values=pixels) - logits(model, inputs, pixel_values=-pixels)
    assert bool((difference[:, -1].abs().amax(dim=-1) > 1e-2).all())


def test_images_stand_in_order_of_their_placeholders(make_model, inputs):
    model, pixels = make_model(), inputs["pixel_values"]
    both = logits(model, inputs, pixel_values=pixels)
    first = logits(model, {"input_ids": inputs["input_ids"][:1]}, pixel_values=pixels[:1])
    torch.testing.assert_close(both[:1], first, rtol=0, atol=1e-5)


def test_text_alone_has_the_logits_of_the_language_model(make_model, make_language_model):
    language_model = make_language_model()
    model = make_model(language_model)
    ids = torch.randint(10, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, language_model(ids).logits, rtol=0, atol=0)


def reached(model):
    parameters = model.model.vision_tokenizer.named_parameters()
    return {name for name, parameter in parameters if parameter.grad is not None and parameter.grad.abs().sum() > 0}


def test_the_caption_loss_reaches_encoder_codebook_and_quant_conv(make_model, inputs):
    model = make_model().train()
    model(**inputs).loss.backward()
    names = {name for name, _ in model.model.vision_tokenizer.named_parameters()}
    assert reached(model) == {name for name in names if name.startswith(("encoder.", "quantize.", "quant_conv."))}
    assert bool((model.model.vision_tokenizer.quantize.embedding.weight.grad.abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize("given", ["pixel_values", "image_codes"])
def test_detached_embeddings_keep_the_caption_loss_from_the_tokenizer_alone(make_model, inputs, given):
    gradients = []
    for detach in (False, True):
        model = make_model().train()
        images = {"pixel_values": inputs["pixel_values"]}
        if given == "image_codes":
            images = {"image_codes": model.model.quantize_pixels(**images).codes}
        labelled = {name: inputs[name] for name in ("input_ids", "labels")}
        model(**labelled, **images, detach_codebook_embeds=detach).loss.backward()
        assert bool(reached(model)) is not detach
        parts = (model.model.projector, model.model.language_model)
        gradients.append([parameter.grad for part in parts for parameter in part.parameters()])
    assert all(torch.equal(cut, whole) for whole, cut in zip(*gradients, strict=True))


def test_with_indices_the_caption_loss_does_not_reach_the_tokenizer(make_model, inputs):
    model = make_model(visual_embedding="index").train()
    model(**inputs).loss.backward()
    assert reached(model) == set()
    assert model.model.index_embedding.weight.grad.abs().sum() > 0


def test_with_indices_the_language_model_sees_a_row_of_its_own_width_for_each_code(make_model):
    model = make_model(visual_embedding="index").model
    codes = torch.tensor([[[3, 0], [31, 3]]])
    features = model.get_image_features(image_codes=codes).pooler_output
    assert torch.equal(features, model.index_embedding.weight[[3, 0, 31, 3]].unsqueeze(0))
    assert model.index_embedding.weight.shape == (32, 32) and not hasattr(model, "projector")


def test_index_embeddings_start_as_the_language_models_tokens_do(make_model, make_vision_tokenizer):
    model = make_model(vision_tokenizer=make_vision_tokenizer(num_vq_embeddings=2000), visual_embedding="index")
    assert model.model.index_embedding.weight.std().item() == pytest.approx(0.3, rel=0.02)


def test_with_indices_the_codes_matter_and_the_codebook_does_not(make_model, inputs):
    model = make_model(visual_embedding="index")
    with torch.no_grad():
        codes = model.model.quantize_pixels(inputs["pixel_values"]).codes
    expected = logits(model, inputs, image_codes=codes)
    assert torch.equal(logits(model, inputs, pixel_values=inputs["pixel_values"]), expected)
    assert not torch.allclose(logits(model, inputs, image_codes=codes.flip(-1)), expected)
    model.model.vision_tokenizer.quantize.embedding.weight.data.neg_()
    assert torch.equal(logits(model, inputs, image_codes=codes), expected)
    with pytest.raises(ValueError, match="own embedding for each code"):
        logits(model, inputs, codebook_embeds=torch.zeros(2, 16, 8))


def test_a_frozen_tokenizer_gets_no_graph_and_no_losses(make_model, inputs):
    model = make_model().train()
    model.model.vision_tokenizer.requires_grad_(False)
    output = model(**inputs)
    assert not output.quantized.embeddings.requires_grad
    assert output.quantized.quantization_loss is None


def test_the_caption_loss_is_the_mean_cross_entropy_of_the_next_words(make_model, inputs):
    output = make_model()(**inputs)
    scores, words = output.logits[:, 17:-1].flatten(0, 1), inputs["input_ids"][:, 18:].flatten()
    expected = torch.nn.functional.cross_entropy(scores, words)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-6)


def test_each_code_is_scored_by_the_state_before_it(make_model):
    model = make_model()
    ids = torch.tensor([[0, 0, 11, IMAGE_START, *[IMAGE] * 16], [10, 11, 12, IMAGE_START, *[IMAGE] * 16]])
    codes = torch.randint(0, 32, (2, 4, 4))
    with torch.no_grad():
        output = model(ids, image_codes=codes, predict_codes=True, output_hidden_states=True)
        expected = model.visual_head(output.hidden_states[-1][:, 3:-1]).flatten(0, 1)
    assert output.logits is None
    torch.testing.assert_close(output.code_logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(expected, codes.flatten()))


def test_the_score_of_a_code_does_not_depend_on_it_or_on_later_ones(make_model):
    model = make_model()
    ids = torch.tensor([[10, IMAGE_START, *[IMAGE] * 16]])
    codes = torch.randint(0, 32, (1, 4, 4))
    changed = codes.clone().flatten()
    changed[9:] = (changed[9:] + 1) % 32
    with torch.no_grad():
        before = model(ids, image_codes=codes, predict_codes=True).code_logits
        after = model(ids, image_codes=changed.view(1, 4, 4), predict_codes=True).code_logits
    assert torch.equal(before[:10], after[:10])
    assert not torch.allclose(before[10], after[10])


def test_the_reconstruction_is_the_tokenizers(make_model, inputs):
    model = make_model()
    with torch.no_grad():
        output = model(**inputs, return_reconstruction=True)
        expected = model.model.vision_tokenizer(inputs["pixel_values"]).sample
    assert torch.equal(output.reconstruction, expected)


def test_a_reconstruction_without_pixels_is_an_error(make_model, inputs):
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="without pixel_values"):
        make_model()(inputs["input_ids"], image_codes=codes, return_reconstruction=True)


def test_placeholders_and_codes_that_differ_in_number_are_an_error_that_tells_both(make_model, inputs):
    with pytest.raises(ValueError, match=r"hold 32 image placeholders \(token 4\), but the 1 images have 16 codes"):
        make_model()(inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])


def test_images_without_placeholders_are_an_error(make_model, inputs):
    with pytest.raises(ValueError, match="hold 0 image placeholders"):
        make_model()(torch.tensor([[10, 11]]), pixel_values=inputs["pixel_values"])


def test_images_given_twice_are_an_error(make_model, inputs):
    with pytest.raises(ValueError, match="given: pixel_values, image_codes"):
        make_model()(inputs["input_ids"], pixel_values=inputs["pixel_values"], image_codes=torch.zeros(2, 4, 4).long())


def assert_same_weights(model, other, prefix=""):
    weights = other.state_dict()
    assert weights
    assert all(torch.equal(value, model.state_dict()[prefix + name]) for name, value in weights.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("visual_embedding", ["codebook", "index"])
def test_saved_and_loaded_it_is_the_same(make_model, make_language_model, inputs, tmp_path, tied, visual_embedding):
    model = make_model(make_language_model(tie_word_embeddings=tied), visual_embedding=visual_embedding)
    model.save_pretrained(tmp_path)
    loaded, notes = ETTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_same_weights(model, loaded)
    assert torch.equal(logits(loaded, inputs, pixel_values=inputs["pixel_values"]), model(**inputs).logits)


def test_the_model_without_heads_loads_from_the_full_folder(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded, notes = ETTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert_same_weights(model, loaded, prefix="model.")


def test_loaded_in_half_precision_the_tokenizer_stays_in_single(make_model, inputs, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = ETTForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.vision_tokenizer.parameters()} == {torch.float32}
    assert loaded.lm_head.weight.dtype == loaded.model.projector.linear_1.weight.dtype == torch.bfloat16
    with torch.no_grad():
        output = loaded(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        assert torch.equal(output.quantized.codes, model.model.quantize_pixels(inputs["pixel_values"]).codes)
    assert output.logits.dtype == torch.bfloat16


def test_under_autocast_a_frozen_tokenizer_gives_the_codes_of_single_precision(make_model, make_vision_tokenizer):
    model = make_model(vision_tokenizer=make_vision_tokenizer(num_vq_embeddings=2000)).train()
    model.model.vision_tokenizer.requires_grad_(False)
    pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.model.quantize_pixels(pixels).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.model.vision_tokenizer.encode(pixels).latents
        assert not torch.equal(model.model.vision_tokenizer.quantize(latents).codes, expected)
        assert torch.equal(model.model.quantize_pixels(pixels).codes, expected)


def test_new_weights_are_initialised_and_the_tokenizers_are_its_own(make_model):
    model = make_model()
    fresh = ETTForConditionalGeneration(model.config)
    codebook = fresh.model.vision_tokenizer.quantize.embedding.weight
    assert 0.8 < codebook.std() < 1.2, "an embedding of the language model would have its initializer_range, 0.3"
    assert 0 < fresh.visual_head.weight.std() < 1


def test_parts_keep_their_weights(make_model, make_language_model, make_vision_tokenizer):
    language_model, vision_tokenizer = make_language_model(seed=5), make_vision_tokenizer(seed=6)
    model = make_model(language_model, vision_tokenizer)
    assert_same_weights(model.model.language_model, language_model.model)
    assert_same_weights(model.model.vision_tokenizer, vision_tokenizer)


FAMILIES = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    "SmolLM3": {},
    "GPTNeoX": {"tie_word_embeddings": False},
    "GPT2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_language_model_reads_draws_and_loads(make_model, make_language_model, inputs, tmp_path, family):
    language_model = make_language_model(family, **FAMILIES[family])
    model = make_model(language_model)
    words = inputs["input_ids"][:, 18:]
    with torch.no_grad():
        torch.testing.assert_close(model(words).logits, language_model(words).logits, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = ETTForConditionalGeneration.from_pretrained(tmp_path)
    expected = logits(model, inputs, pixel_values=inputs["pixel_values"])
    assert torch.equal(logits(loaded, inputs, pixel_values=inputs["pixel_values"]), expected)
    drawn = loaded.generate(torch.tensor([[10, IMAGE_START]]), generation_mode="image", image_size=(8, 8))
    assert tuple(drawn.shape) == (1, 2, 2)


def test_parts_of_the_wrong_kind_are_an_error(make_language_model, make_vision_tokenizer):
    with pytest.raises(TypeError, match="Qwen2Model has no language-modelling head; load it with AutoModel"):
        ETTForConditionalGeneration.from_parts(make_language_model().model, make_vision_tokenizer())
    with pytest.raises(TypeError, match="vision_tokenizer is a Linear; expected an IBQModel"):
        ETTForConditionalGeneration.from_parts(make_language_model(), torch.nn.Linear(2, 2))


def test_the_language_model_can_come_from_a_folder(make_model, make_language_model, inputs, tmp_path):
    language_model = make_language_model()
    language_model.save_pretrained(tmp_path)
    model = make_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    expected = logits(make_model(language_model), inputs, pixel_values=inputs["pixel_values"])
    assert torch.equal(logits(model, inputs, pixel_values=inputs["pixel_values"]), expected)


def test_gradient_checkpointing_changes_no_gradient(make_model, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.model.language_model.layers[0].gradient_checkpointing
            assert model.model.vision_tokenizer.encoder.gradient_checkpointing
        output = model(**inputs, return_reconstruction=True)
        (output.loss + output.reconstruction.abs().mean() + output.quantized.quantization_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_the_configuration_keeps_only_what_it_was_given_of_the_tokenizer():
    config = ETTConfig(vq_config={"patch_size": 2})
    assert config.vq_config == {"patch_size": 2}
    assert config.text_config.model_type == "qwen2"
    assert ETTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def config_with_context(length):
    return ETTConfig(text_config={"model_type": "qwen2", "max_position_embeddings": length})


def test_a_prompt_fits_the_context_if_a_token_of_the_answer_does():
    config_with_context(4).check_context(3)
    message = r"^The prompt has 4 tokens, images included, and the language model's context ends at 4; shorten it\.$"
    with pytest.raises(ValueError, match=message):
        config_with_context(4).check_context(4)


def test_a_drawing_fits_the_context_if_its_last_code_does():
    config_with_context(8).check_context(2, num_codes=6)
    with pytest.raises(ValueError, match="The prompt has 2 tokens and the image 7 codes, together more than the 8"):
        config_with_context(8).check_context(2, num_codes=7)


def test_a_language_model_without_a_limit_has_context_for_everything():
    ETTConfig(text_config={"model_type": "mamba"}).check_context(1, num_codes=10**9)


@pytest.fixture
def positioned(make_model):
    return make_model(code_positions=True)


def test_code_positions_add_the_row_and_the_column_of_each_code(positioned):
    features = positioned.model.get_image_features(image_codes=torch.zeros(1, 2, 3, dtype=torch.long)).pooler_output[0]
    assert len(features.unique(dim=0)) == 6
    down, right = features[3] - features[0], features[1] - features[0]
    torch.testing.assert_close(features[4] - features[1], down)
    torch.testing.assert_close(features[4] - features[3], right)


def test_codes_one_at_a_time_have_the_positions_of_the_whole_image(positioned):
    codes = torch.arange(12).view(1, 3, 4)
    whole = positioned.model.get_image_features(image_codes=codes).pooler_output
    for place, code in enumerate(codes.flatten()):
        one = positioned.model.embed_codes(code.view(1, 1), torch.tensor([place]), width=4)
        torch.testing.assert_close(one[0, 0], whole[0, place])


def test_embeddings_of_a_square_image_have_the_positions_of_its_codes(positioned):
    codes = torch.arange(16).view(1, 4, 4)
    embeddings = positioned.model.vision_tokenizer.codes_to_embeddings(codes).flatten(2).transpose(1, 2)
    features = [
        positioned.model.get_image_features(**image).pooler_output
        for image in ({"image_codes": codes}, {"codebook_embeds": embeddings})
    ]
    torch.testing.assert_close(*features)
    with pytest.raises(ValueError, match="codebook_embeds hold 12 codes an image"):
        positioned.model.get_image_features(codebook_embeds=embeddings[:, :12])


def test_images_of_more_codes_than_there_are_positions_are_refused(positioned):
    side = positioned.config.image_size // positioned.model.vision_tokenizer.spatial_factor
    with pytest.raises(ValueError, match=f"1 x {side + 1} codes, and this model's code_positions end at {side} x"):
        positioned.model.get_image_features(image_codes=torch.zeros(1, 1, side + 1, dtype=torch.long))
    positioned.model.get_image_features(image_codes=torch.zeros(1, 1, side, dtype=torch.long))
    factor = positioned.model.vision_tokenizer.spatial_factor
    with pytest.raises(ValueError, match="choose a smaller image"):
        positioned.generate(torch.tensor([[11]]), generation_mode="image", image_size=(factor, (side + 1) * factor))


def test_code_positions_are_refused_without_a_projector(make_model):
    with pytest.raises(ValueError, match="code_positions are part of the projector"):
        make_model(code_positions=True, visual_embedding="index")


def test_generation_feeds_codes_back_with_their_positions(positioned):
    start = positioned.config.image_start_token_id
    prompt = torch.tensor([[11, 12, start]])
    output = positioned.generate(
        prompt,
        generation_mode="image",
        do_sample=False,
        guidance_scale=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = output.sequences
    ids = torch.cat([prompt, torch.full((1, codes.numel()), positioned.config.image_token_id)], dim=1)
    with torch.no_grad():
        logits = positioned(input_ids=ids, image_codes=codes, predict_codes=True, skip_logits=False).code_logits
    torch.testing.assert_close(output.scores[0], logits, atol=1e-4, rtol=1e-4)


# transformers' conventions


def test_image_features_are_given_as_every_model_of_transformers_gives_them(make_model, inputs):
    model = make_model().eval()
    pixels, codes = inputs["pixel_values"], model.model.vision_tokenizer.encode_codes(inputs["pixel_values"])
    features = model.get_image_features(pixels, return_dict=True)
    assert isinstance(features, BaseModelOutputWithPooling)
    assert torch.equal(features.quantized.codes, codes)
    embeddings = model.model.vision_tokenizer.codes_to_embeddings(codes).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.last_hidden_state, embeddings)
    assert len(features.pooler_output) == len(pixels)
    assert torch.equal(model.get_image_features(pixels, return_dict=False)[1], features.pooler_output)


@pytest.mark.parametrize("part", ["model", "whole"])
def test_without_return_dict_outputs_are_tuples_of_the_same_values(make_model, inputs, part):
    model = make_model().eval()
    model = model.model if part == "model" else model
    expected, found = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected.to_tuple())
    assert torch.equal(found[0], expected[0])


def test_images_find_their_places_among_embeddings(make_model, inputs):
    model = make_model().eval()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    expected = model(input_ids=ids, pixel_values=pixels).logits
    found = model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels).logits
    assert torch.equal(found, expected)


def test_labels_that_are_shifted_already_give_the_same_loss(make_model, inputs):
    model = make_model().eval()
    labels = inputs.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_head_keeps_its_values(make_model, make_language_model, tied):
    model = make_model(make_language_model(tie_word_embeddings=tied))
    model.resize_token_embeddings(48)
    expected = model.lm_head.weight.clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, expected)


def test_engines_are_not_told_to_drop_a_head_of_its_own(make_model, make_language_model):
    names = make_model(make_language_model(tie_word_embeddings=False)).state_dict()
    dropped = [name for name in names for rule in ETTModel._keys_to_ignore_on_load_unexpected if re.search(rule, name)]
    assert dropped == ["visual_head.weight"]
