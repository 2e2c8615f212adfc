"""Text out of the model by all that `generate` of transformers offers, with no, one or several images in a text."""

import threading
from unittest import mock

import pytest
import torch
from PIL import Image
from transformers import ContinuousBatchingConfig, TextIteratorStreamer, TextStreamer
from transformers.generation import utils as generation_utils

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.processing_ett import ETTProcessor, build_word_tokenizer

PAD, END, IMAGE, IMAGE_START, IMAGE_END = 0, 1, 4, 5, 6
IMAGE_TOKENS = [IMAGE_START, *[IMAGE] * 16, IMAGE_END]
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def text(pixels):
    """One text of an image and two words."""
    return {"input_ids": torch.tensor([[*IMAGE_TOKENS, 10, 11]]), "pixel_values": pixels[:1]}


@pytest.fixture
def texts(pixels):
    """Three texts, of two images, none and one: each alone, and their batch, padded on the left."""
    rows = [[*IMAGE_TOKENS, 10, *IMAGE_TOKENS, 11], [12, 13, 14], [15, *IMAGE_TOKENS, 16]]
    input_ids = torch.tensor([[PAD] * (38 - len(row)) + row for row in rows])
    images = [pixels[:2], None, pixels[2:]]
    alone = [{"input_ids": torch.tensor([row]), "pixel_values": own} for row, own in zip(rows, images, strict=True)]
    return alone, {"input_ids": input_ids, "attention_mask": (input_ids > 0).long(), "pixel_values": pixels}


def written(model, inputs, **options):
    """The tokens that follow the inputs."""
    return model.generate(**inputs, **{**SIX, **options})[:, inputs["input_ids"].shape[1] :]


def test_answers_end_where_the_context_ends(make_language_model, make_model):
    model = make_model(make_language_model(max_position_embeddings=12))
    tokens = model.generate(torch.tensor([[10, 11, 12]]), max_new_tokens=10**9, min_new_tokens=100, do_sample=False)
    assert tokens.shape == (1, 12)


def as_(kind, model, inputs):
    """The inputs, with the images as pixels, codes or embeddings."""
    pixels = inputs["pixel_values"]
    if kind == "pixel_values" or pixels is None:
        return inputs
    with torch.no_grad():
        quantized = model.model.quantize_pixels(pixels)
    given = {"image_codes": quantized.codes, "codebook_embeds": quantized.embeddings.flatten(2).transpose(1, 2)}
    return {**inputs, "pixel_values": None, kind: given[kind]}


@torch.no_grad()
def with_images_in_it(model, inputs):
    """The embeddings of one text, with those of its images where they belong."""
    input_ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    embeddings = model.get_input_embeddings()(input_ids)
    if pixels is not None:
        embeddings[input_ids == IMAGE] = model.get_image_features(pixels).pooler_output.flatten(0, 1)
    return embeddings


every_kind = pytest.mark.parametrize("kind", ["pixel_values", "image_codes", "codebook_embeds"])


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logits_of_a_text(make_model, text, side):
    model, ids = make_model(), text["input_ids"]
    width = ids.shape[1]
    padded = torch.nn.functional.pad(ids, (3, 0) if side == "left" else (0, 3), value=PAD)
    mask = (padded > 0).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**text).logits
        options = {"attention_mask": mask, "position_ids": position_ids, "pixel_values": text["pixel_values"]}
        found = model(padded, **options).logits
    kept = slice(3, None) if side == "left" else slice(width)
    torch.testing.assert_close(found[:, kept], expected, rtol=0, atol=1e-5)


def test_padding_on_the_right_is_warned_of_since_texts_would_go_on_after_it(make_model):
    ids = torch.tensor([[10, 11, 12], [13, PAD, PAD]])
    for padded, warned in ((ids, True), (ids.flip(1), False)):
        with mock.patch.object(generation_utils.logger, "warning") as warn:
            make_model().generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=1)
        assert any("right-padding was detected" in call.args[0] for call in warn.call_args_list) == warned


# Beams and samples


