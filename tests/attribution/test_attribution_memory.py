"""Pictures in chunks: every picture once, sizes that follow the budget, and maps that do not depend on it."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clearwing.attribution import memory
from clearwing.attribution.memory import FIRST, in_chunks
from clearwing.attribution.methods import METHODS, explain
from clearwing.types import ClearwingError
from reference import small_images, small_net

SOME = ["grad-cam", "layer-cam", "guided-grad-cam", "saliency"]


class Plain(nn.Module):
    """One layer, whose output is known: 8 channels of 4-byte values at 10 x 10 are 3,200 bytes a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def chunks(n: int, chunk: int | None = None, budget: float | None = None, graph: bool = True) -> list[tuple[int, int]]:
    """(start, stop) of the slices of n pictures, which a work that runs the model once was given."""
    net, images = Plain(), torch.rand(n, 1, 10, 10)
    found = []

    def work(part: slice, most: int) -> None:
        found.append((part.start, part.stop))
        assert part.stop - part.start <= most
        assert chunk is None or most == chunk
        with torch.set_grad_enabled(graph):
            net(images[part])

    in_chunks(net, images, chunk, budget, work)
    assert not any(module._forward_hooks for module in net.modules())
    return found


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 100])
def test_every_picture_comes_once_and_in_order(n: int) -> None:
    for chunk, budget in ((None, None), (1, None), (7, None), (200, None), (None, 1.0), (None, 5e4), (None, 3e5)):
        found = chunks(n, chunk, budget)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == n
        assert all(start < stop for start, stop in found)


def test_the_size_given_is_the_size() -> None:
    assert chunks(10, chunk=4) == [(0, 4), (4, 8), (8, 10)]
    assert chunks(10, chunk=4, budget=1.0) == [(0, 4), (4, 8), (8, 10)]  # the number given goes before the memory
    assert chunks(3, chunk=9) == [(0, 3)]


def test_sizes_follow_from_the_budget() -> None:
    """A picture takes 2 x 3,200 bytes of a graph and 4 x 3,200 of the largest output, and 64 for its logits."""
    picture = 400  # bytes of its own, of which the first slice allows 64 times as many
    for budget, first, then, without in ((8e4, 3, 4, 6), (1.5e5, 5, 7, 11), (2.8e5, 10, 14, 21)):
        assert int(budget / (64 * picture)) == first
        assert (int(budget / 19_264), int(budget / 12_800)) == (then, without)
        for graph, most in ((True, then), (False, without)):
            sizes = [stop - start for start, stop in chunks(100, budget=budget, graph=graph)]
            assert sizes[0] == first
            assert set(sizes[1:-1]) == {most}
    assert chunks(3, budget=1.0) == [(0, 1), (1, 2), (2, 3)]  # one picture at a time is the least
    assert chunks(100, budget=1e12) == [(0, FIRST), (FIRST, 100)]


def test_a_method_of_many_passes_drops_the_graph_of_each() -> None:
    """What the largest pass took counts, not their sum."""
    net, images = Plain(), torch.rand(100, 1, 10, 10)
    sizes = []

    def work(part: slice, most: int) -> None:
        sizes.append(part.stop - part.start)
        for _ in range(5):
            net(images[part])

    in_chunks(net, images, None, 8e4, work)
    assert sizes == [stop - start for start, stop in chunks(100, budget=8e4)]


def test_without_a_budget_it_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BUDGET", 64 * 400 * 2)
    assert chunks(10) == chunks(10, budget=64 * 400 * 2) != chunks(10, budget=1e9)


def test_what_another_thread_runs_is_not_counted() -> None:
    net, images = Plain(), torch.rand(100, 1, 10, 10)
    sizes = []

    def work(part: slice, most: int) -> None:
        sizes.append(part.stop - part.start)
        net(images[part])
        if not part.start:
            other = threading.Thread(target=net, args=(images.repeat(10, 1, 1, 1),))
            other.start()
            other.join()

    in_chunks(net, images, None, 64 * 400 * 3, work)
    assert sizes == [stop - start for start, stop in chunks(100, budget=64 * 400 * 3)]


def test_an_exception_leaves_no_hook() -> None:
    net, images = Plain(), torch.rand(100, 1, 10, 10)
    for budget, fails in ((None, 0), (64 * 400 * 3, 0), (64 * 400 * 3, 3)):

        def work(part: slice, most: int, fails: int = fails) -> None:
            if part.start == fails:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            in_chunks(net, images, None, budget, work)
        assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("chunk", [0, -1, 2.0, "8", True])
def test_a_chunk_that_is_no_number_of_pictures_is_refused(chunk: Any) -> None:
    with pytest.raises(ClearwingError, match=r"^chunk: .*; give how many pictures to run at a time, at least 1"):
        explain(small_net(), small_images(), chunk=chunk)


@pytest.mark.parametrize("budget", [0, -1.0, float("inf"), float("nan"), "2 GB", True])
def test_a_memory_that_is_no_number_of_bytes_is_refused(budget: Any) -> None:
    with pytest.raises(ClearwingError, match=r"^memory: .*; give the bytes that a pass may take"):
        explain(small_net(), small_images(), memory=budget)


@pytest.mark.parametrize("budget", [1, 1e4, 5e4, 1e5, 1e6, 1e12])
def test_the_maps_do_not_depend_on_the_memory(budget: float) -> None:
    net, images = small_net(), small_images(20)
    whole = explain(net, images, SOME, ["layer1", "layer2"], target="top-2", chunk=20)
    found = explain(net, images, SOME, ["layer1", "layer2"], target="top-2", memory=budget)
    for key, e in found.items():
        for name, value in e.tensors().items():
            assert torch.allclose(value.double(), getattr(whole[key], name).double(), rtol=0, atol=1e-13), (key, name)


def test_the_estimate_is_about_what_a_pass_takes() -> None:
    """With a budget of ten pictures' outputs, no pass keeps more than the budget in the outputs of its modules."""
    net, images = small_net(), small_images(100)
    passes: list[int] = []
    kept = 0

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal kept
        kept += output.numel() * output.element_size()
        if module is net.fc:
            passes.append(kept)
            kept = 0

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(see)
    budget = 1e6
    explain(net, images, "saliency", memory=budget)
    assert len(passes) > 2
    assert max(passes) < budget
    assert max(passes[1:]) > budget / 10


# progress


def progress_of(**asked: Any) -> list[tuple[float, float]]:
    told: list[tuple[float, float]] = []
    explain(small_net(), small_images(7), progress=lambda done, total: told.append((done, total)), **asked)
    return told


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("average", [(), ("flip", 0.5)])
def test_progress_rises_to_all_pictures(chunk: int | None, average: Any) -> None:
    told = progress_of(methods=SOME, layers=["layer1", "layer2"], target="top-3", chunk=chunk, average=average)
    done = [some for some, _ in told]
    assert {total for _, total in told} == {7}
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == 7
    if chunk is not None:  # every chunk ends on a whole number
        assert {float(stop) for stop in [*range(chunk, 7, chunk), 7]} <= set(done)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].kind == "passes"])
def test_progress_of_methods_with_many_passes_rises_within_a_chunk(name: str) -> None:
    more: dict[str, Any] = {"layers": ["layer1", "layer2"], "fuse": "max"} if METHODS[name].needs_layer else {}
    if name == "rise":
        more["options"] = {"masks": 30}
    done = [some for some, _ in progress_of(methods=name, target="top-2", chunk=4, **more)]
    assert done == sorted(done)
    assert done[-1] == 7
    assert 4.0 in done
    assert all(Fraction(some) > 0 for some in done)
