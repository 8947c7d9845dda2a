"""Reports about artifacts and models."""
