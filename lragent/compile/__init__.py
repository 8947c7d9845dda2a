"""Rewritten graph -> exported program -> compiled package or eager call -> `Program`."""
