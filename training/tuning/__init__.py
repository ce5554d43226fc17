"""What the recipes share: token rows, batches, a training that survives its end."""
