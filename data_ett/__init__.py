"""From the rows of a dataset to batches.

- A *row* is what a dataset holds; an *example* is a dict of `images` (a list of images) and, by task, `text` or
  `messages`; a *prepared* example has token ids and pixels or codes; a *batch* is what the trainer takes.
- `local_files` finds files, `rows` and `tars` read rows and make examples of them, `image_rows` opens their images;
  `sources` gives examples by number, `stream` one after the other, `mixture` from several sources.
- `tasks` says which of their tokens are predicted, `preparation` makes numbers of them, `collator` makes batches.
- `tokenization` and `recaption` make datasets of datasets, in `shards`: codes with a `fingerprint`, captions.
"""

from .collator import IGNORED, ETTCollator, branch_layout, pack
from .conversations import ExampleError, read_conversation
from .mixture import MixedExamples
from .preparation import InMemoryDataset, PreparedDataset
from .sources import FolderExamples, SceneExamples
from .stream import ExampleStream, MixedStream, PreparedStream
from .tasks import TASKS

__all__ = [
    "IGNORED",
    "TASKS",
    "ETTCollator",
    "ExampleError",
    "ExampleStream",
    "FolderExamples",
    "InMemoryDataset",
    "MixedExamples",
    "MixedStream",
    "PreparedDataset",
    "PreparedStream",
    "SceneExamples",
    "branch_layout",
    "pack",
    "read_conversation",
]
