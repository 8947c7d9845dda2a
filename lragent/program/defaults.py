"""Defaults of engine options for the Python API, the engine and the command line. Importing this module is cheap."""

from typing import Final

AUTO: Final = "auto"
SHARING: Final = AUTO
TUNED_SHARING: Final = "base_lr_shared"  # the scheme that adapters are tuned for
# Largest drift of a scheme that counts as no loss: nats per token of the agent that drifts most. At 0.2 adapters lost
# everything, at 0.04 an agent lost 5% of its turns, at 0.005 to 0.009 nothing was lost (docs/quality.md).
MAX_KL: Final = 0.02
KV_MEMORY: Final = "2GiB"
MAX_BATCH_TOKENS: Final = 2048
BACKEND: Final = "auto"
ATTENTION: Final = "auto"
DEVICE: Final = "cpu"
