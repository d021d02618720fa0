"""Test-time averaging: what a view shows, the way back, and the mean of the raw maps of all views."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from clearwing.attribution.methods import METHODS, explain
from clearwing.attribution.views import PLAIN, View, upsample, views
from clearwing.types import ClearwingError, Status
from reference import small_images, small_net

SOME = ["grad-cam", "layer-cam", "guided-grad-cam", "saliency"]


def resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def fine(maps: Tensor) -> Tensor:
    """Maps (..., h, w) at 8 x 8; a test below holds it beside the reference."""
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, (8, 8), mode="bilinear").reshape(*maps.shape[:-2], 8, 8)


# one view


def test_views_are_the_plain_one_first_and_every_pair_of_scale_and_flip_once() -> None:
    assert views(()) == [PLAIN] == [View(False, 1.0)]
    assert views(("flip",)) == views("flip") == [PLAIN, View(True)]
    assert (
        views(("flip", 0.75)) == views((0.75, "flip", 1, "flip", 0.75)) == [*views("flip"), *views(("flip", 0.75))[2:]]
    )
    assert views(("flip", 0.75))[2:] == [View(False, 0.75), View(True, 0.75)]
    assert views(2) == [PLAIN, View(False, 2.0)]


@pytest.mark.parametrize("wrong", ["flop", 0, -1.0, True, float("inf"), float("nan"), None, ("flip",)])
def test_what_is_no_view_is_refused(wrong: Any) -> None:
    with pytest.raises(ClearwingError, match=r'^average: .*; give "flip" and scales'):
        explain(small_net(), small_images(), average=("flip", wrong))


def test_a_view_and_the_way_back() -> None:
    images = small_images(2)
    assert PLAIN.see(images) is images
    flipped = View(flip=True)
    assert torch.equal(flipped.see(images), images[..., [7, 6, 5, 4, 3, 2, 1, 0]])
    assert torch.equal(flipped.back(flipped.see(images), 8, 8), images)
    seen = View(True, 0.75).see(images)
    assert seen.shape == (2, 3, 6, 6)
    assert torch.allclose(seen, resized(images, 6).flip(-1))
    assert View(scale=0.01).see(images).shape == (2, 3, 1, 1)
    assert View(scale=1.5).see(images[..., :4]).shape == (2, 3, 12, 6)
    maps = images[:, 0, :6, :6].flip(-1)
    assert torch.allclose(View(True, 0.75).back(maps, 8, 8), fine(images[:, 0, :6, :6]), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pictures_of_narrow_types_are_resized_too(dtype: torch.dtype) -> None:
    images = small_images(1).to(dtype)
    seen = View(scale=0.5).see(images)
    assert seen.dtype == dtype
    assert torch.allclose(seen.double(), resized(images.double(), 4), atol=torch.finfo(dtype).eps)
    maps = explain(small_net().to(dtype), images, "saliency", average=(0.5, "flip")).maps
    assert maps.isfinite().all()
    assert maps.dtype == torch.float32


def test_upsampling_is_bilinear_for_any_leading_shape() -> None:
    maps = small_images(2)[:, :, :3, :5]
    expected = torch.stack([reference.upsample(one, 8, 8) for one in maps.flatten(0, 1)]).unflatten(0, (2, 3))
    assert torch.allclose(upsample(maps, 8, 8), expected, atol=1e-14)
    assert torch.allclose(fine(maps), expected, atol=1e-14)


# the mean


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("average", [("flip",), (0.75,), ("flip", 1.5, 0.75)])
def test_the_average_is_the_mean_of_the_maps_of_the_views(average: Any, relu: bool) -> None:
    net, images = small_net(), small_images()
    layers = ["layer1", "layer2"]
    found = explain(net, images, SOME, layers, target="top-2", relu=relu, average=average)
    classes = found["saliency"].classes  # on the picture as it is, as below
    assert torch.equal(classes, net(images).argsort(1, descending=True)[:, :2])
    scales, flips = [1.0, *(one for one in average if one != "flip")], [False, True] if "flip" in average else [False]
    shown = [(scale, flip) for scale in scales for flip in flips]
    apart = []
    for scale, flip in shown:
        seen = images if scale == 1 else resized(images, round(8 * scale))
        apart.append(explain(net, seen.flip(-1) if flip else seen, SOME, layers, target=classes, relu=relu))
    for key, e in found.items():
        for part in ("maps", "channels"):
            values = [getattr(one[key], part) for one in apart]
            if values[0] is None:
                assert getattr(e, part) is None
                continue
            back = [fine(v.flip(-1) if flip else v) for v, (_, flip) in zip(values, shown, strict=True)]
            assert torch.allclose(getattr(e, part), sum(back) / len(shown), atol=1e-13), (key, part)
        assert torch.equal(e.logits, apart[0][key].logits)
        assert torch.allclose(e.peak, e.maps.amax((2, 3)))
        assert torch.equal(e.classes, classes)


def test_without_views_nothing_changes() -> None:
    net, images = small_net(), small_images()
    plain = explain(net, images, SOME, "layer1")
    for average in ((), [], (1.0,), (1,)):
        for key, e in explain(net, images, SOME, "layer1", average=average).items():
            assert all(torch.equal(value, getattr(plain[key], name)) for name, value in e.tensors().items())


def test_a_symmetric_network_gives_what_it_gave_and_a_symmetric_picture_a_symmetric_map() -> None:
    net, images = small_net(), small_images()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data += module.weight.data.flip(-1)
            module.stride = (1, 1)  # a grid of stride 2 is not its own mirror image
    once = explain(net, images, SOME, "layer1", target=1)
    for key, e in explain(net, images, SOME, "layer1", target=1, average="flip").items():
        assert torch.allclose(e.maps, once[key].maps, atol=1e-13)
    both = images + images.flip(-1)
    for e in explain(small_net(), both, SOME, "layer1", target=1, average="flip").values():
        assert torch.allclose(e.maps, e.maps.flip(-1), atol=1e-13)
        assert e.maps.abs().max() > 1e-5


def test_the_average_of_signed_maps_is_linear_in_the_target() -> None:
    net, images = small_net(), small_images()

    def signed(target: Any) -> Tensor:
        return explain(net, images, "grad-cam", "layer1", target=target, relu=False, average=("flip", 1.25)).maps

    assert torch.allclose(signed((2, 0)), signed(2) - signed(0), atol=1e-13)
    assert torch.allclose(signed(lambda z: 2 * z[:, 3]), 2 * signed(3), atol=1e-13)


def test_maps_are_averaged_before_layers_are_joined() -> None:
    """Each layer's mean map is divided by its own maximum; the mean of joined maps would be another."""
    net, images = small_net(), small_images()
    layers = ["stem", "layer2"]
    apart = explain(net, images, ["layer-cam"], layers, target=1, average="flip")
    fused = explain(net, images, "layer-cam", layers, target=1, average="flip", fuse="mean")["layer-cam@stem+layer2"]
    maps = [e.maps / e.maps.amax((2, 3), keepdim=True) for e in apart.values()]
    assert torch.allclose(fused.maps, sum(maps) / 2, atol=1e-13)
    assert torch.allclose(fused.peak, torch.stack([e.peak for e in apart.values()]).amax(0))
    plain, mirrored = (
        explain(net, seen, "layer-cam", layers, target=1, fuse="mean")["layer-cam@stem+layer2"].maps
        for seen in (images, images.flip(-1))
    )
    assert not torch.allclose(fused.maps, (plain + mirrored.flip(-1)) / 2, atol=1e-3)


