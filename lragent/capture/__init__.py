"""`LoadedModel` -> `Captured`: one exported graph with attention as a marker op, checked."""
