"""Text and images out of the model: the fast ways equal the slow ones."""

import copy
import math
import shutil

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList

PAD, IMAGE, IMAGE_START, IMAGE_END = 0, 4, 5, 6
IMAGE_TOKENS = [IMAGE_START, *[IMAGE] * 16, IMAGE_END]
GREEDY = {"generation_mode": "image", "do_sample": False}


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def prompts():
    """Three drawing prompts of unequal length, and their batch, padded on the left."""
    rows = [[10, 11, 12, 13, IMAGE_START], [20, IMAGE_START], [30, 31, 32, IMAGE_START]]
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return [torch.tensor([row]) for row in rows], {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


# Text


def test_text_with_the_cache_equals_text_without(make_model, pixels):
    model = make_model()
    ids = torch.tensor([[*IMAGE_TOKENS, 10, 11], [*IMAGE_TOKENS, 12, 13]])
    options = {"pixel_values": pixels, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    fast, slow = (model.generate(ids, **options, use_cache=use_cache) for use_cache in (True, False))
    assert fast.shape == (2, 26)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("images", ["pixel_values", "image_codes", "codebook_embeds"])
def test_text_from_every_kind_of_image_is_the_same(make_model, pixels, images):
    model = make_model()
    ids = torch.tensor([[*IMAGE_TOKENS, 10, 11], [*IMAGE_TOKENS, 12, 13]])
    quantized = model.model.quantize_pixels(pixels)
    given = {
        "pixel_values": pixels,
        "image_codes": quantized.codes,
        "codebook_embeds": quantized.embeddings.detach().flatten(2).transpose(1, 2),
    }
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, pixel_values=pixels, **options)
    assert torch.equal(model.generate(ids, **{images: given[images]}, **options), expected)
    assert not torch.equal(model.generate(ids, pixel_values=-pixels, **options), expected)


def test_a_batch_padded_on_the_left_writes_what_each_text_alone_does(make_model, pixels):
    model = make_model()
    short, long = [*IMAGE_TOKENS, 10], [14, 15, *IMAGE_TOKENS, 12, 13]
    ids = torch.tensor([[PAD] * (len(long) - len(short)) + short, long])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batch = model.generate(ids, attention_mask=(ids > 0).long(), pixel_values=pixels, **options)
    for row, (text, image) in enumerate(zip((short, long), pixels.split(1), strict=True)):
        alone = model.generate(torch.tensor([text]), pixel_values=image, **options)
        assert batch[row, -6:].tolist() == alone[0, -6:].tolist()


# Images


@torch.no_grad()
def draw_slowly(model, prompt, num_codes, guidance_scale):
    """One image, greedily, everything computed anew for each code: no cache, no batch, no padding."""
    codes = []
    for _ in range(num_codes):
        scores = []
        for ids in (prompt, prompt[:, -1:]):
            embeddings = model.get_input_embeddings()(ids)
            if codes:
                drawn = model.model.embed_codes(torch.tensor([codes]), torch.arange(len(codes)), width=4)
                embeddings = torch.cat([embeddings, drawn], dim=1)
            hidden_states = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            scores.append(model.visual_head(hidden_states[:, -1]))
        conditional, empty = scores
        codes.append((empty + guidance_scale * (conditional - empty)).argmax().item())
    return torch.tensor(codes)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("visual_embedding", ["codebook", "index"])
def test_a_drawing_equals_the_one_computed_anew_for_each_code(make_model, prompts, guidance_scale, visual_embedding):
    model, (rows, _) = make_model(visual_embedding=visual_embedding), prompts
    codes = model.generate(rows[0], **GREEDY, guidance_scale=guidance_scale)
    assert codes.shape == (1, 4, 4)
    assert codes.unique().numel() > 2, "a drawing of one code shows nothing"
    assert torch.equal(codes.flatten(), draw_slowly(model, rows[0], 16, guidance_scale))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_of_prompts_draws_what_each_alone_does(make_model, prompts, guidance_scale):
    model, (rows, batch) = make_model(), prompts
    drawn = model.generate(**batch, **GREEDY, guidance_scale=guidance_scale)
    alone = [model.generate(row, **GREEDY, guidance_scale=guidance_scale) for row in rows]
    assert torch.equal(drawn, torch.cat(alone))
    assert len({tuple(image.flatten().tolist()) for image in alone}) > 1


def test_guidance_by_one_is_no_guidance(make_model, prompts):
    """Just above 1 the empty prompt is computed and must not change anything; at 3 it must."""
    model, (_, batch) = make_model(), prompts
    plain = model.generate(**batch, **GREEDY, guidance_scale=1)
    assert torch.equal(model.generate(**batch, **GREEDY, guidance_scale=1 + 1e-7), plain)
    assert not torch.equal(model.generate(**batch, **GREEDY, guidance_scale=3), plain)


def test_what_a_drawing_is_does_not_depend_on_its_neighbours_with_a_generator_each(make_model, prompts):
    model, (rows, batch) = make_model(), prompts

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    drawn = model.generate(**batch, generation_mode="image", generator=generators(7, 8, 9))
    for row, seed, image in zip(rows, (7, 8, 9), drawn, strict=True):
        alone = model.generate(row, generation_mode="image", generator=generators(seed))
        assert torch.equal(alone[0], image)
    other = model.generate(**batch, generation_mode="image", generator=generators(1, 2, 3))
    assert not torch.equal(other, drawn)


def test_one_generator_draws_the_same_again(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    first, second = (
        model.generate(**batch, generation_mode="image", generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_drawing_scores_are_those_of_training(make_model):
    """The code drawn greedily at each place is the best one by the code logits of a forward pass over the drawing."""
    model = make_model()
    prompt = torch.tensor([[10, 11, IMAGE_START]])
    codes = model.generate(prompt, **GREEDY, guidance_scale=1)
    ids = torch.cat([prompt, torch.full((1, 16), IMAGE)], dim=1)
    with torch.no_grad():
        scores = model(ids, image_codes=codes, predict_codes=True).code_logits
    assert torch.equal(scores.argmax(-1), codes.flatten())


def test_a_drawing_has_the_size_asked_for(make_model):
    model = make_model()
    codes = model.generate(torch.tensor([[10, IMAGE_START]]), generation_mode="image", image_size=(8, 20))
    assert tuple(codes.shape) == (1, 2, 5)
    pixels = model.decode_image_tokens(codes)
    assert tuple(pixels.shape) == (1, 3, 8, 20)
    assert -1 <= pixels.min() and pixels.max() <= 1


def test_several_images_of_a_prompt_are_those_of_the_prompt_repeated(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in batch.items()}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(6)]

    drawn = model.generate(**batch, generation_mode="image", num_return_sequences=2, generator=generators())
    assert drawn.shape == (6, 4, 4)
    assert torch.equal(drawn, model.generate(**repeated, generation_mode="image", generator=generators()))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_in_a_prompt_are_seen(make_model, pixels, guidance_scale):
    model = make_model()
    prompt = torch.tensor([[*IMAGE_TOKENS, 10, IMAGE_START], [PAD, *IMAGE_TOKENS, IMAGE_START]])
    options = {**GREEDY, "guidance_scale": guidance_scale, "attention_mask": (prompt > 0).long()}
    drawn = model.generate(prompt, pixel_values=pixels, **options)
    codes = model.model.quantize_pixels(pixels).codes
    assert torch.equal(model.generate(prompt, image_codes=codes, **options), drawn)
    alone = model.generate(prompt[1:, 1:], pixel_values=pixels[1:], **GREEDY, guidance_scale=guidance_scale)
    assert torch.equal(alone[0], drawn[1])
    assert not torch.equal(model.generate(prompt, pixel_values=-pixels, **options), drawn)


def test_scores_on_request_are_those_the_codes_were_chosen_by(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert output.scores.shape == (3, 16, 32)
    assert torch.equal(output.scores.argmax(-1).view(3, 4, 4), output.sequences)
    assert torch.equal(output.sequences, model.generate(**batch, **GREEDY))


def draw(model, batch, *args, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return model.generate(
        batch["input_ids"],
        *args,
        **{**batch, "input_ids": None},
        generator=generator,
        generation_mode="image",
        **options,
    )


def test_sampling_is_what_a_call_says_or_else_its_configuration_or_else_the_models_or_else_the_default(
    make_model, prompts
):
    model, (_, batch) = make_model(), prompts
    greedy, cold = draw(model, batch, do_sample=False), draw(model, batch, guidance_scale=1.5, temperature=0.5)
    default = draw(model, batch)
    assert torch.equal(draw(model, batch, guidance_scale=3.0, temperature=1.0, top_p=1.0), default)
    assert torch.equal(draw(model, batch, GenerationConfig(do_sample=False)), greedy)
    model.generation_config = GenerationConfig(temperature=0.5, top_k=1)
    assert torch.equal(draw(model, batch), default), "a configuration without guidance is for text"
    model.keep_image_sampling(guidance_scale=1.5, temperature=0.5)
    assert torch.equal(draw(model, batch), cold)
    assert torch.equal(draw(model, batch, guidance_scale=3.0, temperature=1.0), default)


def test_a_folder_keeps_how_images_are_sampled(make_model, prompts, tmp_path):
    model, (_, batch) = make_model(), prompts
    model.keep_image_sampling(guidance_scale=1.5, top_k=3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(draw(loaded, batch), draw(model, batch, guidance_scale=1.5, top_k=3))


def test_processors_of_logits_see_the_codes_so_far_and_change_the_next(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    seen = []

    def only_even(codes, scores):
        seen.append(codes.clone())
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)

    codes = draw(model, batch, None, LogitsProcessorList([only_even]))
    assert not (codes % 2).any()
    assert [row.shape[1] for row in seen] == list(range(16))
    assert torch.equal(seen[-1], codes.flatten(1)[:, :15])
    with pytest.raises(ValueError, match="jacobi_window is 2, and a logits_processor"):
        draw(model, batch, logits_processor=LogitsProcessorList([only_even]), jacobi_window=2)


def test_as_many_codes_are_generated_as_tokens_are_allowed(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    codes = draw(model, batch, max_new_tokens=5, do_sample=False).flatten(1)
    assert torch.equal(codes[:, :5], draw(model, batch, do_sample=False).flatten(1)[:, :5])
    assert (codes[:, 5:] == -1).all()


def test_an_option_that_images_do_not_have_is_an_error(make_model, prompts):
    with pytest.raises(ValueError, match="without repetition_penalty; sampling takes do_sample, guidance_scale"):
        draw(make_model(), prompts[1], repetition_penalty=1.2)


def test_a_drawing_that_is_stopped_is_the_beginning_of_the_whole(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    whole = model.generate(**batch, **GREEDY).flatten(1)

    def after_six(codes, scores):
        return torch.full((len(codes),), codes.shape[1] == 6)

    stopped = model.generate(**batch, **GREEDY, stopping_criteria=after_six).flatten(1)
    assert torch.equal(stopped[:, :6], whole[:, :6])
    assert stopped[:, 6:].unique().tolist() == [-1]


def test_where_nothing_was_drawn_an_image_is_grey(make_model):
    model = make_model()
    codes = torch.arange(16).view(1, 4, 4)
    partial = model.decode_image_tokens(codes.masked_fill(codes > 5, -1))
    assert partial[:, :, 8:].abs().max() == partial[:, :, 4:8, 8:].abs().max() == 0
    assert partial[:, :, :4].abs().min(dim=1).values.max() > 0


def test_codes_come_one_by_one_as_they_are_drawn(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    stream = model.stream_image_codes(**batch, do_sample=False)
    first = [next(stream)[0] for _ in range(3)]
    assert torch.equal(torch.stack(first, dim=1), model.generate(**batch, **GREEDY).flatten(1)[:, :3])


# Faster


@pytest.mark.parametrize("window", [2, 5, 40])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"top_p": 0.9, "temperature": 0.5}], ids=str)
def test_guessing_ahead_draws_the_same_images_and_leaves_the_generator_the_same(make_model, prompts, window, options):
    model, (_, batch) = make_model(), prompts
    plain, ahead = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    options = {**batch, **options, "generation_mode": "image", "image_size": (16, 12)}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    expected = model.generate(**options, generator=plain)
    drawn = model.generate(**options, generator=ahead, jacobi_window=window)
    assert torch.equal(drawn.sequences, expected.sequences)
    torch.testing.assert_close(drawn.scores, expected.scores, rtol=0, atol=1e-4)
    assert torch.equal(ahead.get_state(), plain.get_state())


def test_guessing_ahead_with_a_generator_each_draws_the_same_images(make_model, prompts):
    model, (_, batch) = make_model(), prompts

    def draw(**options):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return model.generate(**batch, generation_mode="image", generator=generators, **options)

    assert torch.equal(draw(jacobi_window=4), draw())


@pytest.fixture
def count_steps():
    """Counts forward passes of a model's language model."""

    def count(model, **options):
        passes = []
        hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
        model.generate(torch.tensor([[10, IMAGE_START]]), **GREEDY, **options)
        hook.remove()
        return len(passes)

    return count


def test_right_guesses_save_passes(make_model, count_steps):
    model = make_model()
    # Every code is 0, and so is every guess.
    model.visual_head.weight.data.zero_()
    assert count_steps(model) == 16
    assert count_steps(model, jacobi_window=4) == 1 + 4
    assert count_steps(model, jacobi_window=15) == 1 + 1


def test_wrong_guesses_cost_no_passes(make_model, count_steps):
    assert count_steps(make_model(), jacobi_window=4) <= 16


@pytest.mark.parametrize("family", ["GPTNeo", "Bloom", "Gemma3Text"])
@pytest.mark.parametrize("window", [1, 4])
def test_any_language_model_draws_what_is_computed_anew_for_each_code(
    make_model, make_language_model, prompts, family, window
):
    """These have caches of their own kinds: not compiled, with biases of positions, and forgetful."""
    families = {
        "GPTNeo": {"attention_types": [[["global"], 2]], "num_layers": 2},
        "Bloom": {"n_head": 2, "n_layer": 2},
        "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    }
    model, (rows, batch) = make_model(make_language_model(family, **families[family])), prompts
    drawn = model.generate(**batch, **GREEDY, jacobi_window=window).flatten(1)
    assert torch.equal(drawn, torch.stack([draw_slowly(model, row, 16, 3.0) for row in rows]))


def test_guesses_may_go_beyond_the_end_of_the_context(make_model, make_language_model):
    model = make_model(make_language_model("GPT2", n_positions=18))
    prompt = torch.tensor([[10, IMAGE_START]])
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY, jacobi_window=5), expected)


def test_under_autocast_it_draws(make_model, make_language_model):
    model = make_model(make_language_model(hidden_size=512, num_attention_heads=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = model.generate(torch.tensor([[10, IMAGE_START]]), **GREEDY)
    assert drawn.shape == (1, 4, 4)


@pytest.mark.parametrize("window", [1, 3])
def test_a_compiled_step_is_one_graph_and_draws_the_same(make_model, prompts, window):
    model, (_, batch) = make_model(), prompts
    expected = model.generate(**batch, **GREEDY)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **GREEDY, compile_config=config, jacobi_window=window), expected)
    assert len(graphs) == 1


def test_two_compiled_drawings_at_once_do_not_disturb_each_other(make_model, prompts):
    model, (rows, _) = make_model(), prompts
    config = CompileConfig(backend="eager", mode=None)
    model.generate(rows[1], **GREEDY, compile_config=config)
    streams = [model.stream_image_codes(row, do_sample=False, compile_config=config) for row in rows[:2]]
    drawn = torch.tensor([[code.item() for code, _ in pair] for pair in zip(*streams, strict=True)]).T
    alone = [model.generate(row, **GREEDY).flatten() for row in rows[:2]]
    assert torch.equal(drawn, torch.stack(alone))


def test_a_copy_of_a_model_that_drew_compiled_draws_by_its_own_weights(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    options = {**batch, **GREEDY, "compile_config": CompileConfig(backend="eager", mode=None)}
    drawn = model.generate(**options)
    other = copy.deepcopy(model)
    other.visual_head.weight.data.neg_()
    assert torch.equal(other.generate(**options), other.generate(**batch, **GREEDY))
    assert torch.equal(model.generate(**options), drawn)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPTNeo", {"attention_types": [[["global"], 2]], "num_layers": 2}),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 8}),
    ],
)
def test_what_is_not_one_graph_is_not_compiled(make_model, make_language_model, family, options):
    model = make_model(make_language_model(family, **options))
    with pytest.raises(ValueError, match=r"compile_config is given, and \w+ is not one graph"):
        model.stream_image_codes(torch.tensor([[10, IMAGE_START]]), compile_config=CompileConfig())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_step_compiled_to_machine_code_draws_the_same(make_model, prompts):
    model, (_, batch) = make_model(), prompts
    config = CompileConfig(fullgraph=True, mode="default")
    assert torch.equal(model.generate(**batch, **GREEDY, compile_config=config), model.generate(**batch, **GREEDY))


# What cannot be drawn


def test_a_chat_model_that_is_asked_to_draw_says_that_it_cannot(make_model):
    model = make_model(visual_head=False)
    with pytest.raises(ValueError, match=r"no visual head .* cannot generate"):
        model.generate(torch.tensor([[10, IMAGE_START]]), generation_mode="image")
    assert not hasattr(model, "visual_head")


def test_a_model_for_images_that_is_asked_to_answer_warns_and_answers_as_if_it_were_for_text(make_model):
    prompt, options = torch.tensor([[10, 11]]), {"max_new_tokens": 4, "eos_token_id": None}
    expected = make_model().generate(prompt, do_sample=False, **options)
    model = make_model(answers=False)
    model.keep_image_sampling()
    with pytest.warns(UserWarning, match="trained last to generate images .* chat model such as ETT-Chat"):
        assert torch.equal(model.generate(prompt, **options), expected)
    assert model.generate(torch.tensor([[10, IMAGE_START]]), **GREEDY).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": (10, 16)},
            r"image_size is \(10, 16\); expected height and width, positive multiples of 4 pixels",
        ),
        ({"image_size": (0, 16)}, r"image_size is \(0, 16\)"),
        ({"image_size": 16}, "image_size is 16; expected height and width"),
        ({"image_size": (16.0, 16)}, r"image_size is \(16.0, 16\)"),
        ({"temperature": 0}, "temperature 0, .*expected temperature > 0"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": 0}, "top_k 0"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale nan"),
        ({"num_return_sequences": 0}, "There is no image to generate"),
        ({"jacobi_window": 0}, "jacobi_window is 0; expected at least 1"),
        pytest.param({"generator": [torch.Generator()] * 2}, "Got 2 generators for 1 images", id="generators"),
    ],
    ids=str,
)
def test_options_out_of_range_are_an_error(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor([[10, IMAGE_START]]), generation_mode="image", **options)


def test_a_prompt_that_does_not_end_where_images_start_is_an_error(make_model):
    with pytest.raises(ValueError, match="must end with the image start token 5"):
        make_model().generate(torch.tensor([[10, IMAGE_START], [IMAGE_START, 10]]), generation_mode="image")


def test_attention_that_would_be_wrong_is_an_error(make_model):
    model = make_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"flex_attention gives wrong values with a static cache; .*sdpa"):
        model.stream_image_codes(torch.tensor([[10, IMAGE_START]]), compile_config=CompileConfig())


@pytest.mark.parametrize("mode", ["text", "image"])
def test_placeholders_without_images_are_an_error(make_model, mode):
    prompt = torch.tensor([[*IMAGE_TOKENS, 10, IMAGE_START]])
    with pytest.raises(ValueError, match=r"has 16 placeholders of images \(token 4\), and no image is given"):
        make_model().generate(prompt, generation_mode=mode)


def test_a_prompt_that_the_context_has_no_room_for_is_an_error(make_model, make_language_model):
    model = make_model(make_language_model(max_position_embeddings=24))
    prompt = torch.tensor([[PAD] * 20 + [10] * 8 + [IMAGE_START]])
    mask = (prompt > 0).long()
    with pytest.raises(ValueError, match="The prompt has 9 tokens and the image 16 codes, together more than the 24"):
        model.generate(prompt, attention_mask=mask, generation_mode="image")
    with pytest.raises(ValueError, match=r"The prompt has 24 tokens, images included, .* context ends at 24"):
        model.generate(torch.full((1, 24), 10))


def test_an_unknown_mode_is_an_error(make_model):
    with pytest.raises(ValueError, match='generation_mode is \'video\'; expected "text" or "image"'):
        make_model().generate(torch.tensor([[10]]), generation_mode="video")
