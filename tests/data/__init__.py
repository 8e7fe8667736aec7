"""Tests of the data modules: rows, examples, samples, batches."""
