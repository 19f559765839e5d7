"""Benchmarks that hold finial against the machine's limit and against other engines."""
