"""Pages of the cache: pool, page tables, prefix index, memory."""
