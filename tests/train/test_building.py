"""A new model of a language model's folder: its own tokens stand for images, and its embeddings are as they were."""

import shutil

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train import load_recipe
from ett.train.models.building import build_model, check_visual_embedding, load_model

WORDS = ["<unk>", "<|endoftext|>", "a", "red", "circle"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


@pytest.fixture
def build(make_language_model, make_vision_tokenizer, tmp_path):
    """Makes folders of both parts, with a vocabulary of `tokens` and room for `rows`, and builds the model of them."""

    def make(tokens: list[str], rows: int, family: str = "Qwen2"):
        model = make_language_model(family, vocab_size=rows)
        model.save_pretrained(tmp_path / "language")
        words = models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<|endoftext|>")
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in tokens if t in QWEN_TOKENS]})
        tokenizer.save_pretrained(tmp_path / "language")
        make_vision_tokenizer().save_pretrained(tmp_path / "tokenizer")
        parts = [f"model.{part}={tmp_path / name}" for part, name in PARTS.items()]
        recipe = load_recipe("stage1_alignment", [*parts, "model.image_size=16"])
        return model, *build_model(recipe, [])

    return make


PARTS = {"vision_tokenizer": "tokenizer", "language_model": "language"}


def test_qwens_vision_tokens_are_used_and_no_embedding_is_added(build):
    language_model, model, processor = build([*WORDS, *QWEN_TOKENS], rows=16)
    found = processor.image_token, processor.image_start_token, processor.image_end_token
    assert found == ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    assert (model.config.image_token_id, model.config.image_start_token_id) == (7, 5)
    embeddings = language_model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_new_tokens_go_into_rows_that_a_padded_vocabulary_has_free(build):
    language_model, model, processor = build(WORDS, rows=16)
    assert processor.tokenizer.get_vocab()[processor.image_token] < 16
    assert torch.equal(model.get_input_embeddings().weight, language_model.get_input_embeddings().weight)


def test_embeddings_grow_only_by_what_has_no_row(build):
    language_model, model, processor = build(WORDS, rows=len(WORDS) + 1)
    embeddings = language_model.get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == len(processor.tokenizer) == len(WORDS) + 3
    assert torch.equal(model.get_input_embeddings().weight[: len(embeddings)], embeddings)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "SmolLM3", "Gemma"])
def test_language_models_of_other_families_start_from_their_folders(build, family):
    language_model, model, _ = build(WORDS, rows=16, family=family)
    assert model.config.text_config.model_type == language_model.config.model_type
    assert isinstance(model.model.vision_tokenizer, IBQModel)
    own = dict(model.model.language_model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in language_model.model.named_parameters())


# Weights that lack a tensor


def without(folder, lost: str, target) -> str:
    shutil.copytree(folder, target)
    weights = safetensors.torch.load_file(target / "model.safetensors")
    del weights[lost]
    safetensors.torch.save_file(weights, target / "model.safetensors", {"format": "pt"})
    return f"model.path={target}"


def test_training_does_not_start_from_weights_that_lack_a_tensor(base, tmp_path):
    lost = "model.vision_tokenizer.quantize.embedding.weight"
    path = without(base, lost, tmp_path / "partial")
    with pytest.raises(ValueError, match=f"The weights of '.*partial' lack {lost}; save or download them again"):
        load_model(load_recipe("stage3_gen", [path]).model)


def test_a_visual_head_is_new_where_the_model_has_none_and_missing_where_it_should_be(base, tmp_path):
    model = load_model(load_recipe("stage3_gen", [f"model.path={base}"]).model)
    model.save_pretrained(tmp_path / "gen")
    path = without(tmp_path / "gen", "visual_head.weight", tmp_path / "partial")
    with pytest.raises(ValueError, match=r"lack visual_head\.weight; save"):
        load_model(load_recipe("stage3_gen", [path]).model)


# The gradient path

PATH = ["model.logit_scale=0.5", "model.straight_through_weight=0.1"]


