"""The contract of compiled program and runtime: cache schema, step inputs, dtypes."""
