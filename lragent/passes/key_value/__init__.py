"""How K and V are computed from their projections, derived from the graph."""
