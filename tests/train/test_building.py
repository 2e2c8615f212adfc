"""A new model of a language model's folder: its own tokens stand for pictures, and its embeddings are as they were."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from modeling_ett.modeling_ibq import IBQModel
from train import load_recipe
from train.models.building import build_model

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
