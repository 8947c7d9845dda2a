"""The artifact directory: written, updated, opened."""
