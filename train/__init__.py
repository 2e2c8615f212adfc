"""How a model is made: one trainer, and the stages as recipes.

`run` walks through a recipe; `data` gives the batches, `models` what is trained, `objective` what is minimized,
`checkpointing` keeps it, `monitoring` shows it, `planning` says it all beforehand.
"""

from ett.data_ett import ETTCollator, FolderExamples, InMemoryDataset, PreparedDataset, SceneExamples

from .arguments import ETTTrainingArguments
from .checkpointing.checkpoints import newest_checkpoint
from .checkpointing.finite import NonFiniteLossError
from .checkpointing.folders import RECORD_NAME, check_output_folder
from .checkpointing.interruption import TrainingInterrupted
from .parts import train_only
from .recipes import Recipe, available_recipes, load_recipe
from .run import library_versions, read_record, run_recipe, write_record
from .trainer import ETTTrainer

__all__ = [
    "RECORD_NAME",
    "ETTCollator",
    "ETTTrainer",
    "ETTTrainingArguments",
    "FolderExamples",
    "InMemoryDataset",
    "NonFiniteLossError",
    "PreparedDataset",
    "Recipe",
    "SceneExamples",
    "TrainingInterrupted",
    "available_recipes",
    "check_output_folder",
    "library_versions",
    "load_recipe",
    "newest_checkpoint",
    "read_record",
    "run_recipe",
    "train_only",
    "write_record",
]
