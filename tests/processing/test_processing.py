"""The processor: exact placeholders, codes and embeddings in raster order, chat, round trips, and its refusals."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

import ett  # noqa: F401, registers the processor
from ett.processing_ett import ETTImageProcessor, ETTProcessor, build_word_tokenizer

EXPANDED = ["<image_start>", *["<image>"] * 6, "<image_end>"]


def tokens(processor, features, index=0):
    ids = features["input_ids"][index][features["attention_mask"][index].bool()]
    return processor.tokenizer.convert_ids_to_tokens(ids)


def byte_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens=[*special_tokens]
    )


def test_placeholder_becomes_start_one_token_a_code_end(processor, image):
    features = processor(images=image, text="a <image> red")
    assert tokens(processor, features) == ["a", *EXPANDED, "red"]
    assert features["pixel_values"].shape == (1, 3, 16, 24)


def test_several_images_in_several_texts(processor, image):
    features = processor(images=[image] * 3, text=["<image><image>", "red <image>"])
    assert tokens(processor, features, 0) == EXPANDED * 2
    assert tokens(processor, features, 1) == ["red", *EXPANDED]
    assert features["pixel_values"].shape == (3, 3, 16, 24)


def test_placeholder_count_follows_a_size_given_in_the_call(processor, image):
    features = processor(images=image, text="<image>", size={"height": 8, "width": 8})
    assert (features["input_ids"] == processor.image_token_id).sum() == 1


def test_batches_are_padded_on_the_left(processor):
    features = processor(text=["a red circle", "a"])
    assert features["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert features["input_ids"][1].tolist() == [0, 0, processor.tokenizer.convert_tokens_to_ids("a")]


def test_codes_replace_pixels(processor, image):
    features = processor(images=image, text="<image>", return_codes=True)
    assert (
        features["image_codes"].tolist() == [[[0, 3, 3], [0, 3, 3]]] and features["image_codes"].dtype == torch.int64
    )
    assert set(features) == {"input_ids", "attention_mask", "image_codes"}


def test_embeddings_are_in_raster_order(processor, image):
    features = processor(images=image, text="<image>", return_embeddings=True)
    expected = [[0, 0], [3, -3], [3, -3], [0, 0], [3, -3], [3, -3]]
    assert features["codebook_embeds"].tolist() == [expected] and features["codebook_embeds"].dtype == torch.float32


def test_codes_and_embeddings_of_the_real_tokenizer_agree():
    from ett.modeling_ett.modeling_ibq import IBQModel

    vision_tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    processor = ETTProcessor.from_parts(build_word_tokenizer([]), vision_tokenizer, image_size=8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    features = processor(images=image, return_codes=True, return_embeddings=True)
    looked_up = vision_tokenizer.codes_to_embeddings(features["image_codes"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features["codebook_embeds"], looked_up.detach())
    assert not features["codebook_embeds"].requires_grad


def test_numpy_is_returned_on_request(processor, image):
    features = processor(images=image, text="<image>", return_codes=True, return_tensors="np")
    assert isinstance(features["input_ids"], np.ndarray) and isinstance(features["image_codes"], np.ndarray)


def test_options_of_the_tokenizer_alone_go_before_the_defaults(processor):
    features = processor(text="a red", text_kwargs={"padding": "max_length", "max_length": 4})
    assert features["attention_mask"].tolist() == [[0, 0, 1, 1]]


def test_images_without_text_are_asked_for_a_caption(processor, image):
    features = processor(images=[image, image])
    question = ["describe", "the", "image", ".", "<|im_end|>"]
    turns = ["<|im_start|>", "user", *EXPANDED, *question, "<|im_start|>", "assistant"]
    assert [tokens(processor, features, index) for index in (0, 1)] == [turns, turns]


def test_lists_of_images_without_text_make_one_question_each(processor, image):
    features = processor(images=[[image, image], [image]])
    assert (features["input_ids"] == processor.image_token_id).sum(1).tolist() == [12, 6]


def test_drawing_prompts_end_with_the_image_start_token(processor):
    features = processor.prepare_drawing(["a red circle", "a"])
    assert tokens(processor, features, 0) == ["a", "red", "circle", "<image_start>"]
    assert features["input_ids"][:, -1].tolist() == [processor.image_start_token_id] * 2


def test_unknown_generation_mode(processor):
    with pytest.raises(ValueError, match='generation_mode is \'sound\'; expected "text" or "image"'):
        processor(text="a", generation_mode="sound")


def test_more_placeholders_than_images(processor, image):
    with pytest.raises(ValueError, match="The text has 2 <image> and there are 1 images"):
        processor(images=image, text="<image> <image>")


def test_placeholder_without_images(processor):
    with pytest.raises(ValueError, match="The text has 1 <image> and there are 0 images"):
        processor(text="<image>")


def test_images_listed_under_the_wrong_text(processor, image):
    with pytest.raises(ValueError, match="Text 0 has 2 <image> and 1 images"):
        processor(images=[[image], [image]], text=["<image> <image>", "a"])


def test_a_list_of_images_that_is_empty_without_text(processor, image):
    message = r"^List 1 of images is empty, and there is no text; give it an image, or give texts\.$"
    with pytest.raises(ValueError, match=message):
        processor(images=[[image], []])


@pytest.mark.parametrize("text", ["", " \n", [], ["a", ""]])
def test_an_empty_text(processor, text):
    with pytest.raises(ValueError, match=r"^The prompt is empty; ask or say something\.$"):
        processor(text=text)


def test_an_empty_drawing_prompt(processor):
    with pytest.raises(ValueError, match=r"^The prompt is empty; say what to draw\.$"):
        processor.prepare_drawing(["a", ""])


@pytest.mark.parametrize("text", [5, ["a", 5]])
def test_what_is_no_text(processor, text):
    with pytest.raises(ValueError, match=r"^A prompt is of type int; expected a text, or a list of texts\.$"):
        processor(text=text)


def test_neither_images_nor_text(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor(images=[])


def test_codes_without_a_vision_tokenizer(processor, image):
    processor.vision_tokenizer = None
    with pytest.raises(ValueError, match=r"this processor has none; set processor.vision_tokenizer"):
        processor(images=image, return_codes=True)


def test_vision_tokenizer_of_another_factor(processor, image):
    processor.vision_tokenizer.spatial_factor = 16
    with pytest.raises(ValueError, match="codes of 16 pixels a side and this processor expects 8"):
        processor(images=image, return_codes=True)


def test_vision_tokenizer_in_half_precision(processor, image):
    processor.vision_tokenizer.dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"in torch.bfloat16, in which codes flip; call .float\(\)"):
        processor(images=image, return_embeddings=True)


def test_size_that_does_not_divide_into_codes(tokenizer):
    with pytest.raises(ValueError, match=r"20 x 20 pixels .* do not divide into codes of 8"):
        ETTProcessor.from_parts(tokenizer, 8, image_size=20)


@pytest.mark.parametrize("size", [(16, 24.0), (0, 8), (8, -8), (8, 9), ("8", 8)])
def test_sides_that_are_no_positive_multiples_of_the_factor_have_no_codes(processor, size):
    message = re.escape(
        f"Images of {size[0]!r} x {size[1]!r} pixels (height x width) do not divide into codes of 8 pixels a side; "
        "choose positive, whole multiples of it."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        processor.code_grid(size)


@pytest.mark.parametrize("size", [8, "88", (8,), (8, 8, 8), None], ids=repr)
def test_what_is_no_height_and_width_has_no_codes(processor, size):
    message = re.escape(f"An image's size is {size!r}; expected its height and width in pixels.")
    with pytest.raises(ValueError, match=f"^{message}$"):
        processor.code_grid(size)


def test_no_side_of_a_placeholder_is_zero(processor):
    with pytest.raises(ValueError, match="Images of 0 x 24 pixels"):
        processor.image_placeholder(height=0)


@pytest.mark.parametrize("where", ["call", "images_kwargs"])
def test_a_size_that_is_none_is_refused_in_one_sentence_before_an_image_is_opened(processor, where):
    options = {"size": 8.5} if where == "call" else {"images_kwargs": {"size": 8.5}}
    with pytest.raises(ValueError, match=r"^size is 8\.5; expected a 'height' and a 'width'"):
        processor(images="gone.png", **options)


def test_a_size_that_does_not_divide_is_refused_before_an_image_is_opened(processor):
    with pytest.raises(ValueError, match="Images of 9 x 9 pixels"):
        processor(images="gone.png", size=9)


def test_word_beyond_the_vocabulary_is_named(processor):
    size = len(processor.tokenizer)
    with pytest.raises(ValueError, match=f"The word 'zebra' is beyond this model's vocabulary of {size} words"):
        processor.prepare_drawing("a red zebra")


def test_several_words_beyond_the_vocabulary_are_named(processor):
    with pytest.raises(ValueError, match="The words 'zebra' and 'yak' are beyond"):
        processor(text=["a zebra", "a yak"])


def test_vocabulary_of_a_subword_tokenizer_is_open():
    ETTProcessor.from_parts(byte_tokenizer(), 8, image_size=16).check_vocabulary("any zebra")


def test_chat_template_takes_strings_and_parts_over_several_turns(processor):
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what color?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red."}]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system a<|im_end|><|im_start|>user <image><image>what color?<|im_end|>"
        "<|im_start|>assistant red.<|im_end|><|im_start|>assistant "
    )


def test_chat_with_images_is_tokenized_in_one_call(processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what color is it?"}]
    features = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_codes": True},
    )
    assert features["image_codes"].shape == (1, 2, 3)
    assert (features["input_ids"] == processor.image_token_id).sum() == 6


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("what color is it?", [*EXPANDED, "what", "color", "is", "it", "?"]),
        ("a <image> circle", ["a", *EXPANDED, "circle"]),
        (None, [*EXPANDED, "describe", "the", "image", "."]),
    ],
)
def test_an_image_stands_where_a_question_has_its_token_or_else_before_it(processor, image, question, words):
    features = processor.apply_chat_template(
        processor.chat_about(image, question), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    turns = ["<|im_start|>", "user", *words, "<|im_end|>", "<|im_start|>", "assistant"]
    assert tokens(processor, features) == turns


@pytest.mark.parametrize("kind", ["video", "audio", "file", None])
@pytest.mark.parametrize("batched", [False, True])
def test_a_part_of_a_chat_that_is_no_text_and_no_image_is_an_error(processor, kind, batched):
    chat = [{"role": "user", "content": [{"type": kind, "url": "a.mp4"}, {"type": "text", "text": "what color?"}]}]
    message = rf"^A message has a part of type {kind!r}; expected parts of type text or image\.$"
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([chat, chat] if batched else chat)


def test_an_image_in_the_form_of_openai_is_an_image(processor):
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "what color?"}]
    assert "<image>what color?" in processor.apply_chat_template([{"role": "user", "content": content}])


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_what_the_chat_template_does_not_write_is_an_error(processor, name):
    chat = [{"role": "user", "content": "what color?"}]
    given = {name: [{"title": "a", "text": "red"}]}
    with pytest.raises(ValueError, match=rf"^{name} are given, and the model's chat template does not write them"):
        processor.apply_chat_template(chat, **given)
    assert processor.apply_chat_template(chat, **{name: []}) == processor.apply_chat_template(chat)
    template = "{{ " + name + "[0]['text'] }}"
    assert processor.apply_chat_template(chat, chat_template=template, **given) == "red"


def test_an_empty_question_about_an_image(processor, image):
    with pytest.raises(ValueError, match="The prompt is empty"):
        processor.chat_about(image, " ")


def test_chat_template_of_a_subword_tokenizer_with_chatml_tokens_breaks_lines():
    processor = ETTProcessor.from_parts(byte_tokenizer("<|im_start|>", "<|im_end|>"), 8, image_size=16)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>user\n<image>hi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_template_without_chatml_tokens():
    processor = ETTProcessor.from_parts(byte_tokenizer(), 8, image_size=16)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == "user: <image>hi\nassistant: "


def test_vision_tokens_of_the_text_tokenizer_are_used():
    tokenizer = byte_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>")
    size = len(tokenizer)
    processor = ETTProcessor.from_parts(tokenizer, 8, image_size=8)
    assert len(tokenizer) == size and processor.image_token == "<|image_pad|>"
    ids = processor(images=Image.new("RGB", (8, 8)), text="<|image_pad|>")["input_ids"][0].tolist()
    assert ids == [processor.image_start_token_id, processor.image_token_id, processor.image_end_token_id]
    assert ids == tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])


def test_missing_image_tokens_are_added_beside_the_special_tokens_there_are():
    tokenizer = byte_tokenizer("<extra>")
    processor = ETTProcessor.from_parts(tokenizer, 8, image_size=8)
    assert len(tokenizer) == 256 + 5 and "<extra>" in tokenizer.all_special_tokens
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


def test_tokenizer_without_image_tokens_is_refused_by_the_constructor():
    with pytest.raises(
        ValueError, match=r"no token <image>, <image_start>, <image_end>; ETTProcessor.from_parts adds"
    ):
        ETTProcessor(ETTImageProcessor(), byte_tokenizer())


def test_saved_folder_holds_everything_but_the_vision_tokenizer(processor, tmp_path):
    processor.caption_prompt = "what color is it?"
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert "vision_tokenizer" not in config and processor.vision_tokenizer is not None
    assert {key: config[key] for key in ("spatial_factor", "image_token", "image_start_token", "image_end_token")} == {
        "spatial_factor": 8,
        "image_token": "<image>",
        "image_start_token": "<image_start>",
        "image_end_token": "<image_end>",
    }
    assert config["image_processor"]["size"] == {"height": 16, "width": 24}


def test_auto_processor_restores_the_processor(processor, image, tmp_path):
    processor.caption_prompt = "what color is it?"
    processor.chat_template = processor.chat_template.replace("assistant", "system")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, ETTProcessor) and loaded.vision_tokenizer is None
    expected, actual = processor(images=image), loaded(images=image)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


def test_post_processing_gives_texts_and_images(processor):
    ids = processor(text=["a red circle<|im_end|>", "a"])["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["a red circle", "a"]
    assert processor.post_process_multimodal_output(ids, generation_mode="text") == ["a red circle", "a"]
    (drawn,) = processor.post_process_multimodal_output(torch.ones(1, 3, 4, 6), generation_mode="image")
    assert drawn.size == (6, 4) and drawn.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="generation_mode=audio"):
        processor.post_process_multimodal_output(ids, generation_mode="audio")
