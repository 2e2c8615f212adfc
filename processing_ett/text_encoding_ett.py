"""Texts to token ids, the same in training and in inference: the tokens that begin a text, the places where a text is
cut, the token that ends an answer, and padding.

- A tokenizer merges characters into tokens, so the ids of a prompt are not always a prefix of the ids of prompt and
  answer. Texts are therefore cut where answers begin and where they end, and each piece is tokenized by itself.
- Many tokenizers (Llama, Gemma, Mistral) add BOS in a post-processor, which only sees whole texts. Here each text gets
  the same tokens once, however many pieces it has.
"""

import re
from functools import lru_cache
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

PAD_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
)
"""Padding tokens of public tokenizers that do not always name them as such."""

_PROBE = "ANSWER"


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that a tokenizer puts before every text: BOS, or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def begin_once(ids: list[int], beginning: list[int]) -> list[int]:
    """`ids` with `beginning` before them, unless a chat template wrote it already."""
    return ids if ids[: len(beginning)] == beginning else beginning + ids


@lru_cache(maxsize=64)
def chat_layout(chat_template: str, special_tokens: tuple[tuple[str, Any], ...]) -> tuple[str, str]:
    """The text after which an answer begins, and the text after an answer, as a chat template writes them; empty texts
    for a template without them."""

    def render(*messages: dict[str, str], **options) -> str:
        for typed in (False, True):
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} if typed else m for m in messages]
            try:
                options |= dict(special_tokens)
                texts, _ = render_jinja_template([chat], chat_template=chat_template, **options)
            except (TemplateError, TypeError):
                continue
            if all(message["content"] in texts[0] for message in messages):
                return texts[0]
        return ""

    question = {"role": "user", "content": "QUESTION"}
    asked, request = render(question), render(question, add_generation_prompt=True)
    answered = render(question, {"role": "assistant", "content": _PROBE})
    return request.removeprefix(asked) if request.startswith(asked) else "", answered.rpartition(_PROBE)[2]


def find_end_token(tokenizer: PreTrainedTokenizerBase, after_answer: str) -> str | None:
    """The first special token in the text after an answer; None where there is none."""
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    alone = after_answer.strip()
    special |= {alone} & tokenizer.get_vocab().keys()
    names = sorted(filter(str.strip, special), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), after_answer) if names else None
    return found.group() if found else None


def choose_padding(tokenizer: PreTrainedTokenizerBase):
    """Names a padding token for a tokenizer without one, from the tokens that it has: one that ends no answer, if
    possible. A tokenizer with no such token, no unknown token and no EOS stays without."""
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    known = [name for name in PAD_TOKENS if name in vocabulary and name != tokenizer.eos_token]
    names = [name for name in (*known, tokenizer.unk_token, tokenizer.eos_token) if name is not None]
    if names:
        tokenizer.pad_token = names[0]


def cut(text: str, borders: tuple[str, ...]) -> list[str]:
    """A text in pieces, each of which ends with one of `borders`, or with the text.

    >>> cut("user: hi</s>assistant: hello</s>", ("assistant: ", "</s>"))
    ['user: hi</s>', 'assistant: ', 'hello</s>']
    """
    borders = tuple(filter(None, borders))
    ends = [match.end() for match in re.finditer("|".join(map(re.escape, borders)), text)] if borders else []
    starts = [0, *ends]
    return [piece for start, end in zip(starts, [*ends, len(text)], strict=True) if (piece := text[start:end])]


class TextEncoder:
    """Stands for a tokenizer in a processor's call.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizes the pieces.
        borders (`tuple[str, ...]`): Texts after which a text is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, borders: tuple[str, ...]):
        self.tokenizer, self.borders = tokenizer, borders

    def __getattr__(self, name: str):
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(
        self,
        text: str | list[str],
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """
        Args:
            text (`str` or `list[str]`).
            add_special_tokens (`bool`): Begin each text with the tokens that the tokenizer puts before texts, once.
            padding, truncation, max_length, pad_to_multiple_of, padding_side, return_tensors: As of the tokenizer.
                Texts of one length need no padding token.
            kwargs: Further options of the tokenizer, such as `return_offsets_mapping`.

        Raises:
            ValueError: Texts differ in length, and the tokenizer has no padding token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        beginning = beginning_ids(self.tokenizer) if add_special_tokens else []
        rows = [self._encode(one, beginning, kwargs) for one in texts]
        if truncation and max_length is not None:
            kept = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
            rows = [{name: values[kept] for name, values in row.items()} for row in rows]
        if padding not in (False, "do_not_pad"):
            length = max((len(row["input_ids"]) for row in rows), default=0)
            if padding == "max_length":
                length = max_length or self.tokenizer.model_max_length
            if pad_to_multiple_of:
                length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
            self._pad(rows, length, padding_side or self.tokenizer.padding_side)
        return BatchEncoding(
            {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}, tensor_type=return_tensors
        )

    def _encode(self, text: str, beginning: list[int], options: dict[str, Any]) -> dict[str, list]:
        pieces = cut(text, self.borders)
        encoded = self.tokenizer(pieces, add_special_tokens=False, **options) if pieces else {"input_ids": []}
        encoded = {name: list(values) for name, values in encoded.items()}
        if "offset_mapping" in encoded:
            start = 0
            for index, piece in enumerate(pieces):
                spans = encoded["offset_mapping"][index]
                encoded["offset_mapping"][index] = [(begin + start, end + start) for begin, end in spans]
                start += len(piece)
        row = {name: list(chain.from_iterable(values)) for name, values in encoded.items()}
        count = len(begin_once(row["input_ids"], beginning)) - len(row["input_ids"])
        row["input_ids"] = beginning[:count] + row["input_ids"]
        if options.get("return_attention_mask") is not False:
            row["attention_mask"] = [1] * len(row["input_ids"])
        fillings = {"token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        return row | {name: [value] * count + row[name] for name, value in fillings.items() if name in row}

    def _pad(self, rows: list[dict[str, list]], length: int, side: str):
        tokenizer = self.tokenizer
        fillings = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }
        for row in rows:
            missing = length - len(row["input_ids"])
            if missing <= 0:
                continue
            if tokenizer.pad_token_id is None:
                raise ValueError(
                    "The texts differ in length, and the tokenizer has no padding token; set "
                    "processor.tokenizer.pad_token, or give one text at a time."
                )
            for name, values in row.items():
                padding = [fillings[name]] * missing
                row[name] = values + padding if side == "right" else padding + values


__all__ = [
    "TextEncoder",
    "beginning_ids",
    "begin_once",
    "chat_layout",
    "choose_padding",
    "cut",
    "find_end_token",
]
