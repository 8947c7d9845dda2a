"""All uses of private APIs of torch, transformers and PEFT: one file per library, one small function per use.

Every function names the private API and the versions in which it was seen. `tests/compat/` has a test per function that
fails by name when the API changes.
"""
