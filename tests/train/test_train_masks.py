"""Pictures with masks: what goes with them through crops and flips, and the loss against a slow reference."""

import math

import pytest
import torch

from clearwing.data.loader import Pictures
from clearwing.data.sources import Sample
from clearwing.models.decoder import Decoder, Segmenter
from clearwing.models.zoo import build
from clearwing.train.masks import Lesson, MaskAugment, lessons, mask_loss, with_masks
from clearwing.types import Batch, ClearwingError, Geometry

N, H, W = 6, 20, 24


def pictures(images):
    """Pictures of uint8 images (N, C, H, W)."""
    n, _, height, width = images.shape
    places = tuple(Geometry(height, width, 0, 0, height, width, (height, width)) for _ in range(n))
    samples = tuple(Sample(f"{i}.png", b"") for i in range(n))
    return Pictures(images.contiguous(memory_format=torch.channels_last), torch.arange(n), samples, places)


def painted(seed=0):
    """Pictures that have their shares painted in red and their weights in green, and both, from with_masks."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (N, 3, H, W), generator=generator, dtype=torch.uint8)
    shares, weights = codes[:, 0] / 255, codes[:, 1] / 255
    return with_masks(pictures(codes), shares, weights)


def test_two_channels_are_added_and_the_rest_is_kept():
    given = pictures(torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8))
    shares = torch.rand(N, H, W, generator=torch.Generator().manual_seed(0))
    made = with_masks(given, shares, torch.linspace(0, 1, N))
    assert (made.images.shape, made.images.dtype) == ((N, 5, H, W), torch.uint8)
    assert torch.equal(made.images[:, :3], given.images)
    assert (made.images[:, 3] / 255 - shares).abs().max() <= 0.5 / 255 + 1e-6
    for i in range(N):  # one weight a picture is that of all its pixels
        assert made.images[i, 4].unique().tolist() == [round(i / (N - 1) * 255)]
    assert torch.equal(made.labels, given.labels)
    assert (made.samples, made.geometry) == (given.samples, given.geometry)
    assert given.images.shape[1] == 3


@pytest.mark.parametrize(
    ("shares", "weights", "message"),
    [
        (torch.zeros(N, H, W + 1), torch.ones(N), r"shares: \(6, 20, 25\), 0 to 0; give .* 6 pictures of 20 x 24"),
        (torch.full((N, H, W), 1.5), torch.ones(N), "shares: .*1.5 to 1.5"),
        (torch.full((N, H, W), torch.nan), torch.ones(N), "shares"),
        (torch.zeros(N, H, W), -torch.ones(N, H, W), r"weights: .*-1 to -1; give values in \[0, 1\]"),
        (torch.zeros(N, H, W), torch.ones(2, H, W), r"weights: \(2, 20, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused(shares, weights, message):
    with pytest.raises(ClearwingError, match=message):
        with_masks(pictures(torch.zeros(N, 3, H, W, dtype=torch.uint8)), shares, weights)


@pytest.mark.parametrize("size", [16, 40])
def test_shares_and_weights_go_with_their_picture_through_crops_and_flips(size):
    made = painted()
    plain = torch.cat([batch.images for batch in made.batches(4)])
    augment = MaskAugment(size, scale=(0.3, 1.0), jitter=0.0)
    seen = []
    for batch in made.batches(4, augment=augment, seed=3):
        assert batch.images.shape[1:] == (5, size, size)
        torch.testing.assert_close(batch.images[:, 3:], batch.images[:, :2], rtol=0, atol=2e-6)
        seen.append(batch.images)
    assert torch.cat(seen).std() > 0.05  # something was there to compare
    again = torch.cat([batch.images for batch in made.batches(4, augment=augment, seed=4)])
    assert not torch.equal(torch.cat(seen), again)
    assert torch.equal(plain[:, 3:], plain[:, :2])


def test_pictures_are_mirrored_and_cropped_at_all():
    column = torch.arange(W, dtype=torch.uint8).expand(64, 3, H, W)
    made = with_masks(pictures(column), torch.arange(W).expand(64, H, W) / 255, torch.ones(64))
    images = next(made.batches(64, augment=MaskAugment(16, jitter=0.0), seed=0)).images
    slope = images[:, 3, 8, 12] - images[:, 3, 8, 4]
    assert 10 < (slope < 0).sum() < 54
    steps = slope.abs()
    assert steps.max() / steps.min() > 1.15  # crops of several widths


def test_colours_change_the_picture_alone():
    made = painted()
    plain = next(made.batches(N, augment=MaskAugment(16, jitter=0.0), seed=1)).images
    coloured = next(made.batches(N, augment=MaskAugment(16, jitter=0.5), seed=1)).images
    assert torch.equal(coloured[:, 3:], plain[:, 3:])
    assert (coloured[:, :3] - plain[:, :3]).abs().mean() > 0.02
    grey = with_masks(pictures(made.images[:, :1]), made.images[:, 3] / 255, torch.ones(N))
    assert next(grey.batches(N, augment=MaskAugment(16), seed=1)).images.shape == (N, 3, 16, 16)


# Lessons.


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    model = build("resnet8", 3, widths=(4, 4, 4), input_size=16)
    return Segmenter(model, Decoder((4, 4), 2), ["layer1", "layer3"])


def batches(count=3, n=8):
    """Batches whose pictures hold their number in the channel of shares."""
    for k in range(count):
        images = torch.rand(n, 5, 16, 16, generator=torch.Generator().manual_seed(k))
        images[:, 3] = (torch.arange(n) + k * n)[:, None, None].float()
        yield Batch(images)


def numbers(lesson):
    return lesson.images[:, 3, 0, 0].int().tolist()


def test_every_picture_is_in_as_many_lessons_as_asked_for(segmenter):
    made = [numbers(lesson) for lesson in lessons(segmenter, batches(), 4, times=3)]
    assert [len(one) for one in made] == [4] * 18
    seen = torch.tensor(made).flatten().bincount()
    assert seen.tolist() == [3] * 24
    for k in range(3):  # of one batch after the other, each time in another company
        part = made[6 * k : 6 * k + 6]
        assert {n for one in part for n in one} == set(range(8 * k, 8 * k + 8))
        assert len({frozenset(one) for one in part}) > 2
    assert made == [numbers(lesson) for lesson in lessons(segmenter, batches(), 4, times=3)]
    assert made != [numbers(lesson) for lesson in lessons(segmenter, batches(), 4, times=3, seed=1)]


def test_a_lesson_holds_the_features_of_its_own_pictures(segmenter):
    for lesson in lessons(segmenter, batches(1), 3, times=2):
        with torch.no_grad():
            expected = segmenter.features(lesson.images[:, :3])[1]
        assert len(lesson) == 3
        for found, own in zip(lesson.features, expected, strict=True):
            assert not found.requires_grad
            torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


def test_what_is_left_over_is_left_out(segmenter):
    made = [numbers(lesson) for lesson in lessons(segmenter, batches(2, n=5), 4)]
    assert [len(one) for one in made] == [4, 4]
    assert not list(lessons(segmenter, batches(2, n=3), 4))


# The loss.


class Fixed(torch.nn.Module):
    """A decoder that gives the logits it was made with, and keeps what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, features, size):
        self.seen, self.size = features, size
        return self.logits


