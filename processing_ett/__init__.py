"""Images and text in, tensors out, and back again. Importing this package registers ETT with the Auto classes."""

from .chat_template_ett import build_chat_template
from .image_processing_ett import ETTImageProcessor
from .image_reading_ett import MAX_IMAGE_PIXELS, ImageError, MissingImageError, load_image
from .pipeline_ett import ETTAnyToAnyPipeline, ETTImageToTextPipeline, register_pipelines
from .processing_ett import CAPTION_PROMPT, ETTProcessor
from .word_tokenizer import build_word_tokenizer, unknown_words

__all__ = [
    "CAPTION_PROMPT",
    "MAX_IMAGE_PIXELS",
    "ETTAnyToAnyPipeline",
    "ETTImageProcessor",
    "ETTImageToTextPipeline",
    "ETTProcessor",
    "ImageError",
    "MissingImageError",
    "build_chat_template",
    "build_word_tokenizer",
    "load_image",
    "register_pipelines",
    "unknown_words",
]
