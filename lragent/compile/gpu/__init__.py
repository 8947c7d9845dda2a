"""Steps on a GPU: one copy of the inputs, CUDA graphs of padded sizes."""
