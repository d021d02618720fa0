"""FullGrad, Srinivas and Fleuret 2019: a score shared out to the input and to the biases of a piecewise linear network.

With b all biases of such a network f, f(x) = x . df/dx + sum_b b . df/db: completeness. `decompose` gives these
shares, `left_out` what they miss of the score, and `fullgrad` the map that the authors make of those with places.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from clearwing.attribution.modules import INPUT, named_layers
from clearwing.attribution.network import wide
from clearwing.attribution.trace import Trace
from clearwing.attribution.views import upsample

TOLERANCE = 0.01
"""Share of the score that may be missing without a warning; in bfloat16, whose gradients are that coarse, 0.125."""
_TOLD = "fullgrad: incomplete"


def fullgrad(trace: Trace, scores: Tensor) -> Tensor:
    """FullGrad, the map (N, H, W): psi(x * df/dx) + sum over layers and channels of psi(b * df/db).

    psi takes the magnitude, rescales it to [0, 1] over all channels and places of a layer, as the authors' program
    does, and upsamples. The biases of linear layers have no place and are in no map.
    Warns once where the shares miss more than TOLERANCE of a score, for then the network has parts that the paper does
    not know: GELU, gates, layer norm, biases outside convolutions, batch norms and linear layers.
    """
    shares, linear = decompose(trace, scores)
    _warn(trace, left_out(shares, linear, scores))
    maps: dict[tuple[int, ...], Tensor] = {}  # one for each size: the sum and the upsampling may change places
    for share in shares.values():
        size = tuple(share.shape[2:])
        maps[size] = maps.get(size, 0) + _rescaled(share.abs()).sum(1)
    return sum((upsample(some, *trace.images.shape[2:]) for some in maps.values()), torch.zeros(()).to(scores.device))


def biased(model: nn.Module) -> list[str]:
    """The names of the layers with a bias at every place, convolutions and batch norms, as `record` takes them.

    Give them as `optional`: some networks have layers that do not run in evaluation.
    """
    return list(named_layers(model, _sites(model)))


def decompose(trace: Trace, scores: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The shares of the scores (N,): {"input": (N, C, H, W), layer: (N, c, h, w)}, and of all linear biases (N,).

    The sum of everything of a picture is its score where the network is piecewise linear and all biases are known
    (`left_out`). "input" is taken where the network begins: of a Classifier (x - mean) * df/dx, which is the share of
    the normalised picture. A layer's share is its bias times the gradient at its output, a batch norm's bias is
    beta - gamma mu / sigma. The trace must hold the layers of `biased` that run, and the inputs.

    >>> trace = record(model, images, optional=biased(model))
    >>> shares, linear = decompose(trace, trace.scores(0))
    """
    sites = _sites(trace.model)
    layers = {name: site for name, site in named_layers(trace.model, sites).items() if name not in trace.absent}
    G = trace.gradients(scores, of=(INPUT, *layers))
    x = wide(trace.images)
    shares = {INPUT: (x - _mean(trace.model, x)) * wide(G[INPUT])}
    for name, module in layers.items():
        shares[name] = _bias(sites[module], x) * wide(G[name])
    return shares, _of_linear_biases(trace, scores)


def left_out(shares: dict[str, Tensor], linear: Tensor, scores: Tensor) -> Tensor:
    """What the shares miss of the scores, (N,): |S - sum| over |S|, or over a tenth of sum_l |sum of layer l| if more.

    The tenth keeps rounding out where a score is small beside the shares that cancel in it.
    """
    sums = torch.stack([linear, *(share.flatten(1).sum(1) for share in shares.values())])  # (layers, N)
    S = wide(scores)
    scale = torch.maximum(S.abs(), sums.abs().sum(0) / 10)
    return (S - sums.sum(0)).abs() / scale.clamp(min=torch.finfo(S.dtype).tiny)


def _warn(trace: Trace, missed: Tensor) -> None:
    tolerance = max(TOLERANCE, 16 * torch.finfo(trace.logits.dtype).eps)
    if _TOLD not in trace.told and (missed > tolerance).any():
        trace.told.add(_TOLD)
        line = f"fullgrad misses {missed.nan_to_num().max():.0%} of a score: the network or the score is not piecewise "
        line += "linear, or has biases outside convolutions, batch norms and linear layers; the map leaves these out"
        warnings.warn(line, UserWarning, stacklevel=2)


def _sites(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The modules whose outputs tell the share of a bias at every place, and the modules that have the bias."""
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
            found[module] = module
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.running_mean is not None:
            if type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
                found[module] = module
            elif isinstance(drop := getattr(module, "drop", None), nn.Module):  # timm's: norm, dropout and ReLU in one
                found[drop] = module
    return found


def _bias(module: Any, x: Tensor) -> Tensor:
    """What the layer adds at every place, (c, 1, 1), in the arithmetic of x."""

    def channels(tensor: Tensor) -> Tensor:
        return tensor.detach().to(x)[:, None, None]

    if not hasattr(module, "running_mean"):
        return channels(module.bias)
    shift = -channels(module.running_mean) * (channels(module.running_var) + module.eps).rsqrt()
    return channels(module.bias) + channels(module.weight) * shift if module.affine else shift


def _mean(model: nn.Module, x: Tensor) -> Tensor:
    """The mean (1, C, 1, 1) that a Classifier takes from its pictures; of any other network 0."""
    classifier = hasattr(model, "class_names") and isinstance(getattr(model, "backbone", None), nn.Module)
    mean = getattr(model, "mean", None)
    return mean.to(x) if classifier and isinstance(mean, Tensor) else x.new_zeros(())


def _of_linear_biases(trace: Trace, scores: Tensor) -> Tensor:
    """The share (N,) of the biases of all nn.Linear, from the graph: their outputs have no places to be recorded at."""
    linears = [module for module in trace.model.modules() if isinstance(module, nn.Linear) and module.bias is not None]
    edges, biases = [], []
    for node in _nodes(scores):
        if node.name() == "AddmmBackward0":
            weight = node._saved_mat2.mT  # type: ignore[attr-defined]
            known = [module.bias.detach() for module in linears if _same(weight, module.weight)][:1]
            edges += [GradientEdge(node, 0)] * len(known)
            biases += known
    total = torch.zeros_like(wide(scores))
    if edges:
        with torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(scores.sum(), edges, retain_graph=True)
        for G, bias in zip(found, biases, strict=True):  # G (N or N times some, outputs)
            total = total + (wide(G) @ bias.to(total)).unflatten(0, (len(total), -1)).sum(1)
    return total


def _nodes(scores: Tensor) -> list[Node]:
    """All nodes of the graph of the scores."""
    found = {get_gradient_edge(scores).node: None}
    waiting = list(found)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                waiting.append(node)
    return list(found)


def _same(used: Tensor, weight: Tensor) -> bool:
    """Whether the weight that a pass used is this one, or a copy of it in the arithmetic of the pass."""
    if used.shape != weight.shape:
        return False
    if used.data_ptr() == weight.data_ptr():
        return True
    single = weight if used.dtype == torch.float64 else weight.float()  # through which a pass casts to bfloat16, too
    return torch.equal(used, single.to(used.dtype))


def _rescaled(values: Tensor) -> Tensor:
    """Each picture's (N, C, h, w) to [0, 1]; 0 where they are all the same."""
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return (values - low) / torch.where(high == low, 1, high - low)
