"""`LoadedModel -> Captured`: exports the model as one graph with attention as a marker op, and checks the graph."""
