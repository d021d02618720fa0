"""CAM rules: references from the papers, the identities at the last stage, and what `cam` refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from clearwing.attribution import cams
from clearwing.attribution.methods import explain
from clearwing.attribution.trace import record
from clearwing.models.classifier import Classifier
from clearwing.types import ClearwingError, Status
from reference import small_images, small_net

LAST_STAGE = ["grad-cam", "xgrad-cam", "hires-cam"]


def activation_and_gradient(layer: str, target: int = 3) -> tuple[Tensor, Tensor]:
    """A and G (3, K, h, w) of a SmallNet."""
    trace = record(small_net(), small_images(), [layer], inputs=False)
    return trace.features[layer].detach(), trace.gradients(trace.scores(target))[layer]


# references


@pytest.mark.parametrize("layer", ["stem", "layer1", "layer2"])
def test_the_rules_equal_the_references(layer: str) -> None:
    names = ["grad-cam++", "xgrad-cam", "hires-cam", "element-wise", "eigengrad-cam", "eigen-cam"]
    net, images = small_net(), small_images(2)
    found = explain(net, images, names, [layer], target=3, relu=False)
    features = record(net, images, [layer]).features[layer].detach()
    with torch.no_grad():
        for n in range(2):
            A = features[n]
            G = reference.gradient(lambda x: reference.forward(net.steps(layer), x)[:, 3], features[n : n + 1])[0]
            expected = {
                "grad-cam++": reference.grad_cam_plus_plus(A, G, G**2, G**3),
                "xgrad-cam": reference.xgrad_cam(A, G),
                "hires-cam": reference.hires_cam(A, G),
                "element-wise": reference.element_wise(A, G),
                "eigengrad-cam": reference.eigen_cam(G * A),
                "eigen-cam": reference.eigen_cam(A),
            }
            for name in names:
                fine = reference.upsample(expected[name], 8, 8)
                maps = found[f"{name}@{layer}"].maps[n, 0]
                # Grad-CAM++ has denominators near 0 at layer1, and numeric gradients
                assert torch.allclose(maps, fine, rtol=0, atol=1e-6 * float(fine.abs().max())), name
                assert fine.abs().max() > 1e-2


def test_grad_cam_plus_plus_has_the_derivatives_of_the_exponential() -> None:
    """Y = exp(S): the weights from its numeric derivatives are exp(S) times those of the rule."""
    net, images = small_net(), small_images(1)
    A, G = (of[:1] for of in activation_and_gradient("layer2"))
    with torch.no_grad():
        Y = torch.exp(net(images)[0, 3])
        numeric = reference.derivatives(lambda x: net.head(x)[:, 3].exp(), A, step=0.02)
        expected = reference.grad_cam_plus_plus(A[0], *(one[0] for one in numeric))
    assert torch.allclose(Y * cams.grad_cam_plus_plus(A, G)[0], expected, rtol=1e-4)
    assert expected.max() > 0.1


def test_weights_whose_denominator_is_zero_are_zero() -> None:
    A = torch.tensor([[[[1.0, -1.0]], [[1.0, -3.0]]]])  # sums 0 and -2
    G = torch.tensor([[[[3.0, 5.0]], [[1.0, 0.0]]]])  # 2 + sum G: 2, 2; 0, 2
    assert torch.equal(cams.grad_cam_plus_plus(A, G), (A * torch.tensor([4.0, 0.0])[:, None, None]).sum(1))
    assert torch.equal(cams.xgrad_cam(A, G), -0.5 * A[:, 1])
    for rule in (cams.grad_cam_plus_plus, cams.xgrad_cam, cams.eigengrad_cam, cams.element_wise):
        assert torch.equal(rule(A, 0 * G), torch.zeros(1, 1, 2))


def test_small_and_large_gradients_in_float32() -> None:
    A, G = (of.float() for of in activation_and_gradient("layer2"))
    G = G.abs() * 1e-20  # its third power is 0 in float32
    assert torch.allclose(cams.grad_cam_plus_plus(A, G) * 1e20, cams.weighted(G.sum((2, 3)) * 1e20 / 2, A))
    large = cams.eigengrad_cam(A, G * 1e20)
    assert torch.allclose(cams.eigengrad_cam(A, G * 1e-10) * 1e30, large, rtol=1e-4)
    assert torch.allclose(cams.eigengrad_cam(A, G * 1e20 * 1e30) / 1e30, large, rtol=1e-4)


# identities


def test_at_the_last_stage_the_methods_are_one() -> None:
    """With mean pooling and a linear head: Grad-CAM = XGrad-CAM = HiResCAM = CAM / hw, of sum logit - bias."""
    net, images = small_net(), small_images()
    for target in (3, "pred", (2, 0), lambda z: z[:, 2] - 0.5 * z[:, 1].exp()):
        found = explain(net, images, [*LAST_STAGE, "cam"], ["layer2"], target=target, relu=False)
        cam = found["cam@layer2"].maps
        assert cam.abs().max() > 0.1
        for name in LAST_STAGE:
            assert torch.allclose(found[f"{name}@layer2"].maps * 16, cam, rtol=0, atol=1e-13), name
    A, G = activation_and_gradient("layer2")
    left = (net(images)[:, 3] - net.fc.bias[3]).detach()
    for rule in (cams.grad_cam, cams.xgrad_cam, cams.hires_cam):
        assert torch.allclose(rule(A, G).sum((1, 2)), left, atol=1e-13)


def test_the_sum_of_hires_cam_over_a_linear_network_is_the_logit_less_the_bias() -> None:
    """Draelos and Carin 2020: also where the gradient differs from place to place."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).double().eval()
    images = small_images()
    trace = record(net, images, "0")
    A, G = trace.features["0"].detach(), trace.gradients(trace.scores(1))["0"]
    assert torch.allclose(cams.hires_cam(A, G).sum((1, 2)), (trace.logits[:, 1] - net[2].bias[1]).detach())


