"""Whether a causal language model and a tokenizer can be joined, and whether that left the language model the same."""

import inspect

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .modeling_ibq import IBQModel

PROBE_LENGTH = 4
"""Tokens by which two language models are compared."""


def check_parts(language_model: PreTrainedModel, vision_tokenizer: IBQModel):
    """
    Raises:
        TypeError: `language_model` has no head, or one that does more than multiply, is of a family that takes no
            embeddings or cannot be built from its configuration, or `vision_tokenizer` is no [`IBQModel`].
    """
    head, name = language_model.get_output_embeddings(), type(language_model).__name__
    if head is None:
        raise TypeError(f"{name} has no language-modelling head; load it with AutoModelForCausalLM.")
    text_config = language_model.config
    caps = getattr(text_config, "final_logit_softcapping", None)
    scales = (getattr(text_config, "logits_scaling", 1.0) or 1.0) != 1.0
    if head.state_dict().keys() != {"weight"} or caps or scales:
        raise TypeError(
            f"{name} adds to, scales or caps what its head's matrix gives; ETT supports heads without, such as those "
            "of Qwen, Llama, SmolLM and Gemma 1 and 3."
        )
    if type(vision_tokenizer).__name__ != IBQModel.__name__:
        raise TypeError(f"vision_tokenizer is a {type(vision_tokenizer).__name__}; expected an IBQModel.")
    _check_base_model(language_model)


def _unsupported(language_model: PreTrainedModel, reason: str) -> TypeError:
    return TypeError(
        f"{type(language_model).__name__} {reason}; choose a decoder-only language model such as Qwen2, Llama, "
        "SmolLM3 or Gemma 3."
    )


def _check_base_model(language_model: PreTrainedModel):
    """Raises `TypeError` where `AutoModel` cannot build the model below a language model's head from its
    configuration, or where that takes other weights or inputs. Nothing is computed, and no memory is needed."""
    try:
        config = AutoConfig.for_model(**language_model.config.to_dict())
        with torch.device("meta"):
            found = AutoModel.from_config(config)
        head_shape = (config.vocab_size, config.hidden_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsupported(language_model, "has no model without head that AutoModel builds") from error
    if tuple(language_model.get_output_embeddings().weight.shape) != head_shape:
        raise _unsupported(language_model, f"has a head of another shape than {head_shape[0]} x {head_shape[1]}")
    own, expected = language_model.base_model.state_dict(), found.state_dict()
    if own.keys() != expected.keys() or any(own[name].shape != value.shape for name, value in expected.items()):
        raise _unsupported(language_model, f"keeps other weights than the {type(found).__name__} of its configuration")
    parameters = inspect.signature(found.forward).parameters
    if missing := sorted({"inputs_embeds", "attention_mask"} - parameters.keys()):
        raise _unsupported(language_model, f"takes no {' and no '.join(missing)}, as which images are given to it")


@torch.no_grad()
def check_same_logits(model: PreTrainedModel, language_model: PreTrainedModel):
    """Raises `TypeError` where a model scores a few tokens otherwise than the language model it was made of, which
    then scales its embeddings, hidden states or logits in a way that is not the head's. Without weights (on the meta
    device) nothing is compared."""
    parameters = [*model.parameters(), *language_model.parameters()]
    if any(parameter.is_meta for parameter in parameters):
        return
    vocab_size = language_model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(1, PROBE_LENGTH + 1)[None] * max(1, vocab_size // (PROBE_LENGTH + 1)) % vocab_size
    scores = []
    for one in (model, language_model):
        was_training = one.training
        one.eval()
        try:
            scores.append(one(input_ids=ids.to(one.device), use_cache=False).logits.double().cpu())
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _unsupported(language_model, "does not run on embeddings and an attention mask alone") from error
        finally:
            one.train(was_training)
    found, expected = scores
    # Half precision rounds in each layer; scales and shifts that matter are larger.
    tolerance = 0.1 if any(parameter.dtype.itemsize < 4 for parameter in parameters) else 1e-3
    if found.shape != expected.shape or not (found - expected).abs().max() <= tolerance * expected.abs().max():
        raise _unsupported(
            language_model, "scales or shifts what its layers and its head's matrix give, in a way that ETT does not"
        )


__all__ = ["check_parts", "check_same_logits"]
