"""LoRA adapters on disk: KerasHub's h5, PEFT's folder, merged models; finding an adapter and
starting training from one.

Not for the arithmetic of LoRA in a model (job.model.lora), nor for training it (job.train).
"""
