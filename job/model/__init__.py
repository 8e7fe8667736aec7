"""A KerasHub causal language model as pure functions of its weights: loading, LoRA, attention over
packed rows, decoding, sharding over a mesh.

Not here: adapter files (job.adapters), losses and optimizers (job.train), or scoring (job.evals).
"""
