"""A lowered graph as a chain of segments, of which those that are alike are compiled once.

`shapes` finds the size of every value, `cut` says which segment a node is in, `build` makes a graph of each, `kinds`
tells which are the same, `compile_segments` compiles one of each kind, `plan` is the file that says what is called
with what, and `run` calls it.
"""