def test_as_many_beams_as_words_find_the_best_pair_of_words(make_model, text):
    model = make_model()
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE]}
    options |= {"length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**text, num_beams=40, **options)
    with torch.no_grad():
        words = torch.tensor([word for word in range(40) if word not in (END, IMAGE)])
        pairs = torch.cat([text["input_ids"].repeat(38, 1), words.unsqueeze(1)], dim=1)
        logits = model(pairs, pixel_values=text["pixel_values"].repeat(38, 1, 1, 1)).logits.log_softmax(-1)
    scores = logits[0, -2, words].unsqueeze(1) + logits[:, -1, words]
    first, second = divmod(scores.argmax().item(), 38)
    assert found.sequences[0, -2:].tolist() == [words[first], words[second]]
    torch.testing.assert_close(found.sequences_scores[0], scores.max(), rtol=0, atol=1e-5)
    greedy = model.generate(**text, **options).sequences
    assert not torch.equal(greedy, found.sequences), "a search that is not needed shows nothing"


SCORES = {"return_dict_in_generate": True, "output_scores": True}
SCORED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@every_kind
def test_beams_are_those_of_each_text_alone_with_its_images_already_in_it(make_model, texts, kind):
    model, (alone, batch) = make_model(), texts
    options = {**SIX, **SCORED, "num_beams": 3, "num_return_sequences": 2}
    output = model.generate(**as_(kind, model, batch), **options)
    assert output.sequences.shape == (6, 38 + 6)
    for number, one in enumerate(alone):
        expected = model.generate(inputs_embeds=with_images_in_it(model, one), **options)
        answers = slice(2 * number, 2 * number + 2)
        assert torch.equal(output.sequences[answers, 38:], expected.sequences)
        torch.testing.assert_close(output.sequences_scores[answers], expected.sequences_scores, rtol=0, atol=1e-5)


@every_kind
def test_several_answers_are_those_to_the_text_repeated_with_its_images(make_model, texts, pixels, kind):
    model, (_, batch) = make_model(), texts
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in batch.items()}
    repeated["pixel_values"] = pixels[[0, 1, 0, 1, 2, 2]]
    outputs = []
    for inputs, number in ((batch, 2), (repeated, 1)):
        torch.manual_seed(0)
        options = {**SIX, **SCORED, "do_sample": True, "num_return_sequences": number}
        outputs.append(model.generate(**as_(kind, model, inputs), **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    assert not torch.equal(*outputs[0].sequences[:2]), "answers that are the same show nothing"


def test_several_answers_need_an_image_encoded_only_once(make_model, texts):
    model, (_, batch) = make_model(), texts
    encoded = []
    model.model.vision_tokenizer.encoder.register_forward_hook(lambda _, inputs, output: encoded.append(len(output)))
    written(model, batch, num_beams=3)
    assert encoded == [3]


def test_placeholders_and_codes_that_differ_in_number_are_an_error_in_the_numbers_that_were_given(make_model, texts):
    inputs = {**texts[1], "pixel_values": texts[1]["pixel_values"][:2]}
    with pytest.raises(ValueError, match=r"hold 48 image placeholders \(token 4\), but the 2 images have 32 codes"):
        written(make_model(), inputs, num_beams=2)


def test_sampling_is_repeated_by_its_seed(make_model, texts):
    model, (_, batch) = make_model(), texts
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(written(model, batch, do_sample=True, temperature=1.5, top_p=0.9))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


# What comes with the text


def test_scores_and_hidden_states_are_those_of_one_forward_pass(make_model, text):
    model = make_model()
    names = ("output_scores", "output_logits", "output_hidden_states", "return_dict_in_generate")
    output = model.generate(**text, **SIX, **dict.fromkeys(names, True))
    with torch.no_grad():
        whole = model(output.sequences, pixel_values=text["pixel_values"], output_hidden_states=True)
    assert IMAGE not in output.sequences[0, 20:]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), whole.logits[:, 19:-1], rtol=0, atol=1e-4)
    scores = whole.logits[:, 19:-1].clone()
    scores[..., END] = -torch.inf
    torch.testing.assert_close(torch.stack(output.scores, dim=1), scores, rtol=0, atol=1e-4)
    states = torch.cat([layers[-1] for layers in output.hidden_states], dim=1)
    torch.testing.assert_close(states, whole.hidden_states[-1][:, :-1], rtol=0, atol=1e-4)


def test_attentions_reach_back_to_the_image(make_model, text):
    model = make_model()
    model.set_attn_implementation("eager")
    output = model.generate(**text, **SIX, output_attentions=True, return_dict_in_generate=True)
    assert [attentions[0].shape[-1] for attentions in output.attentions] == [20, 21, 22, 23, 24, 25]
    assert (output.attentions[-1][0][..., 1:17] > 0).any()


