"""The door from explanation to masks, its recipes, and the vote of several of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from clearwing.masks.pipeline import RECIPES, VOTERS, Recipe, cut_likely, fuse, resized, segment, segment_with, vote
from clearwing.masks.refine import blur, clean, grabcut, likely_seeds, seeds
from clearwing.masks.threshold import binarize
from clearwing.types import Batch, ClearwingError, Explanation

ONE = replace(RECIPES["refine"], layers=1, weights=(1.0,))
"""The recipe on one map; no test may know the recipes' numbers, which are measured and change."""


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


def test_a_likely_mask_is_cut_along_the_edges():
    images, truth = scene()
    likely = (0.9 * rough(truth) / rough(truth).amax((1, 2), keepdim=True)).clamp(0, 1)
    likely[2] = 0.1  # nothing is foreground
    masks, fell_back = cut_likely(likely, images, (0.8, 0.1))
    assert fell_back.tolist() == [False, False, True]
    assert min(overlap(masks, truth)[:2]) > 0.95 > 0.7 > max(overlap(likely > 0.5, truth)[:2])
    assert not masks[2].any()
    codes = likely_seeds(likely, sure_foreground=0.8, sure_background=0.1)
    cut, _ = grabcut(images, codes, iterations=RECIPES["refine"].iterations)
    assert torch.equal(masks, clean(cut, likely, share=RECIPES["refine"].keep, fill=True))
    with pytest.raises(ClearwingError, match=r"seeds: sure_foreground=0\.2"):
        cut_likely(likely, images, (0.2, 0.1))


def test_without_refinement_the_threshold_alone_remains():
    images, truth = scene()
    maps = rough(truth)
    assert min(overlap(segment(maps, images, threshold="max:0.5", refine=None).bool(), truth)) > 0.6
    assert torch.equal(segment(maps, images, refine=None), segment(maps, images, "otsu", refine="none"))
    raw = replace(ONE, blur=0, threshold=0.5, pool=1, refine="none", keep=0, fill=False)
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


def test_refine_takes_a_dict_of_its_layers():
    images, truth = scene()
    recipe = RECIPES["refine"]
    maps = [rough(truth), *torch.rand(len(recipe.weights) - 1, 3, 48, 48, generator=torch.Generator().manual_seed(0))]
    layers = [f"layer{i + 1}" for i in range(len(maps))]
    given = {
        f"layer-cam@{layer}": explanation(50**i * m[:, None], layer=layer)
        for i, (layer, m) in enumerate(zip(layers, maps, strict=True))
    }
    result = segment_with("refine", given, images)
    assert result.how["maps"] == list(given)
    assert torch.equal(result.masks, segment(list(given.values()), images))
    json.dumps(result.how)
    with pytest.raises(ClearwingError, match=f"explanation: {len(maps) + 1} maps; give {len(maps)}"):
        segment_with("refine", [*given.values(), maps[0]], images)


def test_the_door_weighs_as_many_maps_as_it_is_given_alike():
    images, truth = scene()
    maps = [rough(truth), 9 * rough(truth.roll(4, 2)), rough(truth.roll(-4, 1)), rough(truth).square()]
    assert len(maps) != len(RECIPES["refine"].weights)
    alike = replace(RECIPES["refine"], weights=(1.0,) * 4)
    assert torch.equal(segment(maps, images), segment_with(alike, maps, images).masks)


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
    for recipe in (ONE, RECIPES["classic"]):
        result = segment_with(recipe, maps, images)
        assert result.empty.tolist() == [True, True, False]
        assert result.masks.any(2).any(1).tolist() == [False, False, True]
    assert torch.equal(segment(maps, images)[2:], segment(rough(truth), images)[2:])


def test_a_failed_refinement_is_counted_and_the_threshold_stands_in():
    images = torch.full((1, 3, 32, 32), 0.5)
    maps = torch.zeros(1, 32, 32)
    maps[0, 10:20, 10:20] = 1 + torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    result = segment_with(ONE, maps, images)
    assert result.fell_back.tolist() == [True]
    assert torch.equal(result.masks, segment(maps, images, ONE.threshold, refine=None))


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


# Pictures of another size than the maps.

PLAIN = Recipe(method="layer-cam", threshold="mean", refine="grabcut", sure_background=0.2, iterations=2)


def test_finer_pictures_than_the_maps_are_cut_at_their_own_size():
    images, truth = scene(size=96)
    maps = rough(truth)[:, ::2, ::2]  # what a network of 48 pixels gives
    recipe = replace(PLAIN, blur=0.05, sure_foreground=0.9, keep=0.5, fill=True)
    result = segment_with(recipe, maps, images)
    assert result.masks.shape == truth.shape
    assert min(overlap(result.masks.bool(), truth)) > 0.95


