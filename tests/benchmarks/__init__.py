"""Benchmarks: each compares with a peer or with the published loop in the same process, and
prints ratios. They are not timed tests; run one with `uv run python -m tests.benchmarks.NAME`."""
