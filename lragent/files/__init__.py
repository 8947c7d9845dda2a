"""Files and directories on disk: locks, atomic replacement of a directory, files with size and hash."""
