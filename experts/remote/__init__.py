"""A black box behind an OpenAI-compatible server, steered by a small expert of this process, or helped by what that writes."""
