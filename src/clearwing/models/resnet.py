"""Residual networks after He et al. ("Deep Residual Learning", CVPR 2016), and a summary of any network by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearwing.types import ClearwingError, near

SHORTCUTS = ("projection", "pad")
DOWNSAMPLES = ("block", "conv")
STEMS = ("cifar", "imagenet")
RESIDUALS = ("he", "zero", "dirac")


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al. section 4.1: every stride-th pixel, zeros for the new channels, no parameters.

    He et al. do not say where the zeros go: half stand before and half behind, as in akamaster's
    pytorch_resnet_cifar10, so that weights trained there mean the same here.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        if channels < in_channels:
            mend = f"option A pads with zeros; give widths that do not shrink from {in_channels}"
            raise ClearwingError("widths", channels, mend)
        self.stride = stride
        self.before = (channels - in_channels) // 2
        self.behind = channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, channels, ceil(H/s), ceil(W/s))
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, before={self.before}, behind={self.behind}"


class Projection(nn.Conv2d):
    """A 1x1 convolution without bias, a drop-in for `nn.Conv2d(in_channels, channels, 1, stride)`.

    Below 16 input channels it drops the pixels that a stride passes over first, then convolves: the same numbers.
    There the gradient of a strided 1x1 convolution in channels_last writes out of bounds on a CPU with AVX-512 (oneDNN
    in torch 2.15, "double free or corruption").
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, channels, ceil(H/s), ceil(W/s))
        if self.in_channels >= 16:
            return super().forward(x)
        down, across = self.stride
        return nn.functional.conv2d(x[:, :, ::down, ::across], self.weight)


class BasicBlock(nn.Module):
    """y = relu(F(x) + shortcut(x)) with two 3x3 convolutions in F (He et al. eq. 1 and 2, figure 5 left).

    Where neither the size nor the width changes, the shortcut is the identity; else a 1x1 convolution with batch norm
    ("projection", option B) or `PadShortcut` ("pad", option A). Parameter names are torchvision's.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + identity)


class Bottleneck(nn.Module):
    """The same with a 1x1, a 3x3 and a 1x1 convolution in F, the first two a quarter as wide (figure 5 right).

    As in torchvision, whose parameter names these are, the 3x3 convolution has the stride ("ResNet v1.5").
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, shortcut: str = "projection") -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + identity)


def _shortcut(in_channels: int, channels: int, stride: int, kind: str) -> nn.Module | None:
    if stride == 1 and in_channels == channels:
        return None
    if kind == "pad":
        return PadShortcut(in_channels, channels, stride)
    return nn.Sequential(Projection(in_channels, channels, stride), nn.BatchNorm2d(channels))


def stage(
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
    shortcut: str = "projection",
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
) -> nn.Sequential:
    """Residual blocks at one width; the first has the stride."""
    first = block(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(block(channels, channels, 1, shortcut) for _ in range(1, blocks)))


def initialise(module: nn.Module, residual: str = "he") -> None:
    """He et al., ICCV 2015, eq. 10, in its fan-out form, from the global generator of torch, as layers do.

    residual: how the branches of the blocks begin. "he": as all else. "zero": the weight of their last batch norm is
    0, so that each block is its shortcut (Goyal et al. 2017, section 5.1). "dirac": the first filters of their 3x3
    convolutions, as many as there are input channels, pass these on (Jordan 2024, section 3.3); the others stay.
    """
    _check_choice("residual", residual, RESIDUALS)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    for block in (layer for layer in module.modules() if isinstance(layer, BasicBlock | Bottleneck)):
        if residual == "zero":
            nn.init.zeros_([layer for layer in block.children() if isinstance(layer, nn.BatchNorm2d)][-1].weight)
        elif residual == "dirac":
            for conv in block.children():
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                    nn.init.dirac_(conv.weight.detach()[: conv.in_channels])


