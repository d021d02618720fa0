"""The devices and processes of a run: a Fabric for each process, one that speaks for all, sums over all of them."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clearwing.types import ClearwingError

TIMEOUT = 300.0
"""Seconds that a process waits for the others in one step before it gives up."""
GRACE = 5.0
"""Seconds that the other processes have to end by themselves when one has failed."""
RESUME = "what was saved stays; go on with --resume"
LOST = "process group"
"""The argument of the error of a process that only found the others gone: what they say themselves comes first."""


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
    with _others(fabric):  # nobody may listen at the address of the first process, or not all come
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


def in_processes(function: Callable[..., Any], *args: Any, devices: int, nodes: int = 1, **kwargs: Any) -> Any:
    """What `function(*args, **kwargs)` returns in the first of `devices` new processes on this machine.

    Each calls `make_fabric` for itself and is one rank of a group. This process takes no part: it watches. When one
    of them fails, all are ended, and its ClearwingError is raised here; one that died is named. Ctrl-C and SIGTERM
    are handed to the first as Ctrl-C; a second one ends all. When this process is killed, they end too. What they
    print goes to stderr. As with `multiprocessing`, function and arguments are pickled, and a script that calls this
    needs its `if __name__ == "__main__":`.

    With several `nodes`, call it on each with MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment; it returns
    None where the first process is not.

    >>> in_processes(train, config, devices=2)
    """
    shared = _addresses(devices, nodes)
    first = int(shared["GROUP_RANK"]) * devices
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    try:
        with _signals_held():
            for local in range(devices):
                receiver, sender = context.Pipe(duplex=False)
                environment = shared | {"LOCAL_RANK": str(local), "RANK": str(first + local)}
                process = context.Process(
                    target=_rank, args=(environment, sender, function, args, kwargs), name=f"rank {first + local}"
                )
                process.start()
                sender.close()  # so that the pipe ends when the process does
                processes.append(process)
                pipes[receiver] = process
        with _signals_passed_on(processes[0]):
            value = _watch(pipes, processes[0])
            until = time.monotonic() + 1  # to end in order; what they did is done
            for process in processes:
                process.join(max(until - time.monotonic(), 0))
            return value
    finally:
        for process in processes:
            process.kill()
            process.join()


def _addresses(devices: int, nodes: int) -> dict[str, str]:
    """What torchrun would put into the environment of all processes of this machine."""
    env = os.environ
    if nodes > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in env]):
        mend = f"set {', '.join(missing)} on each machine, or start with torchrun or srun"
        raise ClearwingError("--nodes", nodes, mend)
    if nodes > 1:
        address, port, node = env["MASTER_ADDR"], env["MASTER_PORT"], env["NODE_RANK"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address, port, node = "127.0.0.1", str(free.getsockname()[1]), "0"
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "GROUP_RANK": node,
        "WORLD_SIZE": str(devices * nodes),
        "LOCAL_WORLD_SIZE": str(devices),
    }


def _watch(pipes: dict[Any, Any], first: Any) -> Any:
    """The value that the first process returned, or the error that began the end of all."""
    errors: list[BaseException] = []
    until = math.inf
    while pipes and time.monotonic() < until:
        left = None if until == math.inf else max(until - time.monotonic(), 0)
        for pipe in wait(list(pipes), left):
            process = pipes.pop(pipe)
            done, outcome = _report(pipe, process)
            if done and process is first:
                return outcome
            if not done:
                errors.append(outcome)
                until = min(until, time.monotonic() + GRACE)
    raise next((error for error in errors if getattr(error, "argument", "") != LOST), errors[0])


def _report(pipe: Any, process: Any) -> tuple[bool, Any]:
    """(True, what a process returned) or (False, its error): one that said nothing has died."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return False, ClearwingError("process", f"{process.name} {how}", RESUME, exit_code=1)


