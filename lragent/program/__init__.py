"""The contract between compiled program and runtime: cache schema, step inputs, dtypes."""
