"""Tools for FX graphs: export without noise, plain graphs, the attention marker."""
