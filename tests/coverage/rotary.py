"""Kinds of rotary embedding that a config may ask for, on a model that rotates whole heads and one that rotates half.

Frequencies are scaled from 16 trained positions on, and the compared text is longer. `longrope` has two sets of
frequencies, and the length of the text decides which one is in force: its text ends before the second.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

TRAINED = 16
SWITCH = 64
_HALF = {"partial_rotary_factor": 0.5}


def _kinds(pairs: int) -> dict[str, dict[str, Any]]:
    trained = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
    return {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "llama3": {**trained, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": trained,
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [2.0 + i for i in range(pairs)],
            "factor": 4.0,
            "original_max_position_embeddings": SWITCH,
        },
    }


# Row of the table -> model type and its rope_parameters.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    f"{model} with {kind}": (model, {"rope_type": kind, "rope_theta": 10000.0, **partial, **settings})
    for model, pairs, partial in (("llama", 8, {}), ("stablelm", 4, _HALF))
    for kind, settings in _kinds(pairs).items()
}


def with_rotary(config: PretrainedConfig, parameters: dict[str, Any]) -> PretrainedConfig:
    """The same config with another rotary embedding."""
    return type(config)(**{**config.to_dict(), "rope_parameters": dict(parameters)})