@pytest.mark.parametrize(("channels", "side"), [(3, 5), (40, 3)])
def test_the_first_component(channels: int, side: int) -> None:
    """Either Gram matrix; turned with the gradient; a scale is kept; what is of rank one is found back."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, channels, side, side, generator=generator).double()
    for one, found in zip(A, cams._first_component(A), strict=True):
        assert torch.allclose(found, reference.eigen_cam(one), atol=1e-12)
    G = torch.randn(A.shape, generator=generator).double()
    assert torch.allclose(cams.eigengrad_cam(A, -G), -cams.eigengrad_cam(A, G), atol=1e-12)
    assert torch.allclose(cams.eigengrad_cam(A, 7 * G), 7 * cams.eigengrad_cam(A, G), atol=1e-12)
    weights, place = torch.rand(channels, generator=generator), torch.randn(side, side, generator=generator)
    rank_one = (weights[:, None, None] * place)[None]
    assert torch.allclose(cams._first_component(rank_one)[0], weights.norm() * place, atol=1e-5)


def test_a_picture_that_is_not_finite_leaves_the_others_alone() -> None:
    net, images = small_net(), small_images()
    names = ["cam", "eigen-cam", "eigengrad-cam", "grad-cam++", "xgrad-cam"]
    expected = explain(net, images, names, ["layer2"], target=3)
    images[1, 0, 2, 2] = torch.nan
    found = explain(net, images, names, ["layer2"], target=3)
    for key, e in found.items():
        assert e.status.flatten().tolist() == [Status.OK, Status.NONFINITE, Status.OK], key
        assert torch.allclose(e.maps[::2], expected[key].maps[::2], atol=1e-13)


# CAM


class Head(nn.Module):
    """A convolution and a head (N, 6, h, w) -> (N, K)."""

    def __init__(self, *head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)), nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def seeded(*head: nn.Module) -> nn.Module:
    net = Head(*head).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def pooled(classes: int = 4) -> nn.Module:
    return seeded(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, classes))


@pytest.mark.parametrize(
    "net",
    [
        pooled(),
        seeded(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten()),
        seeded(nn.Conv2d(6, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
)
def test_cam_is_the_weights_of_the_head(net: nn.Module) -> None:
    images = small_images()
    weight = next(m.weight for m in net.head if hasattr(m, "weight")).detach().flatten(1)
    A = net.features(images).detach()
    trace = record(net, images, ["features"], inputs=False)
    assert torch.allclose(cams.cam(trace, trace.scores(2), "features"), torch.einsum("k,nkij->nij", weight[2], A))
    grad = cams.grad_cam(A, trace.gradients(trace.scores(2))["features"])
    assert torch.allclose(
        cams.cam(trace, trace.scores(2, 1), "features"),
        36 * grad - 36 * cams.grad_cam(A, trace.gradients(trace.scores(1))["features"]),
    )


@pytest.mark.parametrize("target", [0, 1, (1, 0)])
def test_cam_of_a_head_with_one_logit(target: Any) -> None:
    net, images = pooled(1), small_images()
    model = Classifier(net, mean=(0.5, 0.4, 0.3), class_names=("healthy", "ill"))
    found = explain(model, images, ["cam", "grad-cam"], ["features"], target=target, relu=False)
    assert torch.allclose(found["cam@features"].maps, 36 * found["grad-cam@features"].maps)
    assert found["cam@features"].maps.abs().max() > 0.1


@pytest.mark.parametrize(
    ("message", "net", "layer"),
    [
        (r"layer: features.0: its mean over space through head.3 misses the logits", pooled(), "features.0"),
        (r"features: its mean over space through head.2 misses the logits by .*ask for grad-cam",
         seeded(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 4)), "features"),
        (r"features: its mean over space through head.2 misses",
         seeded(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.ReLU()), "features"),
        (r"features: no linear module takes its 6 channels to the 4 logits; cam needs mean pooling and a linear head",
         seeded(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 4)), "features"),
    ],
)  # fmt: skip
def test_cam_refuses_what_is_no_pooled_linear_head(message: str, net: nn.Module, layer: str) -> None:
    with pytest.raises(ClearwingError, match=message):
        explain(net, small_images(), "cam", layer)


def test_cam_in_every_mode_and_arithmetic() -> None:
    images = small_images(4)
    expected = explain(pooled(), images, "cam", "features", target="top-2", relu=False).maps
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for net in (pooled().requires_grad_(False), copy.deepcopy(pooled())):
                found = explain(net, images.clone(), "cam", "features", target="top-2", relu=False, chunk=3)
                assert torch.allclose(found.maps, expected, atol=1e-13)
    classes = explain(pooled(), images, target="top-2").classes
    for precision, net, close in (
        ("float32", pooled(), 1e-6),
        ("bfloat16", pooled(), 1e-2),
        (None, pooled().bfloat16(), 1e-2),
    ):
        low = explain(net, images, "cam", "features", target=classes, relu=False, precision=precision).maps
        assert low.dtype == torch.float32
        assert 1 - F.cosine_similarity(low.double().flatten(), expected.flatten(), dim=0) < close
