"""CAM rules: the activation A and the gradient G of the score, both (N, C, h, w), to a raw map (N, h, w).

A rule leaves out the last ReLU, the upsampling and the scale: `clearwing.attribution.methods` does the first two for
every rule alike, and only what draws a map scales it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clearwing.attribution.backward import differentiate
from clearwing.attribution.modules import named_layers
from clearwing.attribution.network import wide
from clearwing.attribution.trace import Trace
from clearwing.types import ClearwingError


def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """Grad-CAM, Selvaraju et al. 2017: alpha_k = mean_ij G^k_ij (eq. 1), sum_k alpha_k A^k (eq. 2 less its ReLU)."""
    return weighted(G.mean((2, 3)), A)


def grad_cam_plus_plus(A: Tensor, G: Tensor) -> Tensor:
    """Grad-CAM++, Chattopadhay et al. 2018, with Y = exp(S) of a score S that is piecewise linear in A.

    alpha^k_ij = G^2 / (2 G^2 + sum_ab A^k_ab G^3), with G at k, i, j, and 0 where the denominator is 0;
    w_k = sum_ij alpha^k_ij relu(dY / dA^k_ij), and sum_k w_k A^k less its ReLU. dY/dA is exp(S) G, and this positive
    factor of each picture is left out. alpha is computed as 1 / (2 + sum_ab A^k_ab G), which is the same without the
    powers of G that underflow. The paper's A has passed a ReLU; where A is negative the denominator has zeros, and near
    them the weights are as large as the formula makes them.
    """
    below = 2 + A.sum((2, 3), keepdim=True) * G
    alpha = torch.where(below == 0, 0, 1 / below)  # G = 0 has a weight of 0 either way
    return weighted((alpha * G.clamp(min=0)).sum((2, 3)), A)


def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """XGrad-CAM, Fu et al. 2020: w_k = sum_ij (A^k_ij / sum_ab A^k_ab) G^k_ij, 0 where that sum is 0."""
    total = A.sum((2, 3))
    return weighted(torch.where(total == 0, 0, (A * G).sum((2, 3)) / total), A)


def hires_cam(A: Tensor, G: Tensor) -> Tensor:
    """HiResCAM, Draelos and Carin 2020: sum_k G^k_ij A^k_ij, less the ReLU."""
    return (G * A).sum(1)


def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """LayerCAM, Jiang et al. 2021: w^k_ij = relu(G^k_ij), M_ij = sum_k w^k_ij A^k_ij less its ReLU."""
    return (G.clamp(min=0) * A).sum(1)


def element_wise(A: Tensor, G: Tensor) -> Tensor:
    """sum_k relu(G^k_ij A^k_ij): GradCAMElementWise of Gildenblat's pytorch-grad-cam, which has no paper."""
    return (G * A).clamp(min=0).sum(1)


def eigengrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """The first principal component of G A: EigenGradCAM of Gildenblat's pytorch-grad-cam, which has no paper."""
    return _first_component(G * A)


def eigen_cam(trace: Trace, scores: Tensor, layer: str) -> Tensor:
    """EigenCAM, Muhammad and Yeasin 2020: the activation on its first principal component. It knows no class."""
    return _first_component(wide(trace.features[layer]))


def cam(trace: Trace, scores: Tensor, layer: str) -> Tensor:
    """CAM, Zhou et al. 2016 eq. 2: M = sum_k w_k A^k, with w the weights of the score in a pooled linear head.

    It is Grad-CAM times h w there. Of scores that are not one logit, w is dS/dlogits times the weights of the head.
    Raises ClearwingError where the layer is not followed by a mean over space and a linear head; see `linear_head`.
    """
    weight, _ = linear_head(trace, layer)
    with torch.inference_mode(False), torch.enable_grad():
        (slope,), _ = differentiate(scores, [trace.logits])  # (N, K)
    if slope is None:
        raise ClearwingError("target", "scores", "they do not depend on the logits")
    return weighted(wide(slope) @ weight, wide(trace.features[layer]))


def linear_head(trace: Trace, layer: str) -> tuple[Tensor, Tensor]:
    """The weight (K, C) and bias (K,) with which logits = mean_ij A_ij weight^T + bias on this very pass; see
    `named_head`."""
    return named_head(trace, layer)[1:]


def named_head(trace: Trace, layer: str) -> tuple[str, Tensor, Tensor]:
    """The name, weight (K, C) and bias (K,) of the module with which logits = mean_ij A_ij weight^T + bias.

    It is the last nn.Linear or 1x1 nn.Conv2d of the model for which that holds up to the rounding of the
    arithmetic in use. Of a head with one logit z that was made the two logits (-z/2, z/2), they are of these two.
    Raises ClearwingError where no module does.
    """
    A, logits = wide(trace.features[layer]), wide(trace.logits)
    pooled, K, missed = A.mean((2, 3)), logits.shape[1], ""
    eps = max(torch.finfo(of.dtype).eps for of in (trace.features[layer], trace.logits))
    rounding = 4 * eps + 64 * torch.finfo(A.dtype).eps  # of the tensors, and of the sums
    for module in reversed(list(trace.model.modules())):
        if not isinstance(module, nn.Linear | nn.Conv2d) or module.weight[0].numel() != pooled.shape[1]:
            continue
        (name,) = named_layers(trace.model, module)
        weight = module.weight.detach().flatten(1).to(A)  # (K, C)
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().to(A)
        if len(weight) == 1 and K == 2:
            weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
        if len(weight) != K:
            continue
        error = (pooled @ weight.T + bias - logits).abs()
        allowed = rounding * (A.abs().mean((2, 3)) @ weight.abs().T + bias.abs())
        if not (error > allowed).any():  # so that a picture that is not finite does not refuse the others
            return name, weight, bias
        missed = missed or f"its mean over space through {name} misses the logits by {error.nan_to_num().max():.2g}"
    what = missed or f"no linear module takes its {pooled.shape[1]} channels to the {K} logits"
    mend = "cam needs mean pooling and a linear head right after the layer; ask for grad-cam"
    raise ClearwingError("layer", f"{layer}: {what}", mend)


def weighted(w: Tensor, A: Tensor) -> Tensor:
    """sum_k w_k A^k: (N, C) and (N, C, h, w) -> (N, h, w)."""
    return (w[:, None] @ A.flatten(2)).unflatten(2, A.shape[2:])[:, 0]


def _first_component(A: Tensor) -> Tensor:
    """The projection O v of the places, O = A as (hw, C), on the first right singular vector v of O = U S V^T.

    O is not centred, as in Muhammad and Yeasin 2020. The sign, which a decomposition leaves open, is the one in
    which the projection agrees with the plain sum over the channels: (O v) . (O 1) >= 0. v is of the eigenvectors of
    the smaller of O^T O and O O^T.
    """
    size = A.abs().amax((1, 2, 3))[:, None, None]
    size = torch.where((size > 0) & size.isfinite(), size, 1)  # squares neither overflow nor underflow
    At = A.flatten(2) / size  # (N, C, hw)
    C, places = At.shape[1:]
    gram = At @ At.mT if places > C else At.mT @ At
    finite = gram.isfinite().all(2).all(1)[:, None, None]
    first = torch.linalg.eigh(torch.where(finite, gram, 0))[1][:, :, -1:]  # (N, C or hw, 1): eigenvalues ascend
    v = first if places > C else At @ first  # (N, C, 1), here not of length 1
    v = v * torch.where(v.sum(1, keepdim=True) < 0, -1, 1) / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.where(finite, size * (v.mT @ At), torch.nan).unflatten(2, A.shape[2:])[:, 0]
