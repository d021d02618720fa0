"""The device of a process: a Fabric of its own, and which one of several it is."""

from __future__ import annotations

import inspect
import logging
import os
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from clearwing.train.collectives import others_may_end
from clearwing.train.memory import keep_freed_memory
from clearwing.types import ClearwingError

TIMEOUT = 300.0
"""Seconds that a process waits for the others in one step before it gives up."""


def make_fabric(
    device: str = "auto", precision: str = "auto", *, devices: int = 1, nodes: int = 1, timeout: float = TIMEOUT
) -> Fabric:
    """A launched Fabric for this process: cpu, cuda, cuda:1, mps or auto; bfloat16 where the processor has it.

    In a process that `in_processes`, torchrun or srun started as one of several, it is one rank of a group: gloo on
    the CPU, NCCL on CUDA; modules are set up with DistributedDataParallel, which means the gradients. `devices` and
    `nodes` are then what the group has, or 1. A collective that waits longer than `timeout` seconds raises.

    Raises ClearwingError where the devices are not there, and in a process on its own that is told of several.
    """
    environment, local, machines = _group()
    if (devices, nodes) not in ((1, 1), (local, machines)):
        found = f"{local} processes on each of {machines} machines" if local * machines > 1 else "one process"
        mend = f"this is {found}; leave --devices and --nodes out, or start it by in_processes, torchrun or srun"
        raise ClearwingError("--devices", f"{devices} and --nodes {nodes}", mend)
    check_devices(device, local)
    kind, _, index = device.partition(":")
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(kind) else "float32"
    # Fabric announces its precision on every start; the jobs say it once, in their own words.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator={"auto": "auto", "cuda": "gpu"}.get(kind, kind),
        devices=[int(index)] if index else local,
        num_nodes=machines,
        strategy=_data_parallel(_takes_cuda(kind), timeout) if local * machines > 1 else "auto",
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
        plugins=[environment],
    )
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with others_may_end(fabric):  # nobody may listen at the address of the first process, or not all come
        fabric.launch()
    return fabric


def check_devices(device: str, devices: int = 1) -> None:
    """Raise ClearwingError where this machine has no such device, or not so many."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (index.isdigit() and kind == "cuda")):
        raise ClearwingError("--device", device, "give auto, cpu, cuda, cuda:1 or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise ClearwingError("--device", device, f"this machine has {count} CUDA devices; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ClearwingError("--device", device, "this machine has no MPS device; use cpu")
    if devices < 1:
        raise ClearwingError("--devices", devices, "give at least 1")
    if devices == 1:
        return
    if index or _takes_mps(kind):
        raise ClearwingError("--devices", devices, f"--device {device} is one device; use cuda or cpu")
    most, what = (count, "CUDA devices") if _takes_cuda(kind) else (max(2, os.cpu_count() or 1), "CPU cores")
    if devices > most:
        raise ClearwingError("--devices", devices, f"give at most {most}: this machine has {most} {what}")


def has_bfloat16(kind: str = "auto") -> bool:
    """Whether the device multiplies in bfloat16 in hardware (AVX512-BF16 on a CPU, Ampere or later on CUDA)."""
    if _takes_cuda(kind):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if _takes_mps(kind):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported())


def _takes_cuda(kind: str) -> bool:
    return kind in ("auto", "cuda") and torch.cuda.is_available()


def _takes_mps(kind: str) -> bool:
    return kind == "mps" or (kind == "auto" and torch.backends.mps.is_available())


def _data_parallel(cuda: bool, timeout: float) -> DDPStrategy:
    # Synchronised batch norm keeps the buffers equal, so none is sent; torch 2.15 gave the setting another name.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    settings: dict[str, Any] = {"find_unused_parameters": False, "gradient_as_bucket_view": True, buffers: False}
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # what is agreed on need not wait for the GPU
    return DDPStrategy(process_group_backend=backend, timeout=timedelta(seconds=timeout), **settings)


def _group() -> tuple[ClusterEnvironment, int, int]:
    """How this process was started: who knows its rank, processes on this machine, machines."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1 and "LOCAL_WORLD_SIZE" in env:  # torchrun and `in_processes` set the same
        local = int(env["LOCAL_WORLD_SIZE"])
        return TorchElasticEnvironment(), local, int(env["WORLD_SIZE"]) // local
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "SLURM_NTASKS_PER_NODE" not in env:  # Fabric asks for it
            raise ClearwingError("srun", "--ntasks", "give --ntasks-per-node, in the job and to srun")
        return SLURMEnvironment(), int(env["SLURM_NTASKS_PER_NODE"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
    return LightningEnvironment(), 1, 1


def is_child() -> bool:
    """Whether this process was started as one of several, by `in_processes`, torchrun or srun."""
    _, local, machines = _group()
    return local * machines > 1


def is_first() -> bool:
    """Whether this is the process that writes and tells: the first of its group, or one on its own."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0" or not is_child()
