"""Training: packed rows to a LoRA adapter. Batches, loss, step, optimizer, trainer, checkpoints.

This room takes a model, rows and settings and returns LoRA weights. It does not know the stages of
a run, which files a run has besides checkpoints and metrics, or how adapters are written
(`job.adapters`).
"""
