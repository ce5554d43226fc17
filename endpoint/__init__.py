"""The HTTP endpoint's parts: what comes in, what goes out, how errors look."""
