"""Defaults that the Python API, the engine and the command line have in common; importing this is light."""

KV_MEMORY = "2GiB"
