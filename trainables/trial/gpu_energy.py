"""Energy of a trial: the hardware counter of its GPU, read through NVML."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class EnergyMeter:
    """Joules a GPU takes, of everything that runs on it, since the last reading; None on a CPU, and where NVML fails.

    The driver keeps the counter (mJ since it was loaded; Volta and later): a reading costs one call. `shared`: the
    device is a slice (MIG) of the GPU whose counter is read: the others' energy is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.shared = False
        self._nvml: Any = None
        self._handle: Any = None
        self._millijoules: int | None = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = self._find(device)
            self._millijoules = self._counter()
        except Exception:  # no package, no driver library, no such device, no counter: nothing to read
            self.close()

    def _find(self, device: torch.device) -> Any:
        """NVML's handle of a torch device. Its UUID says which; indices differ under CUDA_VISIBLE_DEVICES."""
        nvml = self._nvml
        index = torch.cuda.current_device() if device.index is None else device.index
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
        except nvml.NVMLError:
            # A slice has its own UUID, no counter, and a GPU that has both.
            handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}"))
            self.shared = True
            return handle
        with contextlib.suppress(nvml.NVMLError):  # a GPU that cannot be sliced has no such mode
            self.shared = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
        return handle

    def _counter(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def read(self) -> float | None:
        """Joules since the last reading; None without a counter, or where either reading failed."""
        if self._handle is None:
            return None
        before = self._millijoules
        try:
            now = self._millijoules = self._counter()
        except Exception:  # a GPU that fell off the bus is the training's to report
            self._millijoules = None
            return None
        if before is None or now < before:  # it starts from 0 again when the driver is loaded again
            return None
        return (now - before) / 1000

    def close(self) -> None:
        """Let go of NVML."""
        nvml, self._nvml, self._handle = self._nvml, None, None
        if nvml is not None:
            with contextlib.suppress(Exception):
                nvml.nvmlShutdown()
