"""How a model is made: one trainer, its losses and its data, and the stages as recipes."""

from .arguments import ETTTrainingArguments
from .checkpoints import newest_checkpoint
from .data import ETTCollator, FolderExamples, InMemoryDataset, PreparedDataset, SceneExamples
from .finite import NonFiniteLossError
from .folders import RECORD_NAME, check_output_folder
from .interruption import TrainingInterrupted
from .recipes import Recipe, available_recipes, load_recipe
from .run import library_versions, read_record, run_recipe, write_record
from .trainer import ETTTrainer, train_only

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
