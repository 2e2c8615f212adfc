"""How a model is made: one trainer, its losses and its data, and the stages as recipes."""

from .arguments import ETTTrainingArguments
from .data import ETTCollator, FolderExamples, InMemoryDataset, PreparedDataset, SceneExamples
from .recipes import Recipe, available_recipes, load_recipe
from .run import RECORD_NAME, run_recipe
from .trainer import ETTTrainer, newest_checkpoint, train_only

__all__ = [
    "RECORD_NAME",
    "ETTCollator",
    "ETTTrainer",
    "ETTTrainingArguments",
    "FolderExamples",
    "InMemoryDataset",
    "PreparedDataset",
    "Recipe",
    "SceneExamples",
    "available_recipes",
    "load_recipe",
    "newest_checkpoint",
    "run_recipe",
    "train_only",
]
