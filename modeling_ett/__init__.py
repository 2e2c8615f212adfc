"""The ETT model: configuration, vision tokenizer, language model with projector and heads, image generation.

Importing this package registers ETT with the Auto classes. The other files import nothing of ours but siblings, since
export copies them into a model's folder. This file is not copied.
"""
