"""Rows to learn from: read, checked, searched for what is planted, split, put into words."""
