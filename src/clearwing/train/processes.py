"""Several processes on one machine: started, watched and ended together; and Ctrl-C handed to the right one."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from clearwing.types import ClearwingError

GRACE = 5.0
"""Seconds that the other processes have to end by themselves when one has failed."""
RESUME = "what was saved stays; go on with --resume"
LOST = "process group"
"""The argument of the error of a process that only found the others gone: what they say themselves comes first."""
_STOPS = (signal.SIGINT, signal.SIGTERM)


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
