"""From documents to rows: mined by a model, or rewritten without one."""
