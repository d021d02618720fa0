"""Leaks and state: a thousand random calls, many of them broken off, and threads that share a model."""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clearwing.attribution.methods import METHODS, explain
from clearwing.types import ClearwingError
from reference import small_images, small_net, tiny_vit

FOR_ANY = [name for name in METHODS if not METHODS[name].attention]
_MODULE: Any = nn.modules.module
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_C: Any = torch._C


class Injected(Exception):  # noqa: N818 (raised by the tests' own hooks and functions)
    """What a test raises inside a call."""


class Stopped(BaseException):
    """As KeyboardInterrupt is: no `except Exception` sees it."""


def modes() -> dict[str, Any]:
    """What a call could leave behind in this thread or process."""
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "tf32": [torch.get_float32_matmul_precision(), *(switch.fp32_precision for switch in switches)],
        "stacks": (_C._len_torch_function_stack(), _C._len_torch_dispatch_stack()),
        "default": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "rng": (bytes(torch.get_rng_state().numpy()), random.getstate(), np.random.get_state()[1].tobytes()),  # noqa: NPY002
        "global hooks": [list(value) for name, value in vars(_MODULE).items() if name.startswith("_global_") and value],
    }


def belongings(net: nn.Module, *tensors: Tensor) -> dict[str, Any]:
    """What a call could change in a network or in the caller's tensors; values as they are, tensors by identity."""
    owned = dict([*net.named_parameters(), *net.named_buffers(), *((str(n), t) for n, t in enumerate(tensors))])
    return {
        "hooks": {name: [list(getattr(m, hooks)) for hooks in _HOOKS] for name, m in net.named_modules()},
        "modes": [module.training for module in net.modules()],
        "attributes": [{name: id(value) for name, value in vars(module).items()} for module in net.modules()],
        "tensors": {name: (id(t), t._version, t.requires_grad, id(t.grad)) for name, t in owned.items()},
        "values": {name: t.tolist() for name, t in owned.items()},
        "gradients": {name: t.grad.tolist() for name, t in owned.items() if t.grad is not None},
    }


def tiny(name: str) -> dict[str, Any]:
    """Options of a method that make it cheap: every number of copies, steps or masks is 2, windows are large."""
    options = METHODS[name].options
    defaults = {option: inspect.signature(METHODS[name].rule).parameters[option].default for option in options}
    few = {option: 2 for option, value in defaults.items() if type(value) is int and value > 2}
    return few | {option: 4 for option in options if option in ("window", "stride")}


class Bang(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, R: Tensor) -> Tensor:  # type: ignore[override]
        raise Injected("in the backward pass")


class Watched:
    """A network whose own hook keeps weak references to all outputs, and raises at a call that is drawn."""

    def __init__(self, net: nn.Module, images: Tensor, methods: list[str], layers: list[str]) -> None:
        self.net, self.images, self.methods, self.layers = net, images.requires_grad_(), methods, layers
        self.left, self.error = 0, Injected
        self.seen: list[weakref.ref[Tensor]] = []
        for module in net.modules():
            module.register_forward_hook(self.see)
        first, *_, last = net.parameters()
        first.requires_grad_(False)
        last.grad = torch.ones_like(last)

    def see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(weakref.ref(output))
        self.left -= 1
        if self.left == 0:
            raise self.error("in the forward pass")


