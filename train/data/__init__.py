"""From the rows of a data set to batches.

- A *row* is what a data set holds; an *example* is a dict of `images` (a list of pictures) and, by task, `text` or
  `messages`; a *prepared* example has token ids and pixels or codes; a *batch* is what the trainer takes.
- `sources` makes examples of rows, `tasks` says which of their tokens are predicted, `preparation` makes numbers of
  them, `collator` makes batches.
"""

from .collator import IGNORED, ETTCollator, branch_layout, to_unit_range
from .preparation import InMemoryDataset, PreparedDataset
from .sources import FolderExamples, SceneExamples
from .tasks import TASKS

__all__ = [
    "IGNORED",
    "TASKS",
    "ETTCollator",
    "FolderExamples",
    "InMemoryDataset",
    "PreparedDataset",
    "SceneExamples",
    "branch_layout",
    "to_unit_range",
]
