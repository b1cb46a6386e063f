"""What pytest-benchmark does not know by itself: the GPU."""

import pytest
import torch
from gaugeblock.benchmarks.providers import installed
from gaugeblock.benchmarks.record import device_name, slug
from gaugeblock.benchmarks.telemetry import driver

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# records of machines that differ in these are not compared
_COMPARED = ("device", "torch", "triton", "driver")


def pytest_configure(config):
    # the plugin's own key does not tell one GPU from another: each has a folder of its own
    storage = config.getoption("benchmark_storage", None)
    if storage and not storage.startswith("elasticsearch"):
        config.option.benchmark_storage = f"{storage}/{slug(device_name(_DEVICE))}"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {
        "device": device_name(_DEVICE),
        "driver": driver() if _DEVICE == "cuda" else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
    }


def pytest_benchmark_compare_machine_info(
    config, benchmarksession, machine_info, compared_benchmark
):
    before = compared_benchmark["machine_info"]
    for name in _COMPARED:
        if before.get(name) != machine_info[name]:
            raise pytest.UsageError(
                f"benchmarks: {name} must be the same in both records, it is {machine_info[name]} "
                f"here and {before.get(name)} there; measure both on one machine"
            )
