"""Evaluation of models: tasks, prompts, loglikelihoods and generation, metrics and statistics.

This room takes a model and rows and returns predictions and scores. It does not know the stages
of a run or the layout of its results; `pipeline/` reads the inputs and writes the outputs.
"""