# Words


@pytest.fixture
def processor():
    tokenizer = build_word_tokenizer(["what color is it?", "a red circle at the top", "a blue square"])
    return ETTProcessor.from_parts(tokenizer, 4, image_size=16)


@pytest.fixture
def speaker(make_model, make_language_model, processor):
    """A model of the processor's words, that writes no special tokens, and a question about an image."""
    tokenizer = processor.tokenizer
    model = make_model(
        make_language_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
    )
    model.generation_config.suppress_tokens = tokenizer.all_special_ids
    content = [
        {"type": "image", "image": Image.new("RGB", (16, 16), "red")},
        {"type": "text", "text": "what color is it?"},
    ]
    return model, [{"role": "user", "content": content}]


def prepared(processor, chat, **options):
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **options)


def test_a_streamer_prints_the_words_as_they_come(speaker, processor, capsys):
    model, question = speaker
    inputs = prepared(processor, question, add_generation_prompt=True)
    expected = processor.post_process_image_text_to_text(written(model, inputs))[0]
    model.generate(**inputs, **SIX, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == expected.split()
    assert len(expected.split()) > 1


def test_a_streamer_hands_words_to_another_thread(speaker, processor):
    model, question = speaker
    inputs = prepared(processor, question, add_generation_prompt=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **SIX, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = processor.post_process_image_text_to_text(written(model, inputs))[0]
    assert "".join(pieces).split() == expected.split()
    assert sum(bool(piece.strip()) for piece in pieces) > 1


def test_an_answer_that_was_begun_goes_on_as_it_would_have(speaker, processor):
    model, question = speaker
    answer = written(model, prepared(processor, question, add_generation_prompt=True))
    begun = processor.tokenizer.decode(answer[0, :2])
    chat = [*question, {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    inputs = prepared(processor, chat, continue_final_message=True)
    assert inputs["input_ids"][0, -2:].tolist() == answer[0, :2].tolist()
    assert written(model, inputs)[0, :4].tolist() == answer[0, 2:].tolist()


# Embeddings instead of tokens


def test_a_text_goes_on_from_embeddings_as_from_tokens_and_images(make_model, texts):
    model, (alone, _) = make_model(), texts
    for inputs in alone:
        found = model.generate(inputs_embeds=with_images_in_it(model, inputs), **SIX)
        assert torch.equal(found, written(model, inputs))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_images_beside_embeddings_go_where_their_placeholders_are(make_model, texts, num_beams):
    model, (alone, _) = make_model(), texts
    options = {**SIX, "num_beams": num_beams}
    for inputs in alone:
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        found = model.generate(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"], **options)
        expected = model.generate(**inputs, **options)
        assert torch.equal(found, expected[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_images_beside_embeddings_without_placeholders_are_an_error(make_model, text, num_beams):
    with pytest.raises(ValueError, match=r"hold 0 image placeholders \(token 4\)"):
        make_model().generate(
            inputs_embeds=torch.zeros(1, 20, 32),
            pixel_values=text["pixel_values"],
            num_beams=num_beams,
            max_new_tokens=1,
        )


# Other ways to the same text


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"num_beams": 2, "cache_implementation": "static"}],
    ids=["greedy", "beams"],
)
def test_a_static_cache_writes_what_a_dynamic_one_does(make_model, texts, options):
    model, (_, batch) = make_model(), texts
    expected = written(model, batch, num_beams=options.get("num_beams", 1))
    assert torch.equal(written(model, batch, **options), expected)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="an offloaded cache moves between an accelerator and the CPU"
)
def test_an_offloaded_cache_writes_what_a_dynamic_one_does(make_model, texts):
    model = make_model().cuda()
    batch = {name: value.cuda() for name, value in texts[1].items()}
    assert torch.equal(written(model, batch, cache_implementation="offloaded"), written(model, batch))


@pytest.mark.parametrize("guesser", ["prompt", "model"])
def test_guesses_that_are_checked_change_no_text(make_model, make_language_model, text, guesser):
    """Assisted decoding; an assistant sees the same inputs, and so is an ETT model, too."""
    model = make_model()
    assistant = make_model(make_language_model(seed=1))
    assistant.generation_config.num_assistant_tokens = 2
    options = {"prompt_lookup_num_tokens": 2} if guesser == "prompt" else {"assistant_model": assistant}
    assert torch.equal(written(model, text, **options), written(model, text))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_next_turn_goes_on_from_the_cache_of_the_last_one(make_model, text, name):
    model = make_model()
    first = model.generate(**text, **SIX, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
    assert IMAGE not in turn[0, 20:]
    expected = model.generate(turn, pixel_values=text["pixel_values"], **SIX)
    assert torch.equal(model.generate(turn, **{name: first.cache}, **SIX), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_long_text_is_read_in_chunks_also_in_half_precision(make_model, cache):
    model = make_model()
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    ids = {"input_ids": torch.arange(10, 30).unsqueeze(0)}
    found = written(model, ids, prefill_chunk_size=8, cache_implementation=cache)
    assert torch.equal(found, written(model, ids))


def test_an_image_cannot_be_read_in_chunks_and_transformers_says_so(make_model, text):
    with pytest.raises(ValueError, match=r"Chunked prefill cannot split .*pixel_values"):
        written(make_model(), text, prefill_chunk_size=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuous_batching_writes_texts_without_images(make_model, tmp_path, dtype):
    """`generate_batch` takes tokens and nothing else, so that images do not apply."""
    make_model().save_pretrained(tmp_path)
    model = ETTForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    rows = [[10, 11, 12], [13, 14, 15, 16]]
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    output = model.generate_batch(rows, model.generation_config, small, progress_bar=False)
    found = [output[key].generated_tokens for key in sorted(output)]
    assert found == [model.generate(torch.tensor([row]))[0, len(row) :].tolist() for row in rows]


# Compilation


# The encoder takes inductor long, and changes nothing in what it is to show.
@pytest.mark.parametrize(("backend", "kind"), [("aot_eager", "pixel_values"), ("inductor", "image_codes")])
def test_compiled_in_one_graph_it_has_the_same_logits(make_model, text, backend, kind):
    model = make_model()
    compiled, inputs = torch.compile(model, fullgraph=True, backend=backend), as_(kind, model, text)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)


def test_compiled_steps_with_a_static_cache_write_the_same_text(make_model, text):
    model = make_model()
    expected = written(model, text)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(written(model, text, cache_implementation="static"), expected)


# Attention


@torch.no_grad()
def read(model, batch, attention):
    """Logits of a batch, but not those of padding."""
    model.set_attn_implementation(attention)
    assert model.model.language_model.config._attn_implementation == attention
    return model(**batch).logits[batch["attention_mask"] == 1]


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_texts_are_read_the_same_by_every_kind_of_attention(make_model, texts, attention):
    model, (_, batch) = make_model(), texts
    torch.testing.assert_close(read(model, batch, attention), read(model, batch, "sdpa"), rtol=0, atol=1e-4)


FLEX = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="with a static cache, torch's FlexAttention on a CPU has wrong values in any language model",
)


@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=FLEX)])
def test_images_are_drawn_the_same_by_every_kind_of_attention(make_model, attention):
    model = make_model().to("cuda" if torch.cuda.is_available() else "cpu")
    input_ids = torch.tensor([[PAD, 10, IMAGE_START], [11, 12, IMAGE_START]], device=model.device)
    options = {"generation_mode": "image", "do_sample": False, **SCORES}
    scores = []
    for name in ("sdpa", attention):
        model.set_attn_implementation(name)
        scores.append(model.generate(input_ids, attention_mask=(input_ids > 0).long(), **options).scores)
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-4)


# A larger vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_new_words_change_nothing_for_the_old_ones(make_model, make_language_model, text, tmp_path, tied):
    model = make_model(make_language_model(tie_word_embeddings=tied))
    with torch.no_grad():
        expected = model(**text).logits
        model.resize_token_embeddings(48)
        assert model.config.text_config.vocab_size == 48
        grown = model(**text).logits
        assert grown.shape[-1] == 48
        torch.testing.assert_close(grown[..., :40], expected, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        loaded = ETTForConditionalGeneration.from_pretrained(tmp_path)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        assert torch.equal(loaded(**text).logits, grown)
        new = torch.cat([text["input_ids"], torch.tensor([[47]])], dim=1)
        assert loaded(new, pixel_values=text["pixel_values"], labels=new).loss.isfinite()
