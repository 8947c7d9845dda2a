"""Every causal LM type of the installed transformers: built tiny, converted, compared with PEFT and definitions."""
