"""Experts: cards, the registry that keeps them, and how each kind answers."""
