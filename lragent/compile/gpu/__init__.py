"""Runs steps on a GPU: inputs in one copy, padded sizes, CUDA graphs."""
