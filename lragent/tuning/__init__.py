"""Tunes adapters for a sharing scheme: trajectories in, PEFT adapters out, trained through the cache they will read."""
