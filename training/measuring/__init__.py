"""Who reaches what on rows that nobody has seen, and whether that is enough."""
