"""Where something ran, for whoever wants the same figures."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def environment(fabric: Any) -> dict[str, Any]:
    """Versions, processor, devices and precision of a run."""
    from clearwing import __version__

    about = {
        "clearwing": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "precision": str(fabric._precision.precision),
    }
    if fabric.device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(fabric.device)
    return about


def processor_name() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
