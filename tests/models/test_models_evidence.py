"""Evidence beside a slow reference, and beside the maps that `explain` makes of the same network."""

import pytest
import torch

from clearwing.attribution.cams import cam, layer_cam
from clearwing.attribution.trace import record
from clearwing.models.evidence import FLAT, discriminant, with_evidence
from clearwing.models.zoo import build

DOUBLE = torch.float64


def drawn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x, seeds):
    """The discriminant of one picture (C, H, W) by seeds (h, w), place by place: sizes even, seeds of half the size."""
    _, H, W = x.shape
    few = [
        [sum(x[:, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)) / 4 for j in range(W // 2)]
        for i in range(H // 2)
    ]
    places = [(few[i][j], float(seeds[i, j])) for i in range(H // 2) for j in range(W // 2)]

    def mean(weight):
        total = sum(weight(s) for _, s in places)
        return sum(weight(s) * v for v, s in places) / total

    inside, outside, middle = mean(lambda s: max(s, 0)), mean(lambda s: max(-s, 0)), mean(lambda s: 1.0)
    variance = sum((v - middle) ** 2 for v, _ in places) / len(places)
    d = (inside - outside) / (variance + FLAT**2 * (1 + middle**2))
    along = torch.stack([d @ v for v, _ in places])
    d = d / ((along - along.mean()) ** 2).mean().sqrt()
    offset = d @ (inside + outside) / 2
    return torch.stack([torch.stack([d @ x[:, i, j] - offset for j in range(W)]) for i in range(H)])


def test_the_discriminant_is_fishers_place_by_place():
    features, seeds = drawn(2, 3, 8, 6), drawn(2, 4, 3, seed=1)
    found = discriminant(features, seeds)
    expected = torch.stack([by_hand(x, s) for x, s in zip(features, seeds, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_discriminant_finds_what_the_seeds_only_hint_at():
    """An object of another colour, most of it unseeded: its every place is above 0, every other one below."""
    features = drawn(1, 3, 32, 32) * 0.03
    features[:, 0, 8:24, 8:24] += 1
    seeds = torch.full((1, 8, 8), -0.1, dtype=DOUBLE)
    seeds[0, 3:5, 3:5] = 1  # within the object
    found = discriminant(features, seeds)[0]
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:24, 8:24] = True
    assert ((found > 0) == inside).all()


def test_opposite_seeds_give_the_opposite_and_a_shift_of_the_features_changes_little():
    features, seeds = drawn(2, 5, 9, 7), drawn(2, 4, 3, seed=1)  # sizes that nothing divides
    found = discriminant(features, seeds)
    torch.testing.assert_close(discriminant(features, -seeds), -found, rtol=0, atol=1e-12)
    shifted = features + drawn(1, 5, 1, 1, seed=2)
    torch.testing.assert_close(discriminant(shifted, seeds), found, rtol=0, atol=5e-3)  # flat grows with the mean
    assert found.std() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 3.7, 37.3, 1000.3])
def test_what_is_flat_says_nothing(dtype, value):
    flat, seeds = torch.full((1, 512, 14, 14), value).to(dtype), drawn(1, 7, 7, dtype=torch.float32)
    assert discriminant(flat, seeds).abs().max() < 0.02
    assert not discriminant(drawn(1, 4, 8, 8).to(dtype), torch.zeros(1, 4, 4)).any()
    told = with_evidence([flat, flat[..., :1, :1]], torch.ones(1, 512))
    assert all(not x[:, 512:].any() and x.dtype == dtype for x in told)


def test_bfloat16_comes_near():
    features = [drawn(2, 32, 16, 16).relu(), drawn(2, 64, 8, 8, seed=1).relu()]
    rows = drawn(2, 64, seed=2)
    rounded = [x.bfloat16() for x in features]
    expected = with_evidence([x.double() for x in rounded], rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_evidence(rounded, rows.float())
    for a, b, channels in zip(found, expected, (32, 64), strict=True):
        assert (a[:, channels:].double() - b[:, channels:]).abs().max() < 0.1  # of a deviation of 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet8", 3, widths=(4, 6, 8), input_size=24).double().eval()


def standardised(maps):
    return (maps - maps.mean((1, 2), keepdim=True)) / maps.std((1, 2), correction=0, keepdim=True)


def test_the_coarsest_features_gain_cam_and_layer_cam_of_the_class(model):
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    trace = record(model, images, ["layer1", "layer3"], inputs=False)
    features = [trace.features["layer1"].detach(), trace.features["layer3"].detach()]
    rows = model.backbone.fc.weight.detach()[trace.logits.argmax(1)]
    fine, coarse = with_evidence(features, rows)
    assert (fine.shape, coarse.shape) == ((3, 5, 24, 24), (3, 10, 6, 6))
    assert torch.equal(fine[:, :4], features[0])
    assert torch.equal(coarse[:, :8], features[1])
    scores = trace.logits.amax(1)
    plain, positive = cam(trace, scores, "layer3"), layer_cam(features[1], trace.gradients(scores)["layer3"])
    for channel, maps in ((8, plain), (9, positive)):
        torch.testing.assert_close(coarse[:, channel], standardised(maps.detach()), rtol=0, atol=1e-9)
    torch.testing.assert_close(fine[:, 4], discriminant(features[0], coarse[:, 9]), rtol=0, atol=1e-12)


def test_a_picture_says_the_same_alone():
    features, rows = [drawn(3, 4, 16, 16), drawn(3, 6, 8, 8, seed=1)], drawn(3, 6, seed=2)
    together = with_evidence(features, rows)
    for i in range(3):
        alone = with_evidence([x[i : i + 1] for x in features], rows[i : i + 1])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_[i : i + 1], rtol=0, atol=1e-12)


def test_the_features_stay_in_channels_last():
    features = [drawn(2, 4, 8, 8).to(memory_format=torch.channels_last), drawn(2, 6, 4, 4)]
    for x in with_evidence(features, drawn(2, 6)):
        assert x.is_contiguous(memory_format=torch.channels_last)
