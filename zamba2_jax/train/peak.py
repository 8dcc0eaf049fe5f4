"""How much arithmetic a device can do."""

import jax

# Dense bfloat16 FLOP/s by the makers' data sheets; `device_kind` begins with the key, of several the longest.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that a device can do at most, in bfloat16; None for one that is not in `PEAK_FLOPS`, such as a CPU."""
    known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None
