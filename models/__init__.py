"""Where weights come from: names, fetching, checksums, conversion, cache, loading."""
