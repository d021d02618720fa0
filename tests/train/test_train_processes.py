"""Several processes: the batch norm, the learning curve and the figures of one, and one word when a process dies.

Starting processes is slow, so two are started once, for all that needs them; the tests look at what they wrote.
"""

import multiprocessing
import os
import pickle
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from clearwing.models.resnet import ResNet6n2
from clearwing.train import processes
from clearwing.train.collectives import agreement, gathered, one_fails_all_stop, share, summed, whole_logits
from clearwing.train.devices import is_child, make_fabric
from clearwing.train.norm import synchronised
from clearwing.train.processes import in_processes
from clearwing.types import ClearwingError

STEPS, BATCH = 8, 12


def network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet6n2(1, 4, widths=(4, 8, 8)).to(memory_format=torch.channels_last)


def pictures():
    """Images (steps, B, 3, 12, 12) and labels, two batches in turn; the halves of a batch have other means."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, BATCH, 3, 12, 12, generator=generator)
    images[:, : BATCH // 2] *= 0.3
    labels = torch.randint(0, 4, (2, BATCH), generator=generator)
    return images.repeat(STEPS // 2, 1, 1, 1, 1), labels.repeat(STEPS // 2, 1)


def learn(fabric):
    """Steps on this process's share of every batch: the losses of the whole batches, and the module."""
    module = network()
    module = synchronised(module) if fabric.world_size > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    wrapped, optimizer = fabric.setup(module, optimizer)
    part = share(BATCH, fabric.global_rank, fabric.world_size)
    losses = []
    for images, labels in zip(*pictures(), strict=True):
        own = images[part.start : part.stop].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(wrapped(own), labels[part.start : part.stop])
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(summed(fabric, loss.detach() * len(part))[0] / BATCH)
    return losses, module


def layer_and_data(dtype):
    """A batch norm with a past, its input and the gradient of its output; the values lie far from zero."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.BatchNorm2d(5, momentum=0.3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for held in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            held.uniform_(0.5, 2, generator=generator)
    x = torch.randn(6, 5, 4, 3, generator=generator, dtype=torch.float64) * torch.arange(1, 7).view(6, 1, 1, 1) + 20
    x, g = x.to(dtype), torch.randn(6, 5, 4, 3, generator=generator, dtype=torch.float64).to(dtype)
    return layer, *(part.contiguous(memory_format=torch.channels_last) for part in (x, g))


def normalise(dtype, part, world=1, cumulative=False):
    """Output, gradients and statistics of a batch norm on some of the pictures."""
    layer, x, g = layer_and_data(dtype)
    layer = synchronised(layer) if world > 1 else layer
    layer.momentum = None if cumulative else layer.momentum
    x = x[part.start : part.stop].requires_grad_()
    y = layer(x)
    y.backward(g[part.start : part.stop])
    found = {"y": y.detach(), "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


KINDS = {"float64": (torch.float64, False), "bfloat16": (torch.bfloat16, False), "cumulative": (torch.float32, True)}


def everything(path, parent):
    """What one of two processes does; the first writes what it saw. At the end the second is killed."""
    print("nothing on stdout")
    fabric = make_fabric("cpu", "float32", devices=2)
    rank = fabric.global_rank
    try:
        with one_fails_all_stop(fabric):
            losses, module = learn(fabric)
            mine = {
                "losses": losses,
                "state": module.state_dict(),
                "agreed": agreement(fabric)([rank, -rank, 0.1]),
                "summed": summed(fabric, 0.1, torch.tensor(rank + 1)),
                "gathered": gathered(fabric, torch.arange(5)[list(share(5, rank, 2))], 5),
                "logits": whole_logits(fabric, torch.ones(1, 3) if rank else torch.empty(0, 0), 1, 3),
                "about": [os.getpid(), is_child(), fabric.world_size, torch.get_num_threads(), os.getppid() == parent],
                "norms": {
                    kind: normalise(dtype, share(6, rank, 2), 2, cumulative)
                    for kind, (dtype, cumulative) in KINDS.items()
                },
            }
            every = [None, None]
            torch.distributed.all_gather_object(every, mine)
            if rank == 0:
                path.write_bytes(pickle.dumps(every))
            fabric.barrier()
            while True:
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                summed(fabric, 1)
    except ClearwingError as error:
        path.with_suffix(".word").write_text(str(error))
        raise


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes saw, one entry a process; what the survivor said; what this process was told, how late."""
    path = tmp_path_factory.mktemp("two") / "seen.pkl"
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with pytest.raises(ClearwingError) as told:
            in_processes(everything, path, os.getpid(), devices=2)
    late = time.time() - path.stat().st_mtime
    assert {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} == {
        k: v for k, v in before.items() if k != "OMP_NUM_THREADS"
    }
    seen = pickle.loads(path.read_bytes())
    return SimpleNamespace(seen=seen, word=path.with_suffix(".word").read_text(), told=told.value, late=late)


