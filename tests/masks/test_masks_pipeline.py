"""The door from explanation to masks, its recipes and the baselines."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from clearwing.masks.baselines import centre_box, centre_gaussian, everything
from clearwing.masks.pipeline import RECIPES, Recipe, fuse, segment, segment_with
from clearwing.masks.refine import blur
from clearwing.types import Batch, ClearwingError, Explanation


def scene(n=3, size=48, seed=0):
    """Noisy discs on another colour: images (N, 3, H, W) and their truth bool (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    at = torch.arange(n)[:, None, None]
    truth = (y - size // 2 - at) ** 2 + (x - size // 2 + 2 * at) ** 2 < (size // 4) ** 2
    colours = torch.tensor([[0.2, 0.5, 0.3], [0.8, 0.3, 0.2]])
    images = colours[truth.long()].permute(0, 3, 1, 2)
    return (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1), truth


def explanation(maps, method="layer-cam", layer="layer2"):
    """An Explanation of maps (N, M, H, W)."""
    n, m = maps.shape[:2]
    return Explanation(
        maps=maps,
        classes=torch.zeros(n, m, dtype=torch.int64),
        logits=torch.zeros(n, 2),
        method=method,
        layer=layer,
        status=torch.zeros(n, m, dtype=torch.uint8),
    )


def rough(truth):
    return blur(truth.roll((3, -3), (1, 2)).float(), 4)


def overlap(masks, truth):
    return ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).tolist()


def test_segment_finds_the_object():
    images, truth = scene()
    masks = segment(explanation(rough(truth)[:, None]), images)
    assert masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1}
    assert min(overlap(masks.bool(), truth)) > 0.95
    assert torch.equal(segment(rough(truth), Batch(images)), masks)  # maps alone, and a Batch


def test_a_batch_equals_one_by_one():
    images, truth = scene()
    e = rough(truth)
    assert torch.equal(torch.cat([segment(e[i : i + 1], images[i : i + 1]) for i in range(3)]), segment(e, images))


def test_without_refinement_the_threshold_alone_remains():
    images, truth = scene()
    maps = rough(truth)
    assert min(overlap(segment(maps, images, threshold="max:0.5", refine=None).bool(), truth)) > 0.6
    assert torch.equal(segment(maps, images, refine=None), segment(maps, images, "otsu", refine="none"))
    raw = replace(RECIPES["default"], weights=(1.0,), blur=0, threshold=0.5, refine="none", keep=0, fill=False)
    assert torch.equal(segment_with(raw, maps, images).masks.bool(), maps > 0.5)


def test_the_classic_recipe_step_by_step():
    images, _ = scene(n=2)
    gradient = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    maps = gradient.abs().amax(1)  # what "saliency" gives
    result = segment_with("classic", explanation(maps[:, None], "saliency", None), images)
    for got, m in zip(result.masks.numpy(), maps.numpy(), strict=True):
        expected = ndimage.maximum_filter((m > np.percentile(m, 80)).astype(np.uint8), 5)
        assert (got == expected).all()
    assert not result.fell_back.any()
    assert (RECIPES["classic"].method, RECIPES["classic"].target) == ("saliency", "pred")