def path_of(tokenizer):
    assert tokenizer.config.logit_scale == tokenizer.quantize.logit_scale
    assert tokenizer.config.straight_through_weight == tokenizer.quantize.straight_through_weight
    return tokenizer.quantize.logit_scale, tokenizer.quantize.straight_through_weight


def test_a_recipe_sets_the_gradient_path_of_a_models_tokenizer_and_the_next_stage_keeps_it(base, tmp_path):
    model = load_model(load_recipe("stage2_semantic", [f"model.path={base}", *PATH]).model)
    assert path_of(model.model.vision_tokenizer) == (0.5, 0.1)
    model.save_pretrained(tmp_path / "next")
    loaded = ETTForConditionalGeneration.from_pretrained(tmp_path / "next")
    assert path_of(loaded.model.vision_tokenizer) == (0.5, 0.1)


def test_a_recipe_sets_the_gradient_path_of_a_new_model(build, tmp_path):
    build(WORDS, rows=16)
    parts = [f"model.{part}={tmp_path / name}" for part, name in PARTS.items()]
    model, _ = build_model(load_recipe("stage1_alignment", [*parts, "model.image_size=16", *PATH]), [])
    assert path_of(model.model.vision_tokenizer) == (0.5, 0.1)
    assert model.config.vq_config["logit_scale"] == 0.5


def test_a_recipe_sets_the_gradient_path_of_a_tokenizer(make_vision_tokenizer, tmp_path):
    make_vision_tokenizer(logit_scale=7.0).save_pretrained(tmp_path)
    overrides = [f"model.path={tmp_path}", "model.straight_through_weight=0.1"]
    assert path_of(build_model(load_recipe("tokenizer", overrides), [])[0]) == (7.0, 0.1)


# The embedding of the codes


@pytest.fixture
def embedding_folder(make_model, tmp_path):
    """Makes the folder of a model, without its weights, that has codebook or index embeddings."""

    def make(visual_embedding: str) -> str:
        make_model(visual_embedding=visual_embedding).config.save_pretrained(tmp_path / visual_embedding)
        return f"model.path={tmp_path / visual_embedding}"

    return make


INDEX = ["model.path=null", "model.visual_embedding=index"]
MISFITS = [
    (["train=[projector]"], "train names projector, which a model with visual_embedding=index does not have"),
    (["train=[index_embedding, vision_tokenizer]"], "losses have no path to the tokenizer; remove vision_tokenizer"),
    (["train=[]"], "this stage trains nothing that learns from images; add index_embedding to train"),
]


@pytest.mark.parametrize("from_folder", [False, True], ids=["new", "folder"])
@pytest.mark.parametrize(("overrides", "message"), MISFITS)
def test_what_an_index_model_cannot_train_is_an_error(embedding_folder, from_folder, overrides, message):
    model = [embedding_folder("index")] if from_folder else INDEX
    with pytest.raises(ValueError, match=message):
        check_visual_embedding(load_recipe("stage2_semantic", [*model, *overrides]))


@pytest.mark.parametrize("train", ["[index_embedding]", "[language_model]", "[index_embedding, language_model]"])
def test_what_an_index_model_can_train_is_none(embedding_folder, train):
    check_visual_embedding(load_recipe("stage2_semantic", [embedding_folder("index"), f"train={train}"]))


def test_an_index_embedding_to_train_in_a_codebook_model_is_an_error(embedding_folder):
    recipe = load_recipe("stage2_semantic", [embedding_folder("codebook"), "train=[index_embedding]"])
    with pytest.raises(ValueError, match=r"train names index_embedding, .*; name projector instead"):
        check_visual_embedding(recipe)


def test_a_folders_embedding_cannot_be_another_one(embedding_folder):
    recipe = load_recipe("stage2_semantic", [embedding_folder("codebook"), "model.visual_embedding=index"])
    with pytest.raises(ValueError, match=r"model\.visual_embedding is 'index', but the model '.*' has 'codebook'"):
        check_visual_embedding(recipe)
