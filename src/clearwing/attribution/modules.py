"""A network's modules: taken out of wrappers, refused where a recording would be wrong, named, and hooked.

All hooks on modules go through `hooked`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from clearwing.types import Batch, ClearwingError, near

INPUT = "input"
"""Stands for the pictures among the names of layers."""


def ready(model: nn.Module) -> nn.Module:
    """The network inside wrappers (compiled, parallel, Fabric), refused where a recording would be quietly wrong."""
    if not isinstance(model, nn.Module):
        raise ClearwingError("model", type(model).__name__, "give a torch.nn.Module that maps (N, C, H, W) to (N, K)")
    inner: Any = model
    while inner is not None:
        model = inner
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        wrapped = parallel or type(model).__name__ == "_FabricModule"
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)  # torch.compile keeps the original there
    if model._compiled_call_impl is not None:  # model.compile(): a shallow copy shares everything but this
        model = copy.copy(model)
    for name, module in model.named_modules():
        if name and (module._compiled_call_impl is not None or hasattr(module, "_orig_mod")):
            mend = "hooks and ReLU rules do not reach into it; explain the network as it is before compiling"
            raise ClearwingError("model", f"{name} is compiled", mend)
        if _trains(module) or (module.training and not name):
            who = name or type(module).__name__
            raise ClearwingError("model", f"{who} is in training mode", "call model.eval() before explaining")
    return model


def _trains(module: nn.Module) -> bool:
    """Whether the module now behaves otherwise than in evaluation; of torch's own modules few do, of others any may."""
    if not module.training:
        return False
    if not type(module).__module__.startswith("torch.nn."):
        return True
    tracked = isinstance(module, _InstanceNorm) and module.track_running_stats
    return tracked or isinstance(module, _DIFFERENT_IN_TRAINING)


_DIFFERENT_IN_TRAINING = (_BatchNorm, _DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)


def pictures(images: Tensor | Batch) -> Tensor:
    """The images (N, C, H, W) of a batch or as they are; ClearwingError where they are no floating pictures."""
    if isinstance(images, Batch):
        images = images.images
    if not isinstance(images, Tensor):
        raise ClearwingError("images", type(images).__name__, "give a tensor (N, C, H, W) or a Batch")
    if images.ndim != 4 or images.numel() == 0:
        mend = "give (N, C, H, W)" + (", images[None] for a single one" if images.ndim == 3 else ", none of them 0")
        raise ClearwingError("images", tuple(images.shape), mend)
    if not images.is_floating_point():
        raise ClearwingError("images", images.dtype, "give floating images in [0, 1]; divide bytes by 255")
    return images


def named_layers(model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules by the names that users see, in the order asked; ClearwingError for one that is not in the model."""
    return {name: module for name, (module, _) in calls(model, layers).items()}


def calls(
    model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module]
) -> dict[str, tuple[nn.Module, int | None]]:
    """The modules asked for, and which of its calls where a name says so: "relu#1" is the second."""
    if isinstance(layers, str | nn.Module):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise ClearwingError("layers", layers, "give the name of a module, a module, or a list of them")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names = {module: name for name, module in reversed(modules.items())}
    found: dict[str, tuple[nn.Module, int | None]] = {}
    for layer in layers:
        asked, call = layer, re.search(r"#-?\d+$", layer) if isinstance(layer, str) else None
        if isinstance(layer, str) and call is not None:
            asked = layer[: call.start()]
        if isinstance(asked, nn.Module):
            full = names.get(asked)
        else:
            full = next((name for name in (asked, f"backbone.{asked}") if name in modules), None)
        if full == INPUT:
            raise ClearwingError("layer", INPUT, "the word stands for the pictures here; rename the module")
        if full is None:
            known = [shown_name(model, name) for name in modules]
            said = asked if isinstance(asked, str) else type(asked).__name__
            raise ClearwingError("layer", said, near(said, known) if known else "the model has no layers")
        name = shown_name(model, names[modules[full]]) + (call[0] if call else "")
        found[name] = (modules[full], int(call[0][1:]) if call else None)
    return found


def shown_name(model: nn.Module, name: str) -> str:
    """A layer's name without the "backbone." of a Classifier."""
    classifier = hasattr(model, "class_names") and isinstance(getattr(model, "backbone", None), nn.Module)
    return name.removeprefix("backbone.") if classifier else name


@contextmanager
def hooked(
    modules: Iterable[nn.Module], hook: Callable[..., Any], before: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Inside the block, hook(module, args, output) follows every call of the modules; before(module, args) precedes."""
    handles = []
    try:
        for module in modules:
            if before is not None:
                handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