class ResNet6n2(nn.Module):
    """He et al. section 4.2, 6n+2 layers: a 3x3 convolution, three stages of n basic blocks, mean pool, linear.

    All convolutions are 3x3 with zero padding (but for the 1x1 ones of projection shortcuts); stages 2 and 3
    halve the picture. The paper has widths 16, 32, 64 and shortcut "pad"; the defaults here differ in both.

    shortcut: "projection" (1x1 convolution and batch norm) or "pad" (option A, without parameters).
    downsample: "block" (the first block of stages 2 and 3 has stride 2, as in the paper) or "conv" (`down2` and
    `down3`, a stride-2 3x3 convolution each with batch norm and ReLU, stand before those stages; then all
    shortcuts are identities, and the depth is 6n+4).
    residual: how residual branches begin, "he", "zero" or "dirac" (see `initialise`).

    >>> net = ResNet6n2(n=2, num_classes=100)
    >>> net(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 100])

    Raises ClearwingError for settings out of range.
    """

    def __init__(
        self,
        n: int,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 128),
        shortcut: str = "projection",
        downsample: str = "block",
        in_channels: int = 3,
        residual: str = "he",
    ) -> None:
        super().__init__()
        _check_positive(n=n, num_classes=num_classes, in_channels=in_channels)
        _check_choice("shortcut", shortcut, SHORTCUTS)
        _check_choice("downsample", downsample, DOWNSAMPLES)
        if len(widths) != 3 or min(widths) < 1:
            raise ClearwingError("widths", tuple(widths), "give three positive numbers, one for each stage")
        a, b, c = widths
        own = downsample == "conv"
        self.num_classes, self.in_channels = num_classes, in_channels
        self.conv1 = conv3x3(in_channels, a)
        self.bn1 = nn.BatchNorm2d(a)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(a, a, n, 1, shortcut)
        self.down2 = _down(a, b) if own else nn.Identity()
        self.layer2 = stage(b if own else a, b, n, 1 if own else 2, shortcut)
        self.down3 = _down(b, c) if own else nn.Identity()
        self.layer3 = stage(c if own else b, c, n, 1 if own else 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, num_classes)
        initialise(self, residual)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(self.down2(x))
        x = self.layer3(self.down3(x))
        return self.fc(self.avgpool(x).flatten(1))


