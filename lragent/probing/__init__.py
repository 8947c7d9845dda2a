"""Finds facts about a model by running it: masks, rotary frequencies, position offset."""
