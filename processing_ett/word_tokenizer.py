"""A word-level tokenizer for small, closed vocabularies, and the words that one does not know."""

import re
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<image_start>", "<image_end>")
CHAT_TEXT = "system user assistant describe the image. \n"
"""Words that the chat template and the default captioning prompt need."""

JOINER = "\N{WORD JOINER}"
"""Stands before a character that goes on with the word of the token before it."""


def build_word_tokenizer(vocabulary: Sequence[str], spelled: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """
    A tokenizer whose tokens are lower-case words, punctuation marks and the line break.

    Text is lower-cased; punctuation is split off; white space other than line breaks is dropped. Numbers are spelled
    digit by digit. Decoding puts single spaces between words and sets punctuation as in print: `"a red circle, at the
    top."`.

    Args:
        vocabulary (`Sequence[str]`): Words, in any case; an entry with spaces or punctuation counts as its pieces.
            The words of the chat template and of the default captioning prompt are always included.
        spelled (`Sequence[str]`): Words that are spelled letter by letter, because images show their letters.

    Returns:
        `PreTrainedTokenizerFast`: Padding on the left; `<|im_end|>` ends a text; the tokens of `SPECIAL_TOKENS` come
        first, then the words in alphabetical order.
    """
    spelling = [normalizers.Replace(Regex(r"(?<=\d)(?=\d)"), JOINER)]
    for word in sorted({word.lower() for word in spelled}):
        spelling.append(normalizers.Replace(Regex(rf"\b{re.escape(word)}\b"), JOINER.join(word)))
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *spelling])
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(rf"{JOINER}\w|\n|[^\w\s]"), "isolated"),
        ]
    )
    text = normalizer.normalize_str(" ".join([CHAT_TEXT, *vocabulary, *spelled]))
    words = sorted({word for word, _ in pre_tokenizer.pre_tokenize_str(text)})
    ids = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=[\w<(])"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(rf"(?<=[\n('-]) |^ |{JOINER}"), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>", "<image_start>", "<image_end>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def is_word_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is of the kind that [`build_word_tokenizer`] makes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.model, models.WordLevel)


def unknown_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The words of `text`, each once and in order, that a word-level tokenizer does not know; none for other kinds."""
    if not is_word_level(tokenizer):
        return []
    encoding = tokenizer.backend_tokenizer.encode(text)
    spans = zip(encoding.offsets, encoding.ids, strict=True)
    return list(dict.fromkeys(text[start:end] for (start, end), token in spans if token == tokenizer.unk_token_id))


__all__ = ["SPECIAL_TOKENS", "build_word_tokenizer", "is_word_level", "unknown_words"]
