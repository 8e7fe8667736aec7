"""Commands other than `job run`: plan, manifest, generate, export, fetch and compare.

A command takes checked arguments, reads a spec or a finished run, and prints or writes its result.
Computation is in the rooms below.
"""
