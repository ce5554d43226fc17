"""Training: from examples or documents to a measured, registered expert."""
