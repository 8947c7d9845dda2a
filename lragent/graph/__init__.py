"""Passes and tools for FX graphs: export without noise, plain graphs, the two marker ops."""