def test_two_layers_are_joined_by_their_own_maxima():
    a, b = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([x / x.max() + 0.3 * y / y.max() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(fuse([a, 1000 * b], (1.0, 0.3)), expected)
    torch.testing.assert_close(
        fuse([a, -b], (1.0, 0.3)), fuse([a, 0 * b], (1.0, 0.3))
    )  # nowhere positive: adds nothing


def test_the_default_takes_a_dict_of_two_layers():
    images, truth = scene()
    good, noise = rough(truth), torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    both = {
        "layer-cam@layer2": explanation(good[:, None]),
        "layer-cam@layer3": explanation(50 * noise[:, None], layer="layer3"),
    }
    result = segment_with("default", both, images)
    assert result.how["maps"] == ["layer-cam@layer2", "layer-cam@layer3"]
    assert torch.equal(result.masks, segment(list(both.values()), images))
    json.dumps(result.how)
    with pytest.raises(ClearwingError, match="explanation: 1 maps; give 2"):
        segment_with("default", good, images)


def test_the_asked_class_is_chosen():
    images, truth = scene()
    maps = torch.stack([rough(truth), rough(truth).flip(2)], 1)
    second = segment(explanation(maps), images, class_index=1)
    assert torch.equal(second, segment(maps[:, 1], images))
    assert not torch.equal(second, segment(explanation(maps), images))
    with pytest.raises(ClearwingError, match="class_index: 2; the explanation holds 2 classes"):
        segment(explanation(maps), images, class_index=2)


def test_maps_without_evidence_are_empty_and_counted():
    images, truth = scene(n=3)
    maps = rough(truth)
    maps[0], maps[1, 5, 5] = 0, math.nan
    for recipe in (replace(RECIPES["default"], weights=(1.0,)), RECIPES["classic"]):
        result = segment_with(recipe, maps, images)
        assert result.empty.tolist() == [True, True, False]
        assert result.masks.any(2).any(1).tolist() == [False, False, True]
    assert torch.equal(segment(maps, images)[2:], segment(rough(truth), images)[2:])


def test_a_failed_refinement_is_counted_and_the_threshold_stands_in():
    images = torch.full((1, 3, 32, 32), 0.5)
    maps = torch.zeros(1, 32, 32)
    maps[0, 10:20, 10:20] = 1 + torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    result = segment_with(replace(RECIPES["default"], weights=(1.0,)), maps, images)
    assert result.fell_back.tolist() == [True]
    assert torch.equal(result.masks, segment(maps, images, RECIPES["default"].threshold, refine=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refine": "grabcat"}, "refine: grabcat; did you mean grabcut"),
        ({"threshold": "otso"}, "threshold: otso; did you mean otsu"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    images, truth = scene(n=1)
    with pytest.raises(ClearwingError, match=message):
        segment(rough(truth), images, **arguments)


def test_wrong_arguments_are_refused():
    images, truth = scene(n=2)
    maps = rough(truth)
    with pytest.raises(ClearwingError, match="recipe: clasic; did you mean classic"):
        segment_with("clasic", maps, images)
    with pytest.raises(ClearwingError, match=r"images: \(1, 3, 48, 48\); .* \(2, 48, 48\)"):
        segment(maps, images[:1])
    with pytest.raises(ClearwingError, match=r"images: \(2, 3, 24, 24\)"):
        segment(maps, images[:, :, ::2, ::2], refine=None)
    with pytest.raises(ClearwingError, match=r"explanation: \['str'\]"):
        segment(["maps"], images)
    with pytest.raises(ClearwingError, match=r"explanation: \(2, 1, 48, 48\); give maps"):
        segment(maps[:, None], images)


def test_baselines():
    images, truth = scene(n=2)
    assert everything(images).all()
    assert everything(images).shape == (2, 48, 48)

    bump = centre_gaussian(torch.zeros(2, 3, 20, 40))
    assert bump.shape == (2, 20, 40)
    torch.testing.assert_close(bump, bump.flip(1, 2))
    # the standard deviation is 10 of the 40 columns; the centres of columns 30 and 20 lie 10.5 and 0.5 from the middle
    torch.testing.assert_close(bump[0, 9, 30] / bump[0, 9, 20], torch.tensor(math.exp(-(10.5**2 - 0.5**2) / 200)))
    area = segment_with("classic", bump, torch.zeros(2, 3, 20, 40)).masks.float().mean()
    assert 0.2 < area < 0.4

    masks, fell_back = centre_box(images)
    assert not fell_back.any()
    assert min(overlap(masks, truth)) > 0.9
    with pytest.raises(ClearwingError, match=r"share: 1\.5"):
        centre_box(images, 1.5)


def test_a_recipe_is_a_value():
    assert Recipe(method="saliency", threshold="percentile:80", pool=5) == RECIPES["classic"]
