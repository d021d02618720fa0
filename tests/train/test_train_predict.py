"""Logits do not depend on how many pictures are looked at together."""

import pytest
import torch

import clearwing as cw
from clearwing.data.loader import load_pictures
from clearwing.data.sources import Sample
from clearwing.train.devices import make_fabric
from clearwing.train.predict import predict_logits, quick_batch


def test_the_batch_changes_nothing():
    torch.manual_seed(0)
    model = cw.build("resnet8", 3, widths=(4, 4, 4))
    drawn = torch.randint(256, (21, 16, 16, 3), dtype=torch.uint8).numpy()
    pictures = load_pictures([Sample(str(i), picture, i % 3) for i, picture in enumerate(drawn)], 16)
    fabric = make_fabric("cpu", "float32")
    logits, labels = predict_logits(model, pictures, fabric)
    assert labels.tolist() == [i % 3 for i in range(21)]
    assert not model.training
    for batch in (1, 4, 64):
        torch.testing.assert_close(predict_logits(model, pictures, fabric, batch)[0], logits)
    order = torch.tensor([5, 0, 20])
    torch.testing.assert_close(predict_logits(model, pictures, fabric, order=order)[0], logits[order])
    mirrored = pictures.images.flip(3)
    with torch.no_grad():
        both = (logits + model(mirrored / 255)) / 2
    torch.testing.assert_close(predict_logits(model, pictures, fabric, flip=True)[0], both)


@pytest.mark.parametrize(
    ("side", "device", "expected"),
    [(32, "cpu", 128), (128, "cpu", 16), (512, "cpu", 16), (32, "cuda", 1024), (224, "cuda", 167), (2048, "cuda", 32)],
)
def test_fewer_large_pictures_are_looked_at_together(side, device, expected):
    assert quick_batch(side * side, device) == expected
