"""Stand-ins of public text tokenizers, for tests: what they add before a text, how they name their tokens, whether
they have padding and EOS."""

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "system user assistant describe the image . : , ? a red circle blue square what color is it green".split()
CHATML = ("<|im_start|>", "<|im_end|>")
QWEN_VISION = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


def finish(tokenizer: Tokenizer, special: tuple[str, ...], adds_bos: bool, **named: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens, which puts its BOS before a text if asked to."""
    tokenizer.add_special_tokens(list(dict.fromkeys([*named.values(), *special])))
    if adds_bos:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(special), **named)


def words(special: tuple[str, ...] = (), adds_bos: bool = False, **named) -> PreTrainedTokenizerFast:
    """Words between spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{word: i + 1 for i, word in enumerate(WORDS)}}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return finish(tokenizer, special, adds_bos, unk_token="<unk>", **named)


def byte_pairs(special: tuple[str, ...] = (), adds_bos: bool = False, **named) -> PreTrainedTokenizerFast:
    """Bytes, and pairs of a space and a letter: tokens merge over the ends of words, as in GPT-2 or Llama 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in string.ascii_letters]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer, special, adds_bos, **named)


def sentence_pieces(special: tuple[str, ...] = (), adds_bos: bool = False, **named) -> PreTrainedTokenizerFast:
    """Letters after a mark for spaces, which also stands before a text, as in Llama 2 or Mistral."""
    letters = ["<unk>", "▁", *string.printable]
    merges = [("▁", letter) for letter in string.ascii_letters]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return finish(tokenizer, special, adds_bos, unk_token="<unk>", **named)


TOKENIZERS = {
    "words with bos": lambda: words(adds_bos=True, bos_token="<s>", eos_token="</s>"),
    "words without bos": lambda: words(eos_token="</s>", pad_token="<pad>"),
    "llama 2": lambda: sentence_pieces(adds_bos=True, bos_token="<s>", eos_token="</s>"),
    "llama 3": lambda: byte_pairs(adds_bos=True, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "gemma 3": lambda: sentence_pieces(
        ("<start_of_turn>", "<end_of_turn>"), True, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ),
    "gpt 2": lambda: byte_pairs(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
    "qwen 2.5 base": lambda: byte_pairs((*CHATML, *QWEN_VISION), eos_token="<|endoftext|>", pad_token="<|endoftext|>"),
    "qwen 2.5 instruct": lambda: byte_pairs(
        (CHATML[0], *QWEN_VISION, "<|endoftext|>"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ),
    "smollm 2 base": lambda: byte_pairs(CHATML, bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
    "smollm 2 instruct": lambda: byte_pairs(
        ("<|endoftext|>",), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    ),
}
ENDS = {
    "words with bos": "</s>",
    "words without bos": "</s>",
    "llama 2": "</s>",
    "llama 3": "<|eot_id|>",
    "gemma 3": "<eos>",
    "gpt 2": "<|endoftext|>",
    "qwen 2.5 base": "<|im_end|>",
    "qwen 2.5 instruct": "<|im_end|>",
    "smollm 2 base": "<|im_end|>",
    "smollm 2 instruct": "<|im_end|>",
}
"""The token with which an answer ends, and at which generation stops."""

ADDS_BOS = {"words with bos": "<s>", "llama 2": "<s>", "llama 3": "<|begin_of_text|>", "gemma 3": "<bos>"}
