"""Classifier: a network that owns its preprocessing, and `wrap`, which makes one of any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from clearwing.models.resnet import ResNet, ResNet6n2, picture_channels
from clearwing.types import ClearwingError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A backbone with its mean and std, class names and picture size: images in [0, 1] to logits.

    mean, std: one number a channel; None is 0 and 1, so that the backbone sees the pictures as they are. They are
    buffers (1, C, 1, 1) on the backbone's device and are saved with its weights.
    output: where the logits are in what the backbone returns: the key of a dict, the index of a tuple, the
    attribute of an object. A head with one logit z, (N, 1) or (N,), becomes the two logits (-z/2, z/2):
    their softmax is sigmoid(z) exactly, and both classes can be explained.

    >>> model = Classifier(ResNet6n2(1, 2), mean=(0.5, 0.5, 0.5), class_names=("cat", "dog"))
    >>> model(torch.rand(5, 3, 32, 32)).shape
    torch.Size([5, 2])

    Raises ClearwingError where mean or std do not fit the channels, or the class names the logits.
    """

    mean: Tensor  # (1, C, 1, 1)
    std: Tensor  # (1, C, 1, 1)

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        class_names: Sequence[str] = (),
        input_size: int | None = None,
        output: str | int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_names = tuple(str(name) for name in class_names)
        self.input_size = input_size
        self.output = output
        self.num_classes: int | None = len(self.class_names) or None  # else known from the first call
        if isinstance(backbone, ResNet | ResNet6n2):
            self.num_classes = max(backbone.num_classes, 2)
            if self.class_names and len(self.class_names) != self.num_classes:
                raise _names_error(self.class_names, self.num_classes)
        if len(set(self.class_names)) != len(self.class_names):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise ClearwingError("class_names", twice, "named twice; give each class its own name")
        self.register_buffer("mean", _channel_values("mean", mean, 0.0, backbone))
        self.register_buffer("std", _channel_values("std", std, 1.0, backbone))
        if self.mean.shape != self.std.shape:
            shapes = f"{self.mean.shape[1]} and {self.std.shape[1]} values"
            raise ClearwingError("mean and std", shapes, "give as many of one as of the other")
        self.training = backbone.training  # the modules inside keep their own modes

    @property
    def in_channels(self) -> int | None:
        """Channels of the pictures, if known: those of the backbone's first convolution."""
        return picture_channels(self.backbone)

    def forward(self, images: Tensor) -> Tensor:  # (N, C, H, W) in [0, 1] -> (N, K)
        channels = self.mean.shape[1]
        if images.ndim != 4 or not images.is_floating_point():
            mend = "give floating pictures (N, C, H, W) in [0, 1]"
            raise ClearwingError("images", f"{images.dtype} {tuple(images.shape)}", mend)
        if images.shape[1] != channels and not (channels == 1 and self.in_channels is None):
            mend = f"give pictures with {channels} channels, or wrap the network with mean and std for its own"
            raise ClearwingError("images", tuple(images.shape), mend)
        outputs = self.backbone(((images - self.mean) / self.std).to(self.mean.dtype))
        logits = self._logits(outputs, images.shape[0])
        if self.class_names and logits.shape[1] != len(self.class_names):
            raise _names_error(self.class_names, logits.shape[1])
        if logits.shape[1] != self.num_classes:
            self.num_classes = logits.shape[1]
        return logits

    def _logits(self, outputs: Any, pictures: int) -> Tensor:
        """The logits (N, K) in what the backbone returned."""
        if self.output is not None:
            outputs = _pick(outputs, self.output)
        elif isinstance(outputs, Mapping):
            keys = ", ".join(map(str, outputs))
            raise ClearwingError("output", f"the network returned a dict of {keys}", "name the key of the logits")
        elif isinstance(outputs, tuple | list):
            found = f"the network returned {len(outputs)} values"
            raise ClearwingError("output", found, "give the index of the logits")
        if not isinstance(outputs, Tensor):
            found = f"the network returned {type(outputs).__name__}"
            raise ClearwingError("output", found, "say by output= where its logits are")
        if tuple(outputs.shape) in ((pictures,), (pictures, 1)):
            z = outputs.reshape(-1, 1) / 2
            return torch.cat((-z, z), 1)
        if outputs.ndim != 2 or outputs.shape[0] != pictures or outputs.shape[1] == 0:
            shape = f"{tuple(outputs.shape)} for {pictures} pictures"
            mend = "the network must give (N, K), (N, 1) or (N,); take its logits by output=, or pool them to (N, K)"
            raise ClearwingError("output", shape, mend)
        return outputs

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, input_size={self.input_size}"


def wrap(
    module: nn.Module,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    input_size: int | None = None,
    output: str | int | None = None,
) -> Classifier:
    """Make any classifier a `Classifier`; see there for the settings. The module keeps its mode.

    It is shared, not copied. For a `Classifier`, the settings given here replace its own, in a new one.

    >>> model = wrap(torchvision.models.resnet18(), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    >>> binary = wrap(one_logit_network, class_names=("healthy", "ill"))
    """
    if not isinstance(module, nn.Module):
        raise ClearwingError("module", type(module).__name__, "give a torch.nn.Module")
    if isinstance(module, Classifier):
        old = module
        names = class_names if class_names is not None else old.class_names
        return Classifier(
            old.backbone,
            old.mean if mean is None else mean,
            old.std if std is None else std,
            names,
            old.input_size if input_size is None else input_size,
            old.output if output is None else output,
        )
    return Classifier(module, mean, std, class_names or (), input_size, output)


def _pick(outputs: Any, where: str | int) -> Any:
    """One entry of a dict, a tuple or an object."""
    if isinstance(outputs, Mapping):
        if where in outputs:
            return outputs[where]
        raise ClearwingError("output", where, f"the network returned a dict of {', '.join(map(str, outputs))}")
    if isinstance(outputs, tuple | list) and isinstance(where, int):
        if -len(outputs) <= where < len(outputs):
            return outputs[where]
        raise ClearwingError("output", where, f"the network returned {len(outputs)} values")
    if isinstance(where, str) and hasattr(outputs, where) and not isinstance(outputs, Tensor):
        return getattr(outputs, where)
    mend = "give the key of a dict, the index of a tuple, or nothing for a tensor"
    raise ClearwingError("output", where, f"the network returned {type(outputs).__name__}; {mend}")


def _channel_values(name: str, values: Sequence[float] | Tensor | None, default: float, backbone: nn.Module) -> Tensor:
    """A buffer (1, C, 1, 1) on the device and in the precision of the backbone."""
    if values is None:
        values = [default] * (picture_channels(backbone) or 1)
    try:
        numbers = [float(v) for v in (values.flatten().tolist() if isinstance(values, Tensor) else values)]
    except (TypeError, ValueError) as error:
        raise ClearwingError(name, values, "give one number for each channel") from error
    # the first convolution of a network is not always the first that it calls, so any that fits will do
    taken = {layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)}
    if not numbers or (taken and len(numbers) not in taken):
        raise ClearwingError(name, numbers, f"give {picture_channels(backbone)} values, one for each channel")
    if not all(isfinite(v) for v in numbers) or (name == "std" and min(numbers) <= 0):
        raise ClearwingError(name, numbers, "give finite numbers" + (" above 0" if name == "std" else ""))
    probe = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.tensor(numbers, dtype=probe.dtype, device=probe.device).view(1, -1, 1, 1)


def _names_error(names: Sequence[str], classes: int | None) -> ClearwingError:
    return ClearwingError("class_names", f"{len(names)} names", f"the network has {classes} classes; name each")
