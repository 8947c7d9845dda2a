"""Defaults of engine options, shared by the Python API, the engine and the command line; the import is light."""

SHARING = "base_lr_shared"
KV_MEMORY = "2GiB"
MAX_BATCH_TOKENS = 2048
BACKEND = "auto"
ATTENTION = "auto"
DEVICE = "cpu"
