"""Files and directories on disk: locks, replacing a directory in one step, checked files."""