class ResNet(nn.Module):
    """The four-stage network of He et al. table 1: ResNet-18, 34, 50, 101, 152.

    blocks: blocks in each stage, such as (2, 2, 2, 2) or (3, 4, 6, 3).
    bottleneck: blocks of three convolutions, of widths 256 to 2048 (ResNet-50 and deeper), not of two, 64 to 512.
    stem: "imagenet" (7x7 stride-2 convolution and 3x3 stride-2 max pool; the state dict is torchvision's) or "cifar"
    (3x3 convolution, no pool: ResNet-18 with 10 classes has 11,173,962 parameters).
    residual: how residual branches begin, "he", "zero" or "dirac" (see `initialise`).

    >>> ResNet((2, 2, 2, 2), num_classes=10)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])

    Raises ClearwingError for settings out of range.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        stem: str = "cifar",
        in_channels: int = 3,
        residual: str = "he",
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels)
        _check_choice("stem", stem, STEMS)
        if len(blocks) != 4 or min(blocks) < 1:
            raise ClearwingError("blocks", tuple(blocks), "give four positive numbers, one for each stage")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.maxpool: nn.Module = nn.Identity()
        if stem == "cifar":
            self.conv1 = conv3x3(in_channels, 64)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        block, wide = (Bottleneck, 4) if bottleneck else (BasicBlock, 1)
        self.layer1 = stage(64, 64 * wide, blocks[0], 1, block=block)
        self.layer2 = stage(64 * wide, 128 * wide, blocks[1], 2, block=block)
        self.layer3 = stage(128 * wide, 256 * wide, blocks[2], 2, block=block)
        self.layer4 = stage(256 * wide, 512 * wide, blocks[3], 2, block=block)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * wide, num_classes)
        initialise(self, residual)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, K)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _down(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_channels, channels, 2), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ClearwingError(name, value, "give a number of at least 1")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ClearwingError(name, value, near(value, choices))


def picture_channels(module: nn.Module) -> int | None:
    """Channels of the pictures a network takes, by its first 2-d convolution; None without one."""
    return next((layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)


@dataclass(frozen=True)
class LayerRow:
    """What one call of one layer costs for one picture."""

    name: str
    type: str
    output: tuple[int, ...]  # without the batch axis
    parameters: int  # the layer's own; 0 where the same layer was called before
    multiply_adds: int  # of convolutions and linear layers; other layers count 0
    memory: int  # bytes of the output


@dataclass(frozen=True)
class Summary:
    """A network layer by layer, in the order of the calls; `str()` gives the table.

    The totals are for one picture. `parameters` counts every parameter of the network once, also those of layers
    that the forward pass did not call as modules.
    """

    rows: tuple[LayerRow, ...]
    input_size: tuple[int, int, int]  # (C, H, W)
    parameters: int
    trainable: int  # parameters that require grad

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    @property
    def memory(self) -> int:
        """Bytes of all outputs together, which is about what training keeps."""
        return sum(row.memory for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "type", "output", "parameters", "multiply-adds", "memory (bytes)")
        body = [
            (
                row.name,
                row.type,
                " x ".join(map(str, row.output)),
                *(f"{value:,}" for value in (row.parameters, row.multiply_adds, row.memory)),
            )
            for row in self.rows
        ]
        size = " x ".join(map(str, self.input_size))
        total = ("total", "", size, *(f"{v:,}" for v in (self.parameters, self.multiply_adds, self.memory)))
        widths = [max(len(line[i]) for line in (head, *body, total)) for i in range(len(head))]

        def line(cells: Sequence[str]) -> str:
            left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
            return "  ".join(left + right).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [line(head), rule, *map(line, body), rule, line(total)]
        if self.trainable != self.parameters:
            lines.append(f"of the parameters, {self.trainable:,} are trained")
        return "\n".join(lines)


def summary(model: nn.Module, input_size: int | tuple[int, int, int] | None = None) -> Summary:
    """What every layer of `model` costs for one picture, found by one forward pass on a picture of zeros.

    input_size: (C, H, W), or the side of a square picture, or None for the model's own `input_size`. Operations that
    are no modules (additions, functional ReLUs) have no row. Modes, buffers and the global generator stay as they were.

    >>> summary(ResNet6n2(1, 10), 32).parameters
    308650
    """
    channels, height, width = size = _full_size(model, input_size)
    probe = next(model.parameters(), torch.zeros(()))
    images = torch.zeros(1, channels, height, width, device=probe.device, dtype=probe.dtype)
    rows: list[LayerRow] = []
    seen: set[nn.Module] = set()

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            own = 0 if layer in seen else sum(p.numel() for p in layer.parameters(recurse=False))
            cost = _multiply_adds(layer, args[0] if args else output, output)
            bytes_ = output.numel() * output.element_size()
            rows.append(LayerRow(name, type(layer).__name__, tuple(output.shape[1:]), own, cost, bytes_))
            seen.add(layer)

    modes = [(layer, layer.training) for layer in model.modules()]
    hooks = []
    try:
        for name, layer in model.named_modules():
            own = any(True for _ in layer.parameters(recurse=False))
            if not isinstance(layer, nn.Identity) and (own or not any(True for _ in layer.children())):
                short = name.removeprefix("backbone.")  # layers of a Classifier are named without it
                hooks.append(layer.register_forward_hook(lambda m, a, o, short=short: note(short, m, a, o)))
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in modes:
            layer.training = mode
    parameters = list(model.parameters())
    return Summary(
        tuple(rows),
        size,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )


def _full_size(model: nn.Module, size: int | tuple[int, int, int] | None) -> tuple[int, int, int]:
    if size is None:
        size = getattr(model, "input_size", None)
    if isinstance(size, int):
        channels = picture_channels(model)
        return (3 if channels is None else channels, size, size)
    if size is None or len(size) != 3:
        raise ClearwingError("input_size", size, "give (C, H, W), or one number for a square picture")
    channels, height, width = size
    return channels, height, width


def _multiply_adds(layer: nn.Module, inputs: Any, output: Tensor) -> int:
    """Multiply-adds of one call; a bias is not counted."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return output.numel() * layer.in_channels // layer.groups * prod(layer.kernel_size)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return inputs.numel() * layer.out_channels // layer.groups * prod(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    return 0
