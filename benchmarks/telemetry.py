"""The state of the GPU while it is timed: clocks, temperature, throttling, energy (NVML)."""

from __future__ import annotations

import contextlib

import torch

# reasons for a lower clock that are no fault of the run
_HARMLESS = ("gpu_idle", "application_clocks_setting", "sync_boost", "display_clock_setting")
_REASONS = {
    0x1: "gpu_idle",
    0x2: "application_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


def driver():
    """The driver's version; None without NVML."""
    with _nvml() as nvml:
        return nvml and _text(nvml.nvmlSystemGetDriverVersion())


class Telemetry:
    """What NVML says of a CUDA device; on a CPU, or without NVML, nothing."""

    def __init__(self, device):
        self.nvml = self.handle = None
        self.reason = "a CPU has none" if device == "cpu" else None
        if device == "cpu":
            return
        with _nvml(keep=True) as nvml:
            if nvml is None:
                self.reason = "nvidia-ml-py does not load"
                return
            try:
                self.handle = nvml.nvmlDeviceGetHandleByUUID(_uuid())
            except nvml.NVMLError:
                self.reason = "NVML does not know this device"
                return
            self.nvml = nvml

    def energy_j(self):
        """Joules since the driver was loaded; None where the counter is missing."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def sample(self):
        """{sm_mhz, memory_mhz, temperature_c, power_w, slowed_by}, as far as it is known."""
        if self.nvml is None:
            return {}
        n = self.nvml
        power = self._ask("nvmlDeviceGetPowerUsage")
        found = {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", n.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1e3,
            "slowed_by": slowed_by(self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0),
        }
        return {name: x for name, x in found.items() if x is not None}

    def _ask(self, function, *arguments):
        if self.nvml is None:
            return None
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):
            # newer libraries drop old questions
            return None


def slowed_by(bits):
    """What NVML's bit field gives as reasons for a lower clock, the harmless ones left out."""
    return [name for bit, name in _REASONS.items() if bits & bit and name not in _HARMLESS]


def summed_up(samples):
    """One line of telemetry from several samples: ranges of clocks, the highest temperature."""
    found = {}
    for name in ("sm_mhz", "memory_mhz", "power_w"):
        values = [s[name] for s in samples if name in s]
        if values:
            found[name] = [min(values), max(values)]
    temperatures = [s["temperature_c"] for s in samples if "temperature_c" in s]
    if temperatures:
        found["temperature_c"] = max(temperatures)
    reasons = sorted({reason for s in samples for reason in s.get("slowed_by", ())})
    return found | ({"slowed_by": reasons} if reasons else {})


@contextlib.contextmanager
def _nvml(keep=False):
    """The library, initialised, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        yield None
        return
    except Exception as error:
        # NVMLError has no base class of its own before the import
        if type(error).__module__ != "pynvml":
            raise
        yield None
        return
    try:
        yield pynvml
    finally:
        if not keep:
            pynvml.nvmlShutdown()


def _uuid():
    """The current device's identity, whatever CUDA_VISIBLE_DEVICES calls it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _text(x):
    return x.decode() if isinstance(x, bytes) else x
