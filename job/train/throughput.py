"""How much of a machine training uses: model FLOPs utilization (MFU).

Chowdhery et al. 2022, "PaLM", appendix B: the FLOPs that the model needs for the tokens it was
trained on, over what the devices could have done meanwhile. Padding, recomputation and attention
scores earn nothing. Frozen weights need 4 FLOPs a parameter and token instead of 6: 2 forward,
2 for the gradient of the activations and none for their own. The head counts only where there
is a loss.
"""

from job import accelerators


def training_flops(body: int, head: int, tokens: int, loss_tokens: int) -> float:
    """FLOPs that training an adapter needs.

    Args:
        body: parameters of the blocks; the head's are
        head: vocabulary times width.
        tokens: without padding.
        loss_tokens: those that have a loss.
    """
    return 4.0 * (body * tokens + head * loss_tokens)


def utilization(flops: float, seconds: float, device_kind: str, devices: int) -> float | None:
    """MFU, between 0 and 1; None where the peak of the device is not known."""
    found = accelerators.find(device_kind)
    if found is None or found.peak_flops is None or seconds <= 0:
        return None
    return flops / (seconds * devices * found.peak_flops)
