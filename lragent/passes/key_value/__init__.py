"""Derives from the graph how K and V are computed from their projections."""
