"""The chat template: how turns, their text and their pictures become one text."""

from transformers import PreTrainedTokenizerBase

from .word_tokenizer import is_word_level

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- 'TURN_START' + message['role'] + 'ROLE_END' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- 'IMAGE_TOKEN' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- 'TURN_END' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'TURN_START' + 'assistant' + 'ROLE_END' -}}
{%- endif -%}
"""


def build_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """A Jinja chat template: Qwen's ChatML where the tokenizer has its tokens, without line breaks where these
    would be tokens of their own (word-level tokenizers); else lines such as "user: ..."."""
    if is_word_level(tokenizer):
        turn_start, role_end, turn_end = "<|im_start|>", " ", "<|im_end|>"
    elif "<|im_start|>" in tokenizer.get_vocab():
        turn_start, role_end, turn_end = "<|im_start|>", r"\n", r"<|im_end|>\n"
    else:
        turn_start, role_end, turn_end = "", ": ", (tokenizer.eos_token or "") + r"\n"
    template = CHAT_TEMPLATE.replace("TURN_START", turn_start).replace("ROLE_END", role_end)
    return template.replace("TURN_END", turn_end).replace("IMAGE_TOKEN", image_token)


__all__ = ["build_chat_template"]