def test_the_recipe_step_by_step_where_every_step_shows():
    images = torch.rand(3, 3, 60, 96, generator=torch.Generator().manual_seed(1))
    maps = torch.rand(3, 30, 48, generator=torch.Generator().manual_seed(2))
    recipe = replace(PLAIN, blur=0.1, sure_foreground=0.9, keep=0.5, fill=True)
    fine = blur(resized(maps, (60, 96)), 0.1 * 60)
    codes = seeds(fine, binarize(fine, "mean"), sure_foreground=0.9, sure_background=0.2)
    masks, fell_back = grabcut(images, codes, iterations=2)
    expected = clean(masks, fine, share=0.5, fill=True)
    result = segment_with(recipe, maps, images)
    assert torch.equal(result.masks.bool(), expected)
    assert torch.equal(result.fell_back, fell_back)
    for one in ({"blur": 0.05}, {"sure_foreground": 0.5}, {"sure_background": 0.4}, {"iterations": 1}, {"keep": 0.0}):
        assert not torch.equal(segment_with(replace(recipe, **one), maps, images).masks, result.masks), one


def test_without_grabcut_the_maps_are_enlarged_before_the_threshold():
    images, truth = scene(size=96)
    maps = rough(truth)[:, ::2, ::2]
    recipe = replace(PLAIN, refine="none")
    enlarged = torch.nn.functional.interpolate(maps[:, None], (96, 96), mode="bilinear")[:, 0]
    assert torch.equal(segment_with(recipe, maps, images).masks.bool(), binarize(enlarged, "mean"))


def test_a_batch_of_finer_pictures_equals_one_by_one():
    images, truth = scene(size=96)
    maps = rough(truth)[:, ::2, ::2]
    alone = [segment_with(PLAIN, maps[i : i + 1], images[i : i + 1]).masks for i in range(3)]
    assert torch.equal(torch.cat(alone), segment_with(PLAIN, maps, images).masks)


def test_maps_change_their_size_as_pictures_do():
    maps = torch.rand(2, 12, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized(maps, (12, 8)), maps)
    torch.testing.assert_close(resized(maps, (24, 16)).mean(), maps.mean(), rtol=0.05, atol=0)
    step = torch.zeros(1, 12, 8)
    step[:, 5] = 1.0  # a line that every third row misses
    torch.testing.assert_close(resized(step, (4, 4)).mean(), step.mean(), rtol=0.1, atol=0)


def test_the_side_to_refine_at():
    assert [replace(PLAIN, finest=256).side(size) for size in (32, 128, 200, 300)] == [64, 256, 256, 300]
    assert PLAIN.side(128) == 128


# The vote.


def test_the_vote_counts_shares_and_agreement():
    masks = torch.zeros(3, 2, 1, 4, dtype=torch.uint8)
    masks[0, 0, 0] = torch.tensor([1, 1, 0, 0])
    masks[1, 0, 0] = torch.tensor([1, 0, 0, 0])
    masks[2, 0, 0] = torch.tensor([1, 1, 1, 0])
    share, agreement = vote(list(masks))
    assert share.dtype == torch.float32
    torch.testing.assert_close(share[0, 0], torch.tensor([1, 2 / 3, 1 / 3, 0]))
    # IoU of the pairs: 1/2, 2/3 and 1/3; of the second picture, all empty, 1
    torch.testing.assert_close(agreement, torch.tensor([0.5, 1.0]))
    assert not share[1].any()


def test_an_empty_mask_disagrees_with_another():
    full, empty = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)
    assert vote([full, empty])[1].tolist() == [0]
    assert vote([full, full])[1].tolist() == [1]


def test_a_vote_needs_two_of_the_same_size():
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    for masks in ([mask], [mask, torch.ones(1, 2, 3, dtype=torch.bool)]):
        with pytest.raises(ClearwingError, match=r"masks: .* give two or more of the same size"):
            vote(masks)


def test_the_voters_differ_and_fit_the_refinement():
    assert len(set(VOTERS)) == len(VOTERS) >= 2
    assert {(voter.average, voter.finest, voter.target, voter.refine) for voter in VOTERS} == {
        (VOTERS[0].average, RECIPES["refine"].finest, "pred", "grabcut")
    }  # their maps are asked for together
    assert all(voter.layers == len(voter.weights) for voter in VOTERS)


def test_a_recipe_is_a_value():
    assert Recipe(method="saliency", threshold="percentile:80", pool=5) == RECIPES["classic"]
