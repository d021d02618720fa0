"""A model and the arithmetic it runs in: what every pass of an explanation goes through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.attribution.fold import layout_of, refused
from clearwing.attribution.modules import hooked
from clearwing.attribution.trace import Trace, in_its_layout, record, run
from clearwing.types import ClearwingError, near

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Network:
    """What methods call that need passes of their own: `record` for gradients, `logits` for scores alone."""

    model: nn.Module
    precision: str | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)  # float32 stand-ins for the model's own
    batch: int = 16  # the most pictures in one pass
    grid: tuple[int, int] | None = None  # of a vision transformer's tokens, where it is not found by shape
    told: set[str] = field(default_factory=set)  # warnings given
    tell: Callable[[float], None] | None = None  # told the share of a method's work that is done

    def record(
        self,
        images: Tensor,
        layers: Sequence[str] = (),
        inputs: bool = True,
        attention: bool = False,
        optional: Sequence[str] = (),
    ) -> Trace:
        with self._autocast(images):
            return record(
                self.model, images, layers, inputs, self.parameters, self.grid, attention, self.told, optional
            )

    @in_its_layout
    def logits(self, images: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W), without a graph, at most `batch` pictures at a time."""
        with torch.no_grad(), self._autocast(images):
            return torch.cat([wide(run(self.model, part, self.parameters)) for part in images.split(self.batch)])

    @in_its_layout
    def logits_from(
        self, images: Tensor, place: tuple[nn.Module, int], change: Callable[[Tensor], Tensor], answers: int
    ) -> Tensor:
        """The logits (B, K) of one pass in which `change` makes (B, C, h, w) of what left a layer, (N, C, h, w).

        place: the layer's module and which of its calls, as `Trace.places` has them. answers: B, which is N, or N is 1.
        In the latter case what follows the layer runs on B pictures, and it is for the caller to see that the network
        treats each alone, and broadcasts what it still holds of the one.
        """
        module, call = place
        owner, calls = threading.get_ident(), count()

        def swap(_: nn.Module, __: Any, output: Any) -> Tensor | None:
            if threading.get_ident() != owner or next(calls) != call:
                return None
            layout = layout_of(output, images, self.grid, self.model, module)
            if layout is None:
                raise refused(type(module).__name__, output, images)
            return layout.unfold(change(layout.fold(output)), output.expand(answers, *output.shape[1:]))

        with hooked([module], swap), torch.no_grad(), self._autocast(images):
            return wide(run(self.model, images, self.parameters, answers))

    def groups(self, variants: int, pictures: int) -> Iterator[slice]:
        """Slices over `variants` of each of so many pictures, such that a slice of all pictures is one batch.

        Where one variant of all pictures is more than a batch, a slice holds one variant. Tells how much is done.
        """
        step = max(1, self.batch // pictures)
        for start in range(0, variants, step):
            stop = min(start + step, variants)
            yield slice(start, stop)
            if self.tell is not None:
                self.tell(stop / variants)

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def wide(tensor: Tensor) -> Tensor:
    """Detached, in float32, or in float64 where it was: sums over bfloat16 channels would lose digits."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def check_count(option: str, value: int, most: int | None = None) -> None:
    """Raise ClearwingError for an option of a method that is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        limits = "at least 1" if most is None else f"1 to {most}"
        raise ClearwingError("options", f"{option}={value!r}", f"give a whole number, {limits}")


def check_precision(precision: str | None) -> None:
    if precision not in (None, *PRECISIONS):
        raise ClearwingError("precision", precision, near(str(precision), PRECISIONS))


def like_the_model(model: nn.Module, images: Tensor, precision: str | None = None) -> Tensor:
    """The images on the device of the model's first parameter and in its floating type, or float32 for a precision."""
    own = next((p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point()), images)
    return images.detach().to(own.device, torch.float32 if precision else own.dtype)


def float32_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of the parameters and buffers that are of another floating type."""
    with torch.inference_mode(False), torch.no_grad():
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: t.float() for n, t in named.items() if t.is_floating_point() and t.dtype != torch.float32}


@contextmanager
def exact(device: str) -> Iterator[None]:
    """The model's own arithmetic: without the caller's autocast, and with float32 products in full."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, enabled=False))
        if device in _FULL_FLOAT32:
            stack.enter_context(_FULL_FLOAT32[device])
        yield


class _FullFloat32:
    """Switch reduced float32 arithmetic (TF32, and bfloat16 products on CPU) off while at least one thread is inside.

    The switches are of the whole process: the first thread in keeps what they were, and the last one out restores it.
    """

    def __init__(self, *switches: Any) -> None:
        self.switches, self.before, self.inside, self.lock = switches, list[tuple[Any, str]](), 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = [(switch, switch.fp32_precision) for switch in self.switches]
                self.before = [(switch, value) for switch, value in self.before if value not in ("none", "ieee")]
                for switch, _ in self.before:
                    switch.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for switch, value in self.before:
                    switch.fp32_precision = "none"  # perhaps it had this value from the setting above it
                    if switch.fp32_precision != value:
                        switch.fp32_precision = value


_BACKENDS: Any = torch.backends
_FULL_FLOAT32 = {
    "cuda": _FullFloat32(_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn),
    "cpu": _FullFloat32(_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn),
}