def drawn(seed=0, n=4, side=5):
    """Logits (n, side, side), and a batch of three colours, shares and weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, side, side, generator=generator)
    images = torch.rand(n, 5, side, side, generator=generator)
    images[0, 3] = (images[0, 3] > 0.5).float()
    return logits, images


def reference(logits, images):
    """Pixel by pixel, in float64: the cross-entropy over all weights, and the soft Jaccard loss by picture."""
    entropy = weights = jaccard = trusts = 0.0
    for z, picture in zip(logits.double(), images.double(), strict=True):
        both = either = trust = 0.0
        for y in range(z.shape[0]):
            for x in range(z.shape[1]):
                s, w = float(picture[-2, y, x]), float(picture[-1, y, x])
                p = 1 / (1 + math.exp(-float(z[y, x])))
                entropy -= w * (s * math.log(p) + (1 - s) * math.log(1 - p))
                weights += w
                both += w * p * s
                either += w * (p + s - p * s)
                trust += w / z.numel()
        jaccard += trust * (1 - (both + 1) / (either + 1))
        trusts += trust
    return entropy / max(weights, 1) + jaccard / max(trusts, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_slow_one(seed):
    logits, images = drawn(seed)
    module, features = Fixed(logits), (torch.rand(4, 2, 3, 3),)
    value, _ = mask_loss()(module, Lesson(images, features=features))
    assert module.seen is features
    assert module.size == (5, 5)
    assert value.item() == pytest.approx(reference(logits, images), rel=1e-5)


def test_what_is_right_is_a_sum_of_ious():
    logits = torch.full((3, 2, 2), -5.0)
    logits[0, 0] = 5.0  # the upper row
    images = torch.zeros(3, 5, 2, 2)
    images[:, 4] = 1.0
    images[0, 3, :, 0] = 0.8  # the left column: an IoU of a third
    images[1, 3, 0, 0] = 0.9  # nothing of it found: 0
    images[2, 3] = 0.2  # less than half is nothing, and nothing was found: 1
    assert mask_loss()(Fixed(logits), Lesson(images))[1].item() == pytest.approx(4 / 3)


def test_better_masks_cost_less():
    _, images = drawn()
    images[:, 3] = (images[:, 3] > 0.5).float()
    wanted = images[:, 3] * 2 - 1
    loss = mask_loss()
    costs = [loss(Fixed(scale * wanted), Lesson(images))[0].item() for scale in (-4, 0, 4, 12)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.01


def test_pixels_without_weight_do_not_count():
    logits, images = drawn()
    images[:, 4, :, 2:] = 0
    module, loss = Fixed(logits), mask_loss()
    value, _ = loss(module, Lesson(images))
    value.backward()
    assert not module.logits.grad[:, :, 2:].any()
    assert module.logits.grad[:, :, :2].abs().min() > 0
    images[:, 3, :, 2:] = 1 - images[:, 3, :, 2:]
    other = logits.clone()
    other[:, :, 2:] = 7.0
    assert loss(Fixed(other), Lesson(images))[0].item() == pytest.approx(value.item(), rel=1e-6)


def test_pictures_without_weight_do_not_count():
    logits, images = drawn()
    images[:3, 4] = 1.0
    images[3, 4] = 0.0
    loss = mask_loss()
    value, _ = loss(Fixed(logits), Lesson(images))
    assert value.item() == pytest.approx(loss(Fixed(logits[:3]), Lesson(images[:3]))[0].item(), rel=1e-6)
    images[:, 4] = 0
    module = Fixed(logits)
    value, _ = loss(module, Lesson(images))
    value.backward()
    assert value.item() == 0
    assert not module.logits.grad.any()


def test_half_precision_logits_give_the_loss_of_their_values():
    logits, images = drawn()
    short = logits.bfloat16()
    value, _ = mask_loss()(Fixed(short), Lesson(images))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(short.float(), images), rel=1e-5)
