"""Fits the router."""
