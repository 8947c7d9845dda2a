"""Rollouts over files: tasks are read from JSON lines, and every finished task becomes one line of a result file."""
