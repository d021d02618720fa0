"""The input rules beside guided backpropagation: their references, a peer where it is right, and their identities."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, InputXGradient
from torch import Tensor, nn

import reference
from clearwing.attribution.methods import explain
from clearwing.types import ClearwingError
from reference import small_images, small_net

NAMES = ["deconvnet", "input-x-gradient"]


def test_they_equal_the_references() -> None:
    net, images = small_net(), small_images(2)
    found = explain(net, images, NAMES, target=3)
    one = torch.eye(4, dtype=torch.float64)[3:]
    for n in range(2):
        x = images[n : n + 1]
        with torch.no_grad():
            deconv = reference.ruled_gradient(net.steps(), x, one, "deconvnet")[0]
            product = (x * reference.ruled_gradient(net.steps(), x, one, "plain"))[0]
        assert torch.allclose(found["deconvnet"].channels[n, 0], deconv, rtol=0, atol=1e-11)
        assert torch.allclose(found["deconvnet"].maps[n, 0], reference.strongest(deconv), rtol=0, atol=1e-11)
        assert torch.allclose(found["input-x-gradient"].channels[n, 0], product, rtol=0, atol=1e-12)
        assert torch.allclose(found["input-x-gradient"].maps[n, 0], product.sum(0), rtol=0, atol=1e-12)
    assert all(found[name].maps.abs().max() > 0.01 for name in NAMES)


class Spelled(nn.Module):
    """The same network with its ReLUs as modules, or as functions that hooks on modules do not see."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, stride=2), nn.Linear(54, 4)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.functional = functional
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            return self.fc(F.relu(self.two(F.relu(self.one(x)))).flatten(1))
        return self.fc(self.relu2(self.two(self.relu1(self.one(x)))).flatten(1))


def test_they_equal_captum_on_modules_and_deconvnet_is_the_same_on_functions() -> None:
    net, images = Spelled(False), small_images(3, size=9)
    found = explain(net, images, NAMES, target=2)
    own = images.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum warns of its hooks
        peers = {"deconvnet": Deconvolution(net), "input-x-gradient": InputXGradient(net)}
        for name, peer in peers.items():
            expected = peer.attribute(own, target=2).detach()
            assert torch.allclose(found[name].channels[:, 0], expected, rtol=0, atol=1e-13)
            assert expected.abs().max() > 1e-3
    functions = explain(Spelled(True), images, "deconvnet", target=2)
    assert torch.allclose(functions.channels, found["deconvnet"].channels, rtol=0, atol=1e-14)
    assert not torch.allclose(functions.channels, explain(net, images, "saliency", target=2).channels, atol=1e-3)


def test_input_x_gradient_shares_out_the_score_of_a_network_without_biases() -> None:
    """Euler: a piecewise linear network without biases is homogeneous, so x . grad = score, for every class."""
    net = Spelled(False)
    for layer in (net.one, net.two, net.fc):
        nn.init.zeros_(layer.bias)
    e = explain(net, small_images(3, size=9), "input-x-gradient", target="top-4")
    assert torch.allclose(e.maps.sum((2, 3)), e.logits.gather(1, e.classes), rtol=0, atol=1e-13)
    assert e.maps.min() < 0 < e.maps.max()


def test_without_a_relu_deconvnet_is_refused() -> None:
    with pytest.raises(ClearwingError, match="the deconvnet rule would be the plain gradient"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), small_images().float(), "deconvnet")


@pytest.mark.parametrize("target", [(1, 3), lambda z: z[:, 1] - z[:, 3]])
def test_contrasts_and_functions(target: Any) -> None:
    net, images = small_net(), small_images(2)
    found = explain(net, images, NAMES, target=target)
    R = torch.tensor([[0.0, 1, 0, -1]], dtype=torch.float64)
    with torch.no_grad():
        deconv = reference.ruled_gradient(net.steps(), images[:1], R, "deconvnet")[0]
    assert torch.allclose(found["deconvnet"].channels[0, 0], deconv, rtol=0, atol=1e-11)
    apart = [explain(net, images, "input-x-gradient", target=k).channels for k in (1, 3)]
    assert torch.allclose(found["input-x-gradient"].channels, apart[0] - apart[1], rtol=0, atol=1e-13)


def test_bfloat16() -> None:
    exact = explain(small_net(), small_images(), NAMES, target=1)
    half = explain(small_net(), small_images(), NAMES, target=1, precision="bfloat16")
    low = explain(small_net().bfloat16(), small_images(), NAMES, target=1)
    for name, e in exact.items():
        for other in (half, low):
            assert other[name].maps.dtype == torch.float32
            assert F.cosine_similarity(other[name].maps.double().flatten(), e.maps.flatten(), dim=0) > 0.95