def test_two_halves_of_a_batch_teach_what_the_whole_does(two):
    losses, module = learn(Fabric(accelerator="cpu", devices=1))
    assert losses[-1] < losses[0]
    for one in two.seen:
        torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        assert one["state"].keys() == module.state_dict().keys()  # so the weights are those of an ordinary network
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                one["state"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, value in two.seen[0]["state"].items():
        assert torch.equal(value, two.seen[1]["state"][name]), name


def test_each_half_without_the_other_teaches_otherwise(two):
    """The tolerance above would notice batch norm that is not synchronised."""
    layer, x, _ = layer_and_data(torch.float64)
    alone = layer(x[:3])
    assert (two.seen[0]["norms"]["float64"]["y"] - alone).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_of_two_processes_is_that_of_one(two, kind):
    dtype, cumulative = KINDS[kind]
    whole = normalise(dtype, range(6), 1, cumulative)
    first, second = (one["norms"][kind] for one in two.seen)
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float32: 2e-5}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    for name in ("y", "dx"):
        both = torch.cat((first[name], second[name]))
        assert both.dtype == dtype
        torch.testing.assert_close(both, whole[name], **close)
        assert first[name].is_contiguous(memory_format=torch.channels_last)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(first[name] + second[name], whole[name], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
        assert torch.equal(first[name], second[name])


def test_figures_are_of_all_processes_and_each_thing_once(two):
    for one in two.seen:
        assert one["agreed"] == [1, 0, 0.1]
        assert one["summed"] == [0.2, 3]
        assert one["gathered"].tolist() == [0, 1, 2, 3, 4]
        assert one["logits"].tolist() == [[1, 1, 1]]


def test_processes_know_that_they_are_two_and_share_the_cores(two):
    threads = max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else None
    for pid, child, world, used, parent_is_this in (one["about"] for one in two.seen):
        assert (child, world, parent_is_this) == (True, 2, True)
        assert threads is None or used == threads
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not is_child()


def test_a_dead_process_ends_all_with_one_word(two):
    assert (two.told.argument, two.told.value, two.told.exit_code) == ("process", "rank 1 was killed by SIGKILL", 1)
    assert "--resume" in two.told.mend
    assert two.word.startswith("process group: rank 0 lost the others (")
    assert "--resume" in two.word
    assert two.late < processes.GRACE  # it did not wait for any time limit
    assert not multiprocessing.active_children()


# ---- without other processes


def test_the_first_error_is_told_but_not_that_the_others_are_gone():
    context = multiprocessing.get_context("spawn")
    lost = ClearwingError(processes.LOST, "rank 0 lost the others", "", exit_code=1)
    cause = ClearwingError("loss", "nan", "", exit_code=1)
    pipes = {}
    for number, error in enumerate((lost, cause)):
        receiver, sender = context.Pipe(duplex=False)
        sender.send_bytes(pickle.dumps((False, error)))
        pipes[receiver] = SimpleNamespace(name=f"rank {number}")
    with pytest.raises(ClearwingError, match="nan"):
        processes._watch(dict(pipes), next(iter(pipes.values())))


@pytest.mark.parametrize(("code", "word"), [(-9, "was killed by SIGKILL"), (3, "ended with exit code 3")])
def test_a_process_that_says_nothing_is_named(code, word):
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    sender.close()
    process = SimpleNamespace(name="rank 1", exitcode=code, join=lambda: None)
    with pytest.raises(ClearwingError, match=f"rank 1 {word}"):
        processes._watch({receiver: process}, None)
