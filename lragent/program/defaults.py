"""Defaults of engine options for the Python API, the engine and the command line. Importing this module is cheap."""

SHARING = "base_lr_shared"
KV_MEMORY = "2GiB"
MAX_BATCH_TOKENS = 2048
BACKEND = "auto"
ATTENTION = "auto"
DEVICE = "cpu"
