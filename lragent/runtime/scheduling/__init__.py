"""Requests of a step: queues, prefix lookup, batches, bookkeeping."""
