"""LoRA adapters on disk: KerasHub's h5, PEFT's folder, merged models; finding an adapter and
starting training from one.

Not here: the arithmetic of LoRA in a model (job.model.lora), nor training it (job.train).
"""
