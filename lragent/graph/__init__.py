"""Tools for FX graphs: passes, nodes and arguments, plain graphs, the two marker ops."""
