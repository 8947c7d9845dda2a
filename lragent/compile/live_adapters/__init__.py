"""Other adapters for a program in memory: read, compared with its agent slots, written into its constants."""
