"""Text to token ids and back: loads what transformers' AutoTokenizer is, and encodes pieces of a growing text."""
