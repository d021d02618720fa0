"""Transformers in the library's shapes: tokens and channels-last maps folded to (N, C, h, w), and attention kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isqrt
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clearwing.types import ClearwingError

MOST_PREFIX = 16
"""Class, distillation and register tokens that may stand before those of the picture."""


@dataclass(frozen=True)
class Layout:
    """Where a layer's output keeps its places."""

    kind: Literal["map", "last", "tokens"]  # (N, C, h, w); (N, h, w, C); (N, prefix + h w, C)
    size: tuple[int, int]  # (h, w)
    prefix: int = 0

    def fold(self, output: Tensor) -> Tensor:
        """The output as (N, C, h, w), without the prefix tokens; a view."""
        if self.kind == "tokens":
            return output[:, self.prefix :].mT.unflatten(2, self.size)
        return output.movedim(-1, 1) if self.kind == "last" else output

    def unfold(self, feature: Tensor, output: Tensor) -> Tensor:
        """A copy in the shape of the output, its places taken from the feature (N, C, h, w)."""
        if self.kind == "tokens":
            return torch.cat((output[:, : self.prefix], feature.flatten(2).mT), 1)
        return (feature.movedim(1, -1) if self.kind == "last" else feature).clone()


def layout_of(
    output: Any, images: Tensor, grid: tuple[int, int] | None, model: nn.Module, module: nn.Module
) -> Layout | None:
    """How the output of a module of the model holds places of the images (N, C, H, W); None where it does not.

    4-D outputs are channels last where their dimensions 1 and 2 stand to each other as H to W, and 2 and 3 do not.
    These and tokens are believed only of a network that has a linear layer or a layer norm over so many channels, and
    not of modules that are known to put the channels first, or queries instead of places.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or len(output.shape) not in (3, 4):
        return None
    if len(output) != len(images):
        return None
    if output.ndim == 4:
        last = alike(output.shape[1:3], images) and not alike(output.shape[2:], images)
        last = last and not isinstance(module, _CHANNELS_FIRST) and _mixes(model, output.shape[-1])
        h, w = output.shape[1:3] if last else output.shape[2:]
        return Layout("last" if last else "map", (h, w))
    if isinstance(module, (*_CHANNELS_FIRST, *_QUERIES)) or not (grid or _mixes(model, output.shape[-1])):
        return None
    T = output.shape[1]
    size = token_grid(T, images, grid)
    return None if size is None else Layout("tokens", size, T - size[0] * size[1])


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.GroupNorm,
    nn.Flatten,
)
_QUERIES = (nn.TransformerDecoder, nn.TransformerDecoderLayer)


def _mixes(model: nn.Module, channels: int) -> bool:
    """Whether a linear layer or a layer norm of the model works on a last dimension of this size."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and channels in (module.in_features, module.out_features):
            return True
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.normalized_shape[-1] == channels:
            return True
    return False


def alike(size: tuple[int, ...], images: Tensor) -> bool:
    """Whether h is to w as H to W, up to the rounding of one place."""
    (h, w), (H, W) = size, images.shape[2:]
    return abs(h * W - w * H) < max(H, W)


def token_grid(T: int, images: Tensor, grid: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """The (h, w) of T tokens, some of which may be a prefix: the given grid, or the one that the shape tells.

    h is to w as H to W; the grids that divide H and W come first, and of them that with the smallest prefix. One
    that does not divide them may have one prefix token. None where nothing fits, or these two rules disagree.
    """
    if grid is not None:
        return grid if 0 <= T - grid[0] * grid[1] <= MOST_PREFIX else None
    H, W = images.shape[2:]
    common = gcd(H, W)
    unit = (H // common) * (W // common)  # a grid is (k H / common, k W / common), of k k unit tokens
    most = isqrt(T // unit)
    fits = [k for k in range(most, 0, -1) if k * k * unit > 1 and T - k * k * unit <= MOST_PREFIX]
    fits = [k for k in fits if common % k == 0 or T - k * k * unit <= 1]
    if not fits or (common % fits[0] and len(fits) > 1):
        return None
    return fits[0] * H // common, fits[0] * W // common


def check_grid(grid: Any) -> None:
    whole = isinstance(grid, tuple | list) and [type(side) for side in grid] == [int, int]
    if grid is not None and not (whole and min(grid) > 0):
        raise ClearwingError("grid", grid, "give (h, w), two whole numbers of at least 1")


def refused(name: str, output: Any, images: Tensor) -> ClearwingError:
    """Why a layer's output cannot be recorded."""
    if not isinstance(output, Tensor):
        what = f"it gives a {type(output).__name__}"
    elif len(output.shape) == 3 and len(output) == len(images) and not output.is_inference():
        mend = "which is no grid of the pictures, or not the given one; give grid=(h, w)"
        return ClearwingError("layer", name, f"it gives (N, T, C) = {tuple(output.shape)}, {mend}")
    elif len(output.shape) in (3, 4) and len(output) != len(images):
        what = f"it gives {tuple(output.shape)} for {len(images)} pictures: windows, or tokens first"
    elif output.is_inference():
        return ClearwingError("layer", name, "it runs inside an inference_mode of the model's own; name a later one")
    else:
        what = f"it gives {tuple(output.shape)}"
    return ClearwingError("layer", name, f"{what}; name one that gives (N, C, h, w), (N, h, w, C) or tokens (N, T, C)")


class KeepAttention(TorchFunctionMode):
    """Keep the matrices (N, heads, T, T) of all self-attention in this thread, in order, as parts of the graph.

    Fused attention is computed step by step meanwhile; of attention spelled out, the softmax is kept.
    """

    def __init__(self, pictures: int) -> None:
        super().__init__()
        self.pictures, self.kept = pictures, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        found = func(*args, **kwargs)
        if func in _SOFTMAX and found.ndim > 2 and found.shape[-1] == found.shape[-2] > 1:
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return self.keep(found) if dim in (-1, found.ndim - 1) else found
        return found

    def attend(
        self,
        query: Tensor,  # (N, ..., T, E)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The formula that torch documents for scaled_dot_product_attention: softmax(q k^T scale + mask) v."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
        A = self.keep(scores.softmax(-1)).to(value.dtype)
        return (F.dropout(A, dropout_p) if dropout_p else A) @ value

    def keep(self, A: Tensor) -> Tensor:
        """The same matrix, after what is kept of it."""
        T = self.kept[0].shape[-1] if self.kept else A.shape[-1]
        whole = A.shape[-2:] == (T, T)
        if A.ndim == 3 and len(A) % self.pictures == 0:  # torch.nn.MultiheadAttention has (N heads, T, T)
            full = A.unflatten(0, (self.pictures, -1))
        else:
            whole, full = whole and A.ndim == 4 and len(A) == self.pictures, A
        if not whole:
            what = f"a matrix {tuple(A.shape)} of {self.pictures} pictures"
            mend = "attention-rollout needs global attention, (N, heads, T, T) of the same tokens everywhere; ask for"
            raise ClearwingError("attention", what, f"{mend} a method such as grad-cam")
        self.kept.append(full)
        return full.reshape(A.shape)


_SOFTMAX = frozenset((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax))


def _seen_inside(function: Any) -> Callable[..., Any]:
    """The function of torch as it is, but for handing itself over to a mode, so that the mode sees the calls in it."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    inner = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


_multi_head_attention = _seen_inside(F.multi_head_attention_forward)
