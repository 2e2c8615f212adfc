"""Heads that peft wraps: the loss is the cross-entropy of the scores that the wrapped head gives."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import ett  # noqa: F401 - tells peft of ETT's default targets
from ett.modeling_ett import scoring_head
from ett.modeling_ett.scoring_head import ScoringHead, summed_cross_entropy

IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6
CONFIGS = {
    "lora on lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on both heads": {"target_modules": ["lm_head", "visual_head"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": r".*vision_tokenizer.*"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "visual_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [10, 11]},
    "trainable tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [10, 11]}},
    # The row of padding in `lm_head` is 0, which DoRA divides by.
    "dora": {"target_modules": ["visual_head"], "use_dora": True},
}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[10, IMAGE_START, *[IMAGE] * 16, IMAGE_END]]).repeat(2, 1)
    ids = torch.cat([ids, torch.randint(10, 40, (2, 6), generator=generator)], dim=1)
    codes = torch.randint(0, 32, (2, 4, 4), generator=generator)
    return {"input_ids": ids, "image_codes": codes, "labels": ids.masked_fill(ids == IMAGE, -100)}


def moved(model):
    """Adapters away from their first values, at which they change nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_is_that_of_the_wrapped_heads_scores(make_model, make_language_model, inputs, config, tied):
    language_model = make_language_model(tie_word_embeddings=tied)
    model = moved(get_peft_model(make_model(language_model), LoraConfig(r=2, **CONFIGS[config])))
    model.eval()
    shown = model(**inputs, predict_codes=True, skip_logits=False)
    text = F.cross_entropy(shown.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    expected = text + F.cross_entropy(shown.code_logits, inputs["image_codes"].flatten())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    loss = model(**inputs, predict_codes=True, skip_logits=True).loss
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert any(gradient is not None for gradient in found)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_wrapped_head_learns_and_draws(make_model, inputs, config):
    model = get_peft_model(make_model(), LoraConfig(r=2, **CONFIGS[config]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    model.train()
    for _ in range(5):
        loss = model(**inputs, predict_codes=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    drawing = model.eval().generate(
        input_ids=torch.tensor([[10, IMAGE_START]]), generation_mode="image", image_size=(8, 8)
    )
    assert tuple(drawing.shape) == (1, 2, 2)


def test_in_chunks_the_loss_and_its_gradients_are_those_of_all_scores(monkeypatch):
    monkeypatch.setattr(scoring_head, "CHUNK_ELEMENTS", 20)
    torch.manual_seed(0)
    head, states = ScoringHead(3, 10), torch.randn(2, 4, 3, requires_grad=True)
    labels = torch.tensor([[1, -100, 3, 4], [5, 6, -100, 9]])
    loss = summed_cross_entropy(head, states, labels)
    expected = F.cross_entropy(head(states).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (states, head.weight))
    torch.testing.assert_close(found, torch.autograd.grad(expected, (states, head.weight)))


def test_by_default_peft_adapts_the_language_models_layers_alone(make_model):
    model = get_peft_model(make_model(), LoraConfig(r=2))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    parts = {name.split(".")[-1] for name in adapted}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".language_model.layers." in name for name in adapted)
