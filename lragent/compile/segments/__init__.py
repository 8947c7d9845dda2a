"""Splits a lowered graph into a chain of segments and compiles equal segments once.

`shapes` infers the shape of every value, `cut` assigns nodes to segments, `build` makes a graph per segment, `kinds`
groups equal segments, `compile_segments` compiles one segment per kind, `plan` stores the calls and their arguments in
a file, and `run` executes it.
"""