def _rank(
    environment: dict[str, str], sender: Connection, function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    """One of the processes that `in_processes` starts."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if environment["RANK"] != "0":
        warnings.simplefilter("ignore")  # the first process gives the same
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if hasattr(os, "setpgrp"):
                os.setpgrp()  # Ctrl-C in a terminal goes to the parent alone, who hands it on once
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            value = function(*args, **kwargs)
            report = True, value if environment["RANK"] == "0" else None
        except (ClearwingError, OSError, KeyboardInterrupt) as error:
            report = False, error
    sender.send_bytes(pickle.dumps(report))  # by value: `send` would share the memory of tensors, which ends with us
    sender.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Keep Ctrl-C waiting, here and in the processes started meanwhile, until they know what to do with it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # by and by, it would let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _signals_passed_on(process: Any) -> Iterator[None]:
    """Hand the first Ctrl-C or SIGTERM to a process as Ctrl-C; the second is ours."""

    def pass_on() -> None:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)

    with first_stop(pass_on):
        yield


@contextlib.contextmanager
def first_stop(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` at the first Ctrl-C or SIGTERM; a second one raises KeyboardInterrupt.

    Only the main thread gets signals; in another one this does nothing.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        act()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_LOST_WORDS = re.compile(r"gloo|NCCL|TCPStore|DistStore|[Cc]onnection (closed|reset|refused)|process group|barrier")


@contextlib.contextmanager
def one_fails_all_stop(fabric: Fabric) -> Iterator[None]:
    """Turn what a collective raises when another process is gone into one clear ClearwingError, with exit code 1.

    gloo raises as soon as the connection ends; NCCL may wait, and is ended by the process that watches
    (`in_processes`, torchrun, srun). A block that ends well leaves the group: no collective after it.
    """
    with _others(fabric):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _others(fabric: Fabric) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no type of its own for this
        if fabric.world_size == 1 or not _LOST_WORDS.search(str(error)):
            raise
        what = str(error).splitlines()[0][:200]
        who = f"rank {fabric.global_rank} lost the others ({what})"
        raise ClearwingError(LOST, who, RESUME, exit_code=1) from error


def agreement(fabric: Fabric) -> Callable[[Sequence[float]], list[float]]:
    """A function of numbers that gives, in all processes, the largest that any of them put in at each place.

    So a flag is up for all where it is up for one, and clocks that differ decide the same. It is exact for float64
    and waits for no GPU.
    """
    return lambda numbers: _reduced(fabric, numbers, torch.distributed.ReduceOp.MAX)


def summed(fabric: Fabric, *scalars: Tensor | float) -> list[float]:
    """The sum over all processes of each scalar, in float64, in all of them."""
    return _reduced(fabric, scalars, torch.distributed.ReduceOp.SUM)


def _reduced(fabric: Fabric, scalars: Sequence[Tensor | float], how: Any) -> list[float]:
    numbers = torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
    if fabric.world_size > 1:
        torch.distributed.all_reduce(numbers, how)
    return numbers.tolist()


def everyone(fabric: Fabric, value: Any) -> list[Any]:
    """What each process has, in order of rank, in all processes; anything that can be pickled."""
    found: list[Any] = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def share(n: int, rank: int, world: int) -> range:
    """The contiguous part of `n` things that is one process's; the parts are equal to one thing, in order of rank.

    >>> [list(share(5, rank, 2)) for rank in (0, 1)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n * rank // world, n * (rank + 1) // world)


def gathered(fabric: Fabric, rows: Tensor, n: int) -> Tensor:  # (len(share), ...) -> (n, ...)
    """The rows of all `n` things, in order and each once, in all processes; each gives those of its `share`."""
    rank, world = fabric.global_rank, fabric.world_size
    parts = [len(share(n, rank, world)) for rank in range(world)]
    if len(rows) != parts[rank]:
        raise ClearwingError("rows", len(rows), f"the share of rank {rank} of {world} is {parts[rank]} of {n}")
    if world == 1:
        return rows
    padded = rows.new_zeros(max(parts), *rows.shape[1:])  # a collective takes tensors of one shape
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in parts]
    torch.distributed.all_gather(every, padded)
    return torch.cat([part[:count] for part, count in zip(every, parts, strict=True)])


def whole_logits(fabric: Fabric, logits: Tensor, n: int, classes: int) -> Tensor:  # (len(share), K) -> (n, K)
    """The logits of all `n` pictures in order, in all processes, from each one's `share`; one without may give none."""
    return gathered(fabric, logits if len(logits) else logits.new_zeros(0, classes), n)
