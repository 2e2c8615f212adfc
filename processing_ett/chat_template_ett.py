"""The chat template: how turns, their text and their images become one text."""

from transformers import PreTrainedTokenizerBase

from .word_tokenizer import is_word_level

CHAT_TEMPLATE = """\
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- 'IMAGE_TOKEN' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- 'TURN_START' + message['role'] + 'ROLE_END' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- write(message['content']) + 'END_TOKEN' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- write(message['content']) + 'END_TOKEN' -}}
    {%- endif -%}
    {{- 'BETWEEN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'TURN_START' + 'assistant' + 'ROLE_END' -}}
{%- endif -%}
"""


def build_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """A Jinja chat template: Qwen's ChatML where the tokenizer has its tokens, without line breaks where these
    would be tokens of their own (word-level tokenizers); else lines such as "user: ..."."""
    if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        turn_start, role_end, end_token, between = "", ": ", tokenizer.eos_token or "", r"\n"
    elif is_word_level(tokenizer):
        turn_start, role_end, end_token, between = "<|im_start|>", " ", "<|im_end|>", ""
    else:
        turn_start, role_end, end_token, between = "<|im_start|>", r"\n", "<|im_end|>", r"\n"
    template = CHAT_TEMPLATE.replace("TURN_START", turn_start).replace("ROLE_END", role_end)
    template = template.replace("END_TOKEN", end_token).replace("BETWEEN", between)
    return template.replace("IMAGE_TOKEN", image_token)


__all__ = ["build_chat_template"]
