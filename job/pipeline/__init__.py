"""One run: its stages in order, skipped, run or resumed, and the layout of its folder.

A stage reads its inputs from the run, calls the rooms below and writes their outputs. Not here:
what a stage computes, and commands that are not a run.
"""
