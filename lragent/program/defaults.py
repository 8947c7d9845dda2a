"""Defaults of engine options for the Python API, the engine and the command line. Importing this module is cheap."""

from typing import Final

SHARING: Final = "base_lr_shared"
TUNED_SHARING: Final = "base_lr_shared"  # the scheme that adapters are tuned for
KV_MEMORY: Final = "2GiB"
MAX_BATCH_TOKENS: Final = 2048
BACKEND: Final = "auto"
ATTENTION: Final = "auto"
DEVICE: Final = "cpu"
