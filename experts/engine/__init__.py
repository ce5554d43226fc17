"""The decoder of local experts: one model, many adapters, one worker thread."""
