"""Figures of the usual GPUs, from NVIDIA's data sheets: what the planner counts with, and what MFU refers to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of GPU. `reported` is the part of torch's name for it by which it is known.

    `tflops` is the dense bf16 peak in TFLOP/s (the sheets of Hopper and Blackwell give it with sparsity: half of it),
    `memory` in GB (1e9 bytes), `bandwidth` of that memory in GB/s, `link` to the other devices of a node in Gb/s, one
    direction.
    """

    reported: str
    tflops: float
    memory: float
    bandwidth: float
    link: float


# A reported name that contains another one comes before it.
DEVICES = {
    "gb200": Device("GB200", 2500.0, 186.0, 8000.0, 7200.0),
    "gb300": Device("GB300", 2500.0, 288.0, 8000.0, 7200.0),
    "b300": Device("B300", 2250.0, 288.0, 8000.0, 7200.0),
    "b200": Device("B200", 2250.0, 180.0, 8000.0, 7200.0),
    "h200": Device("H200", 989.4, 141.0, 4800.0, 3600.0),
    "h100-pcie": Device("H100 PCIe", 756.0, 80.0, 2000.0, 512.0),
    "h100-nvl": Device("H100 NVL", 835.5, 94.0, 3900.0, 2400.0),
    "h100-sxm": Device("H100", 989.4, 80.0, 3350.0, 3600.0),
    "h800-sxm": Device("H800", 989.4, 80.0, 3350.0, 1600.0),
    "h20": Device("H20", 148.0, 96.0, 4000.0, 3600.0),
    "a100-40g": Device("A100-SXM4-40GB", 312.0, 40.0, 1555.0, 2400.0),
    "a100-80g": Device("A100", 312.0, 80.0, 2039.0, 2400.0),
    "a800-80g": Device("A800", 312.0, 80.0, 2039.0, 1600.0),
    "l40s": Device("L40S", 362.0, 48.0, 864.0, 256.0),
    "rtx-pro-6000": Device("RTX PRO 6000", 503.8, 96.0, 1792.0, 512.0),
    "rtx-6000-ada": Device("RTX 6000 Ada", 364.2, 48.0, 960.0, 256.0),
    "rtx-a6000": Device("RTX A6000", 154.8, 48.0, 768.0, 256.0),
    "rtx-5090": Device("RTX 5090", 209.5, 32.0, 1792.0, 512.0),
    "rtx-4090": Device("RTX 4090", 165.2, 24.0, 1008.0, 256.0),
    "rtx-3090": Device("RTX 3090", 71.0, 24.0, 936.2, 256.0),
}
_SLOWER = ("Laptop", "Max-Q", "4090 D", "5090 D")  # kinds that are called like a faster one, and something more


def find(reported: str) -> Device | None:
    """The device that torch calls by this name, None where it is not known."""
    if any(word in reported for word in _SLOWER):
        return None
    return next((device for device in DEVICES.values() if device.reported in reported), None)
