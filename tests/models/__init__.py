"""Tiny random models of several architectures, written to disk with adapters."""

from tests.models.architectures import KINDS, POSITIONS, VOCAB
from tests.models.written import EOS, WrittenModel, quiet, write_model

__all__ = ["EOS", "KINDS", "POSITIONS", "VOCAB", "WrittenModel", "quiet", "write_model"]
