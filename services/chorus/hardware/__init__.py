"""What this machine is and how busy it is, read from the system and from NVIDIA's driver."""

from chorus.hardware.identity import node_id
from chorus.hardware.inventory import GpuSupport, HardwareLoad, Inventory
from chorus.hardware.nvml import Nvml, NvmlGpus

__all__ = ["GpuSupport", "HardwareLoad", "Inventory", "Nvml", "NvmlGpus", "node_id"]
