"""Which causal language models `from_parts` takes: those whose scores it reproduces; the others in one sentence."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
SCALED = {
    "Cohere": {"logit_scale": 0.0625},
    "Cohere2": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "Gemma2": {"head_dim": 16},
    "FalconH1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}
REFUSED = {
    "Dory": SMALL,
    "CpmAnt": {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "dim_head": 16,
        "dim_ff": 32,
        "num_hidden_layers": 2,
    },
    "Llama4Text": {**SMALL, "intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 16},
    "TrOCR": {
        "vocab_size": 40,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "OpenAIGPT": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Rwkv": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
}


def make(family, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", SCALED)
def test_scores_that_are_scaled_or_capped_are_refused_by_name(make_vision_tokenizer, family):
    language_model = make(family, **SMALL, **SCALED[family])
    with pytest.raises(TypeError, match=rf"^{family}ForCausalLM .*\.$") as caught:
        ETTForConditionalGeneration.from_parts(language_model, make_vision_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["Cohere", "FalconH1"])
def test_a_scale_of_one_is_none(make_vision_tokenizer, family):
    fields = {**SMALL, **SCALED[family]}
    fields |= {"logit_scale": 1.0} if family == "Cohere" else {"lm_head_multiplier": 1.0}
    language_model = make(family, **fields)
    model = ETTForConditionalGeneration.from_parts(language_model, make_vision_tokenizer()).eval()
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, language_model(ids).logits)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_in_one_sentence_that_names_it(make_vision_tokenizer, family):
    language_model = make(family, **REFUSED[family])
    try:
        model = ETTForConditionalGeneration.from_parts(language_model, make_vision_tokenizer()).eval()
    except TypeError as error:
        assert str(error).startswith(type(language_model).__name__ + " ") and "\n" not in str(error)
    else:
        ids = torch.arange(1, 6)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, language_model(ids).logits)


def test_without_weights_nothing_is_compared(make_vision_tokenizer):
    with torch.device("meta"):
        language_model = make("Qwen2", **SMALL)
        vision_tokenizer = make_vision_tokenizer()
        model = ETTForConditionalGeneration.from_parts(language_model, vision_tokenizer)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_language_model_of_any_precision_is_taken_and_stays_in_its_mode(make_vision_tokenizer, dtype):
    language_model = make("Llama", **SMALL).to(dtype).train()
    ETTForConditionalGeneration.from_parts(language_model, make_vision_tokenizer())
    assert language_model.training
