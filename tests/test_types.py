"""The values: errors that say what, its value and the mend; explanations that save and join."""

import pickle
from dataclasses import replace

import pytest
import torch

from clearwing import Batch, ClearwingError, Explanation, Geometry, Status
from clearwing.types import atomic_path, near


def explanation(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    place = Geometry(40, 56, 0, 8, 40, 40, (8, 8), flip=True)
    return Explanation(
        maps=torch.randn(n, 1, 8, 8, generator=generator),
        classes=torch.ones(n, 1, dtype=torch.int64),
        logits=torch.randn(n, 3, generator=generator),
        method="saliency",
        layer=None,
        status=torch.zeros(n, 1, dtype=torch.uint8),
        geometry=(place,) * n,
        keys=tuple(f"{seed}/{i}" for i in range(n)),
        channels=torch.randn(n, 1, 3, 8, 8, generator=generator),
        class_names=("a", "b", "c"),
    )


def test_an_error_is_a_value_error_of_one_line():
    error = ClearwingError("size", -1, "give at least\n 1 pixel")
    assert isinstance(error, ValueError)
    assert str(error) == "size: -1; give at least 1 pixel"
    assert (error.argument, error.value, error.exit_code) == ("size", "-1", 2)
    again = pickle.loads(pickle.dumps(ClearwingError("loss", "nan", "stop", exit_code=1)))
    assert (str(again), again.exit_code) == ("loss: nan; stop", 1)


def test_an_explanation_comes_back_from_its_file(tmp_path):
    e = explanation()
    again = Explanation.load(e.save(tmp_path / "deep" / "map.safetensors"))
    assert torch.equal(again.maps, e.maps)
    assert torch.equal(again.channels, e.channels)
    assert again.against is None
    assert (again.method, again.layer, again.keys, again.geometry) == (e.method, e.layer, e.keys, e.geometry)
    assert again.class_names == e.class_names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["map.safetensors"]


def test_what_is_no_explanation_is_refused(tmp_path):
    with pytest.raises(ClearwingError, match=r"Explanation\.save wrote"):
        Explanation.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ClearwingError, match="not a safetensors file"):
        Explanation.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"maps": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ClearwingError, match=r"Explanation\.save wrote"):
        Explanation.load(tmp_path / "other")


def test_explanations_join_and_come_apart():
    one, two = explanation(2, 0), explanation(3, 1)
    both = Explanation.cat([one, two])
    assert len(both) == 5
    assert both.keys == one.keys + two.keys
    assert torch.equal(both.picture(3).maps, two.maps[1:2])
    assert both.picture(3).keys == ("1/1",)
    assert torch.equal(both.predicted, both.logits.argmax(1))
    assert both.probabilities.sum(1).tolist() == pytest.approx([1.0] * 5)
    with pytest.raises(ClearwingError, match="at least one"):
        Explanation.cat([])


def test_an_explanation_says_what_it_is_in_one_line():
    assert repr(explanation(2)) == "Explanation(saliency: 2 x 1 maps of 8 x 8, 2 ok)"
    mixed = replace(explanation(2), layer="layer3", status=torch.tensor([[0], [3]], dtype=torch.uint8))
    assert repr(mixed) == "Explanation(saliency at layer3: 2 x 1 maps of 8 x 8, 1 ok, 1 nonfinite)"


def test_a_batch_moves_with_its_labels():
    batch = Batch(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), ("a", "b"))
    moved = batch.to("cpu")
    assert len(moved) == 2
    assert moved.keys == ("a", "b")


def test_atomic_writes_are_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_near_words():
    assert near("grad-kam", ["grad-cam", "saliency"]) == "did you mean grad-cam?"
    assert near("xyz", ["grad-cam", "saliency"]) == "choose one of grad-cam, saliency"
    assert Status(1).name == "ZERO"
