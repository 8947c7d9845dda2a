"""The differentiable forward of every sharing scheme: rows instead of steps and pages."""
