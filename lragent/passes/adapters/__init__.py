"""Tensors that the agents' adapters become in a graph."""