def test_classes_are_decided_on_the_picture_as_it_is() -> None:
    """Of a network that knows left from right, the mirrored view would predict the other class."""

    class Sided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.stack((x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))), 1)

    net = Sided().eval()
    nn.init.ones_(net.conv.weight)
    images = torch.zeros(2, 1, 8, 8)
    images[0, ..., :4], images[1, ..., 4:] = 1, 1
    e = explain(net, images, "saliency", average="flip")
    assert e.classes.tolist() == [[0], [1]]
    assert torch.equal(e.logits, net(images))
    alone = explain(net, images, "saliency")
    assert torch.allclose(e.maps, (alone.maps + alone.maps.flip(-1)) / 2)  # seen mirrored, class 0 still looks left


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].kind == "passes"])
def test_methods_with_passes_of_their_own_are_averaged_too(name: str) -> None:
    net, images = small_net(), small_images(2)
    layer = "layer1" if METHODS[name].needs_layer else None
    defaults = inspect.signature(METHODS[name].rule).parameters
    few = {option: 2 for option in METHODS[name].options if type(defaults[option].default) is int}
    both = explain(net, images, name, layer, target=1, seed=3, options=few, average="flip")
    plain, mirrored = (
        explain(net, seen, name, layer, target=1, seed=3, options=few).maps for seen in (images, images.flip(-1))
    )
    assert torch.allclose(both.maps, (plain + mirrored.flip(-1)) / 2, atol=1e-13)


# what a map's raw maximum tells


def test_the_raw_maximum_is_kept_where_layers_are_joined() -> None:
    net, images = small_net(), small_images(3)
    layers = ["stem", "layer1", "layer2"]
    apart = explain(net, images, ["layer-cam"], layers, target="top-3")
    peaks = torch.stack([e.maps.amax((2, 3)) for e in apart.values()])
    assert all(torch.equal(e.peak, e.maps.amax((2, 3))) for e in apart.values())
    for fuse in ("max", "mean", "product"):
        e = explain(net, images, "layer-cam", layers, target="top-3", fuse=fuse)["layer-cam@stem+layer1+layer2"]
        assert e.peak.shape == (3, 3)
        assert torch.allclose(e.peak, peaks.amax(0), atol=1e-14)
        assert e.maps.max() <= 1 + 1e-12


def test_no_evidence_shows_where_maps_are_joined() -> None:
    """A class whose weights are all negative has no positive evidence; one with a trace of it keeps its small size."""
    net, images = small_net(), small_images(2)
    with torch.no_grad():
        net.layer1.conv.weight.zero_()
        for stage in (net.stem[0], net.layer2[0]):
            stage.weight.abs_()
        for norm in (net.stem[1], net.layer1.bn, net.layer2[1]):
            norm.weight.abs_()
        net.fc.weight[0], net.fc.weight[1], net.fc.weight[2] = -1.0, 1e-9, 1.0
    layers = ["stem", "layer2"]
    for fuse in ("max", "mean", "product"):
        e = explain(net, images, "grad-cam", layers, target=torch.tensor([[0, 1, 2]] * 2), fuse=fuse)[
            "grad-cam@stem+layer2"
        ]
        assert e.status.tolist() == [[Status.ZERO, Status.OK, Status.OK]] * 2
        assert torch.equal(e.peak[:, 0], torch.zeros(2, dtype=torch.float64))
        assert torch.allclose(e.peak[:, 1], 1e-9 * e.peak[:, 2])
        assert torch.allclose(e.maps[:, 1], e.maps[:, 2])  # joined maps alone would hide it
