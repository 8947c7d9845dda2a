"""Loads a model directory or a live model, with adapters, into a `LoadedModel`."""
