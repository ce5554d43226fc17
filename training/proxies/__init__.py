"""Experts that steer a model which stays as it is, and the small models for them."""
