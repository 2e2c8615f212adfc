"""Settings and tiny fixtures shared by every test: nothing is downloaded, and a few threads are enough."""

import os

# Read by the libraries when they are first imported, hence here and not in a fixture.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
