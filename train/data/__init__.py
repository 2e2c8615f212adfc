"""From the rows of a data set to batches.

- A *row* is what a data set holds; an *example* is a dict of `images` (a list of pictures) and, by task, `text` or
  `messages`; a *prepared* example has token ids and pixels or codes; a *batch* is what the trainer takes.
- `choice` says what a recipe's data section means. `rows` and `tars` read rows and make examples of them, which
  `sources` gives by number, `stream` one after the other, `mixture` from several sources.
- `tasks` says which of their tokens are predicted, `preparation` makes numbers of them, `collator` makes batches,
  and `stream_loader` brings a stream's batches to the trainer.
- `tokenization` and `recaption` make data sets of data sets, in `shards`: codes with a `fingerprint`, captions.
"""

from .choice import Examples, Stream, build_examples, describe_data
from .collator import IGNORED, ETTCollator, branch_layout, pack, to_unit_range
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
    "Examples",
    "FolderExamples",
    "InMemoryDataset",
    "MixedExamples",
    "MixedStream",
    "PreparedDataset",
    "PreparedStream",
    "SceneExamples",
    "Stream",
    "branch_layout",
    "build_examples",
    "describe_data",
    "pack",
    "read_conversation",
    "to_unit_range",
]