def raising(draw: random.Random, what: type[BaseException]) -> Callable[..., Any]:
    """A function that raises at the call that is drawn, and is a target until then."""
    left = draw.randint(1, 3)

    def function(logits: Any, *_: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise what("in the caller's function")
        return logits.logsumexp(1) if isinstance(logits, Tensor) else None

    return function


WRONG: list[dict[str, Any]] = [
    {"target": 4}, {"target": "no class"}, {"target": lambda z: z}, {"target": lambda z: z[:, 0].detach()},
    {"methods": "no method"}, {"methods": "attention-rollout", "options": {}}, {"options": {"no option": 1}},
    {"layers": "no layer"}, {"layers": "stem#7"}, {"layers": "fc"}, {"layers": "stem", "larger_than": 3},
    {"fuse": "no fuse"}, {"average": ("no view",)}, {"chunk": 0}, {"memory": "2 GB"}, {"precision": "float16"},
    {"labels": ["a"], "target": "label"}, {"images": torch.rand(3, 8, 8)}, {"images": torch.rand(1, 4, 8, 8)},
    {"larger_than": 99}, {"progress": 3},
]  # fmt: skip


def call(draw: random.Random, watched: Watched) -> dict[str, Any]:
    """Arguments of one call, and one fault or none."""
    methods = draw.sample(watched.methods, draw.randint(1, 3))
    layers = draw.choice([None, draw.choice(watched.layers), draw.sample(watched.layers, draw.randint(2, 3))])
    fuse = draw.choice([None, None, "max", "mean", "product"]) if isinstance(layers, list) else None
    asked: dict[str, Any] = {
        "model": watched.net,
        "images": watched.images[: draw.randint(1, 3)],
        "methods": methods,
        "layers": layers,
        "target": draw.choice(["pred", 2, "top-2", (1, 3), lambda z: z.logsumexp(1)]),
        "relu": fuse is not None or draw.random() < 0.7,
        "precision": draw.choice([None, None, "float32", "bfloat16"]),
        "seed": draw.randint(0, 3),
        "options": {option: value for name in methods for option, value in tiny(name).items()},
        "average": draw.choice([(), (), (), ("flip",), ("flip", 1.5)]),
        draw.choice(["chunk", "memory"]): draw.choice([None, 1, 2]),
        "fuse": fuse,
    }
    fault, what = draw.choice(["none", "none", "none", "hook", "target", "backward", "progress", "wrong"]), Injected
    what = draw.choice([Injected, Injected, Stopped])
    watched.left, watched.error = draw.randint(1, 60) if fault == "hook" else 0, what
    if fault == "target":
        asked["target"] = raising(draw, what)
    elif fault == "backward":
        asked["target"] = lambda z: Bang.apply(z[:, 1])
    elif fault == "progress":
        asked["progress"] = raising(draw, what)
    elif fault == "wrong":
        asked.update(draw.choice(WRONG))
    return asked


def flush() -> None:
    """Run an empty backward pass: after an error torch keeps what was about to run until this thread's next one."""
    start = torch.ones(1, requires_grad=True)
    torch.autograd.grad(start * 2, start)


def resident() -> int:
    """Bytes of memory that the process holds, or 0 where the system does not tell."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * 4096 if told.exists() else 0


def tensors_alive() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.filterwarnings("ignore:fullgrad misses")
def test_nothing_is_left_of_a_thousand_calls_with_exceptions() -> None:
    draw = random.Random(0)
    stages = ["stem", "stem.0", "layer1", "layer1.bn", "layer2"]
    watched = [
        Watched(small_net().float(), small_images(3).float(), FOR_ANY, stages),
        Watched(small_net(), small_images(3), FOR_ANY, stages),
        Watched(tiny_vit(), small_images(3), list(METHODS), ["embed", "blocks.0", "blocks.1.norm1"]),
    ]
    before = [belongings(one.net, one.images) for one in watched]
    contexts = [contextlib.nullcontext, contextlib.nullcontext, torch.no_grad, torch.inference_mode]
    ends: Counter[str] = Counter()
    held, alive = 0, 0
    gc.collect()
    gc.disable()  # what dies must die by itself, at once
    try:
        for number in range(1000):
            one = draw.choice([*watched, *watched[:2]])
            asked, around = call(draw, one), draw.choice(contexts)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=draw.random() < 0.2)
            with around(), autocast:
                state = modes()
                try:
                    explain(**asked)
                    ends["right"] += 1
                except (Injected, Stopped, ClearwingError) as error:
                    ends[type(error).__name__] += 1
                except (TypeError, RuntimeError):
                    if asked.get("progress") != 3 and asked["images"].shape[1] != 4:
                        raise
                assert modes() == state, (number, asked)
            del asked
            one.left = 0
            flush()
            left = [ref() for ref in one.seen if ref() is not None]
            assert not left, (number, len(left))
            one.seen.clear()
            if number % 100 == 99:
                assert [belongings(each.net, each.images) for each in watched] == before, number
            if number == 299:
                held, alive = resident(), tensors_alive()
        assert tensors_alive() <= alive
        assert resident() - held < 2**26
    finally:
        gc.enable()
    assert min(ends["right"], ends["Injected"], ends["Stopped"], ends["ClearwingError"]) > 40
    assert ends["right"] > 250


@pytest.fixture
def crowded() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], Any], repeat: int = 50) -> None:
    """Run each work so many times, all of them at once, in a thread each."""
    start = threading.Barrier(len(works))

    def repeated(work: Callable[[], Any]) -> None:
        start.wait()
        for _ in range(repeat):
            work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(repeated, work) for work in works]:
            done.result()


def explains(net: nn.Module, seed: int, methods: Any, layers: Any = None, **more: Any) -> Callable[[], None]:
    """A call on pictures of its own that must give, whenever it runs, what it gave when it ran alone."""
    names = [methods] if isinstance(methods, str) else methods
    options = {option: value for name in names for option, value in tiny(name).items()}
    images = small_images(2, seed=seed)

    def found() -> dict[str, Any]:
        return explain(net, images, names, layers, options=options or None, **more)

    expected = found()

    def again() -> None:
        for key, e in found().items():
            for name, value in e.tensors().items():
                assert torch.equal(value, getattr(expected[key], name)), (key, name)

    return again


def calls(net: nn.Module, seed: int = 9) -> Callable[[], None]:
    """The plain use of a model that another thread explains."""
    images = small_images(2, seed=seed)
    expected = net(images).detach()
    assert expected.requires_grad is False

    def again() -> None:
        logits = net(images)
        assert torch.equal(logits.detach(), expected)
        assert logits.requires_grad
        with torch.inference_mode():
            assert torch.equal(net(images), expected)

    return again


@pytest.mark.usefixtures("crowded")
def test_two_and_four_threads_get_the_maps_of_separate_calls() -> None:
    net = small_net()
    works = [
        explains(net, 1, ["grad-cam", "saliency"], "layer1", target=2),
        explains(net, 2, ["layer-cam", "guided-grad-cam"], ["stem", "layer2"], target="top-2"),
        explains(net, 3, ["guided-backprop"], target=(0, 3)),
        explains(net, 4, ["grad-cam"], ["layer2", "layer1.bn"], average=("flip",), fuse="max", chunk=1),
    ]
    before = belongings(net)
    at_once(*works[:2])
    at_once(*works)
    assert belongings(net) == before


REPLACING = [name for name in METHODS if name.startswith(("lrp", "ablation"))]


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("name", REPLACING)
def test_a_method_that_replaces_outputs_does_so_in_its_own_thread_alone(name: str) -> None:
    net = small_net()
    before = belongings(net)
    at_once(
        explains(net, 1, name, "layer2" if METHODS[name].needs_layer else None, target=1),
        explains(net, 2, ["grad-cam", "guided-backprop"], "layer2", target="top-2"),
        calls(net),
        repeat=20,
    )
    assert belongings(net) == before


@pytest.mark.usefixtures("crowded")
def test_attention_is_read_in_its_own_thread_alone() -> None:
    net = tiny_vit()
    before = belongings(net)
    at_once(
        explains(net, 1, ["attention-rollout", "gradient-attention"], target=1),
        explains(net, 2, ["grad-cam", "saliency"], "blocks.0", target="top-2"),
        explains(net, 3, "gradient-attention", precision="float32"),
        calls(net),
        repeat=20,
    )
    assert belongings(net) == before


@pytest.mark.usefixtures("crowded")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_another_precision_is_of_its_own_thread_alone(precision: str) -> None:
    """The float32 copies of a float64 network never stand in it, where another thread would meet them."""
    net = small_net()
    before = belongings(net)
    at_once(
        explains(net, 1, ["saliency", "grad-cam"], precision=precision),
        explains(net, 2, ["saliency", "grad-cam"], precision=precision),
        explains(net, 3, ["saliency", "grad-cam"]),
        calls(net),
    )
    assert belongings(net) == before


def test_modes_of_a_thread_do_not_reach_another() -> None:
    """One thread in inference_mode and under autocast, one plain: both get the maps of a plain call."""
    net = small_net()
    plain = explains(net, 1, ["grad-cam", "saliency"], "layer1")
    other = explains(net, 2, ["guided-backprop", "layer-cam"], "layer1")

    def inside() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            other()

    at_once(plain, inside, calls(net))
