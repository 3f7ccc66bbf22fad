"""tspipe: run a teacher once, cache its features, train many students against the file."""
