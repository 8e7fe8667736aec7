"""Memory, FLOPs, time and cost of a spec before anything is spent, by arithmetic or by compiling.

The arithmetic needs neither JAX nor weights; only `tpu_compile` and `cost_analysis` import JAX.
Nothing is run on a device here, and nothing is written.
"""
