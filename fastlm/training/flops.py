"""The peak arithmetic of devices, for model FLOP utilisation (MFU): achieved FLOP/s over the dense peak."""

from __future__ import annotations

import torch

# Dense peak in TFLOP/s from NVIDIA's data sheets: bf16 tensor cores (fp32 accumulation, no sparsity), and plain fp32.
# The first name that occurs in the device's name counts, so the special ones stand before the general ones.
PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("GH200", 989.4, 66.9),
    ("H100 NVL", 835.5, 60.0),
    ("H100 PCIe", 756.5, 51.2),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("A100", 311.9, 19.5),
    ("A800", 311.9, 19.5),
    ("A10G", 70.0, 31.5),
    ("A10", 125.0, 31.2),
    ("A30", 165.0, 10.3),
    ("A40", 149.7, 37.4),
    ("L40S", 362.1, 91.6),
    ("L40", 181.1, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak in FLOP/s at "bf16" or "fp32"; None for a device that is not in the table (every CPU among them)."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), precision)


def peak_flops_of(name: str, precision: str) -> float | None:
    """The same by the device's name, as "NVIDIA H100 80GB HBM3"."""
    words = name.replace("-", " ")
    for known, bf16, fp32 in PEAK_TFLOPS:
        if f" {known} " in f" {words} ":
            return (bf16 if precision == "bf16" else fp32) * 1e12
    return None
