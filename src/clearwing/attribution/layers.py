"""The default layer of a network: `find_layer`."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from clearwing.attribution.fold import alike, check_grid, layout_of
from clearwing.attribution.modules import hooked, pictures, ready, shown_name
from clearwing.attribution.trace import record
from clearwing.types import Batch, ClearwingError


def find_layer(
    model: nn.Module, images: Tensor | Batch, larger_than: int | None = None, grid: tuple[int, int] | None = None
) -> str:
    """The default layer: the last module to finish whose output is a map with more than one place in space.

    larger_than: ask for maps larger than this on both sides; 7 gives `layer3` of the CIFAR ResNet-18 at 32 pixels.
    grid: (h, w) of a vision transformer's tokens, where their number does not tell it.
    The first picture is run once. Pooling, dropout and identity modules are passed over, and so are modules that run
    twice. Where the pick lies halfway through a block whose own output is too small, and the module that finished
    before the block has a map of the same size, it is that module: `layer3`, not `layer4.0.bn1` of a ResNet-50.

    Of networks with tokens, it is the last module of whose output the logits read every place: where a class token is
    read, the norm before the last attention. It takes one more pass, forwards and backwards, of the first picture.
    The answer is kept until the model's modules change.

    >>> find_layer(torchvision.models.resnet18().eval(), torch.rand(1, 3, 64, 64))
    'layer4'

    Raises ClearwingError where no layer qualifies.
    """
    model, images = ready(model), pictures(images)
    check_grid(grid)
    modules = tuple((name, type(module), id(module)) for name, module in model.named_modules())
    seen, answers = _FOUND.get(model, ((), {}))
    if seen != modules:
        answers = {}
        _FOUND[model] = modules, answers
    asked = (images.shape[1:], larger_than, grid and tuple(grid))
    if asked not in answers:
        answers[asked] = _find_layer(model, images[:1], larger_than, grid)
    return answers[asked]


_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], dict[Any, str]]] = WeakKeyDictionary()


def _find_layer(model: nn.Module, images: Tensor, larger_than: int | None, grid: tuple[int, int] | None) -> str:
    smallest = 0 if larger_than is None else larger_than
    names = {module: name for name, module in model.named_modules() if name}
    sizes: dict[str, tuple[int, int] | None] = {}  # in the order in which the modules finish; None where no map
    unfit, tokens, owner = set[str](), False, threading.get_ident()

    def see(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal tokens
        if threading.get_ident() == owner:
            name = names[module]
            if name in sizes or isinstance(module, _PASSED_OVER):
                unfit.add(name)
            layout = layout_of(output, images, grid, model, module)
            tokens = tokens or (layout is not None and layout.kind == "tokens")
            sizes.setdefault(name, layout.size if layout else None)

    devices = [images.device] if images.is_cuda else []
    with hooked(names, see), torch.random.fork_rng(devices), torch.no_grad():
        model(images.clone())
    large = {name: s for name, s in sizes.items() if s and min(s) > smallest and s[0] * s[1] > 1}
    order = list(sizes)
    fit = [name for name in order if name in large and name not in unfit]
    if tokens:
        fit = [name for name in fit if alike(large[name], images)]  # not (N, heads, T, C) inside attention
    if tokens and fit:
        trace = record(model, images, fit, inputs=False, grid=grid)
        fit = [name for name, reached in trace.reached(fit).items() if reached.any(1).all()]
    if not fit:
        wanted = "more than one place" if larger_than is None else f"a map larger than {larger_than} x {larger_than}"
        seen = sorted({s for s in sizes.values() if s}, reverse=True)
        found = ", ".join(f"{h} x {w}" for h, w in seen) or "no 4-D output at all"
        raise ClearwingError("layers", f"no layer has {wanted}", f"found {found}; give larger images, or name a layer")
    pick, before = fit[-1], ""
    while pick != before:
        before = pick
        for block in _around(pick):
            if sizes.get(block) and block not in large:
                began = next(i for i, name in enumerate(order) if name.startswith(f"{block}."))
                earlier = [name for name in fit if order.index(name) < began]
                if earlier and sizes[earlier[-1]] == sizes[pick]:
                    pick = earlier[-1]
                    break
    return shown_name(model, pick)


_PASSED_OVER = (
    nn.Identity,
    nn.Linear,  # of tokens: a part of a block
    nn.Softmax,
    nn.Flatten,
    _DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def _around(name: str) -> list[str]:
    """The names of the blocks around a module, the innermost first: "a.b.c" -> ["a.b", "a"]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
