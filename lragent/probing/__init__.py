"""Facts about a model that are found by running it: masks, rotary frequencies, position offset."""
