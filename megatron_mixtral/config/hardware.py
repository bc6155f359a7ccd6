"""Figures of the usual GPUs, from NVIDIA's data sheets: what the planner counts with, and what MFU refers to."""

import difflib
from dataclasses import dataclass

from megatron_mixtral.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One kind of GPU. `reported` is the part of torch's name for it by which it is known.

    `tflops` is the dense bf16 peak with sums in fp32, in TFLOP/s (the sheets of Hopper and Blackwell give it with
    sparsity: half of it), `memory` in GB (1e9 bytes; what torch reports is up to 7 % more), `bandwidth` of that memory
    in GB/s, `link` to the other devices of a node in Gb/s, one direction: NVLink, or a card's 16 lanes of PCIe.
    """

    reported: str
    tflops: float
    memory: float
    bandwidth: float
    link: float


# A reported name that contains another one comes before it.
DEVICES = {
    # Data sheet "NVIDIA Blackwell": a GPU of GB200 NVL72 5 PFLOP/s with sparsity, of HGX B200 4.5.
    "gb200": Device("GB200", 2500.0, 186.0, 8000.0, 7200.0),
    # GB300 NVL72: 360 PFLOP/s with sparsity and 20 TB for 72. HGX B300: 36 and 2.1 TB for 8, of chips of 288 GB.
    "gb300": Device("GB300", 2500.0, 279.0, 8000.0, 7200.0),
    "b300": Device("B300", 2250.0, 270.0, 7700.0, 7200.0),
    "b200": Device("B200", 2250.0, 180.0, 7700.0, 7200.0),
    # Data sheets "NVIDIA H200" and "NVIDIA H100": with sparsity 1,979 (SXM), 1,671 (NVL) and 1,513 (PCIe) TFLOP/s.
    "h200-nvl": Device("H200 NVL", 835.5, 141.0, 4800.0, 3600.0),
    "h200": Device("H200", 989.4, 141.0, 4800.0, 3600.0),
    "h100-pcie": Device("H100 PCIe", 756.0, 80.0, 2000.0, 512.0),
    "h100-nvl": Device("H100 NVL", 835.5, 94.0, 3900.0, 2400.0),
    "h100-sxm": Device("H100", 989.4, 80.0, 3350.0, 3600.0),
    # As the H100 SXM, with 400 GB/s of NVLink (both directions); the H20 has 296 TFLOP/s with sparsity.
    "h800-sxm": Device("H800", 989.4, 80.0, 3350.0, 1600.0),
    "h20": Device("H20", 148.0, 96.0, 4000.0, 3600.0),
    # Data sheet "NVIDIA A100": SXM; the A800 has 400 GB/s of NVLink in the place of 600.
    "a100-40g": Device("A100-SXM4-40GB", 312.0, 40.0, 1555.0, 2400.0),
    "a100-80g": Device("A100", 312.0, 80.0, 2039.0, 2400.0),
    "a800-80g": Device("A800", 312.0, 80.0, 2039.0, 1600.0),
    # Data sheet "NVIDIA L40S".
    "l40s": Device("L40S", 362.0, 48.0, 864.0, 256.0),
    # Data sheet of the Server Edition: 1,597 GB/s and 120 TFLOP/s in fp32, no dense bf16: four times fp32, as below.
    "rtx-pro-6000-server": Device("RTX PRO 6000 Blackwell Server", 480.0, 96.0, 1597.0, 512.0),
    # White paper "RTX PRO Blackwell", Workstation Edition.
    "rtx-pro-6000": Device("RTX PRO 6000", 503.8, 96.0, 1792.0, 512.0),
    # Data sheet: 1,457 TFLOP/s in fp8 with sparsity, a quarter of it. White paper "GA102" v2.0, appendix C.
    "rtx-6000-ada": Device("RTX 6000 Ada", 364.2, 48.0, 960.0, 256.0),
    "rtx-a6000": Device("RTX A6000", 154.8, 48.0, 768.0, 256.0),
    # White papers "RTX Blackwell", "Ada" and "GA102" (appendix A). GeForce cards add in fp32 at half speed.
    "rtx-5090": Device("RTX 5090", 209.5, 32.0, 1792.0, 512.0),
    "rtx-4090": Device("RTX 4090", 165.2, 24.0, 1008.0, 256.0),
    "rtx-3090": Device("RTX 3090", 71.0, 24.0, 936.2, 256.0),
}
# Kinds that are called like another one, and something more; MIG: a part of one.
_OTHERS = ("Laptop", "Max-Q", "4090 D", "5090 D", "3090 Ti", "H800 PCIe", " MIG ")


def find(reported: str) -> Device | None:
    """The device that torch calls by this name, None where it is not known."""
    if any(word in reported for word in _OTHERS):
        return None
    return next((device for device in DEVICES.values() if device.reported in reported), None)


def named(name: str) -> Device:
    """The device of this name in `DEVICES`, whichever case. `ConfigError` with its neighbours for another name."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-").removeprefix("geforce-")
    if key in DEVICES:
        return DEVICES[key]
    near = [known for known in DEVICES if key and (known.startswith(key) or key.startswith(known))]
    near = near or difflib.get_close_matches(key, DEVICES, 3, cutoff=0.7)
    meant = f"; is it {' or '.join(near)}?" if near else "."
    raise ConfigError(f"--device {name}: no such device{meant} Known are {', '.join(DEVICES)}; of another give "
                      "--device-memory, --device-tflops, --device-bandwidth and --intra-node-gbps")
