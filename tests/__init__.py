"""The project's tests; `tests.services` holds the servers that stand in for public services."""
