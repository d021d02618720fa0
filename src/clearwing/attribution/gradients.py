"""Input rules: a recorded forward pass and the scores to signed evidence for every value of the pictures, (N, C, H, W).

`strongest` makes a map of it. Each rule differentiates the sum of the scores (N,): in evaluation mode a picture's
score does not depend on the other pictures, so this is every picture's own gradient in one backward pass.
"""

from __future__ import annotations

from torch import Tensor

from clearwing.attribution.network import wide
from clearwing.attribution.trace import Trace


def saliency(trace: Trace, scores: Tensor) -> Tensor:
    """The gradient of the score at the picture, Simonyan et al. 2014 section 3 (their map is `strongest` of it)."""
    return trace.gradients(scores, of=("input",))["input"]


def guided_backprop(trace: Trace, scores: Tensor) -> Tensor:
    """The gradient with the guided ReLU rule, Springenberg et al. 2015 section 3.4."""
    return trace.gradients(scores, "guided", of=("input",))["input"]


def deconvnet(trace: Trace, scores: Tensor) -> Tensor:
    """The gradient with the deconvnet ReLU rule, Zeiler and Fergus 2014 section 2.1."""
    return trace.gradients(scores, "deconvnet", of=("input",))["input"]


def input_x_gradient(trace: Trace, scores: Tensor) -> Tensor:
    """Every value of the picture times its gradient, Shrikumar et al. 2016: a share of the score for each."""
    return wide(trace.images) * wide(saliency(trace, scores))


def guided_grad_cam(trace: Trace, scores: Tensor, cam: Tensor) -> Tensor:
    """Guided backpropagation times the rectified, upsampled Grad-CAM (N, H, W), Selvaraju et al. 2017 section 3."""
    return guided_backprop(trace, scores) * cam[:, None]


def strongest(channels: Tensor) -> Tensor:
    """The largest magnitude over the colour channels, (N, C, H, W) -> (N, H, W), Simonyan et al. 2014 section 3.1."""
    return channels.abs().amax(1)
