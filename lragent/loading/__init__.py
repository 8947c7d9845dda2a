"""Model directory or live model, with adapters -> `LoadedModel`."""
