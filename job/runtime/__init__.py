"""This process: its logs, signals, watchdog and threads.

The only room, with `machine`, that keeps state in modules: signals and standard output belong to
the process. It knows nothing of a run, a store or a model.
"""
