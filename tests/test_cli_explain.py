"""`clearwing explain` with settings of the methods, for large sets, and past pictures that cannot be read."""

import json

import torch

from clearwing import Explanation
from clearwing.jobs import inputs
from commands import failure, run


def test_maps_only_streams_raw_maps_a_file_a_batch(capsys, photos, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.load_blocks, "__defaults__", (3,))  # three pictures in memory at a time
    pictures = sorted(photos.glob("*/*/*.png"))[:7]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    given = [*pictures[:4], broken, *pictures[4:]]
    common = ["--methods", "grad-cam,saliency", "--layers", "layer2", "--batch-size", "2", "--json"]
    code, text, _ = run(capsys, "explain", trained, *given, "--maps-only", "--out", tmp_path / "raw", *common)
    assert code == 0
    result = json.loads(text)
    assert result["skipped"] == 1
    assert [row["picture"] for row in result["pictures"]] == [path.name for path in pictures]
    assert not list((tmp_path / "raw").glob("*.png"))
    code, _, _ = run(capsys, "explain", trained, *given, "--out", tmp_path / "full", *common)
    assert code == 0
    for method in ("grad-cam@layer2", "saliency"):
        files = sorted((tmp_path / "raw").glob(f"{method}.*.safetensors"))
        found = [Explanation.load(file) for file in files]
        assert all(len(part) <= 2 for part in found)
        whole = Explanation.cat(found)
        assert whole.keys == tuple(path.name for path in pictures)
        for i, path in enumerate(pictures):
            single = Explanation.load(tmp_path / "full" / f"{path.stem}.{method}.safetensors")
            assert torch.allclose(whole.maps[i], single.maps[0], atol=1e-6)
    assert {row["files"][0] for row in result["pictures"]} <= {path.name for path in (tmp_path / "raw").iterdir()}


def test_nothing_readable_is_refused_and_leaves_no_folder(capsys, trained, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    line = failure(capsys, "explain", trained, broken, "--out", tmp_path / "out")
    assert "none of 1 can be read" in line
    assert not (tmp_path / "out").exists()


def test_settings_of_methods_reach_them(capsys, photos, trained, tmp_path):
    picture = next(photos.glob("val/*/*.png"))

    def maps(name, *options):
        out = tmp_path / name
        assert run(capsys, "explain", trained, picture, "--out", out, *options)[0] == 0
        return Explanation.load(next(out.glob("*.safetensors")))

    layers = ["--layers", "layer2,layer3"]
    plain, fused = maps("plain", "--layers", "layer3"), maps("fused", *layers, "--fuse", "max")
    assert fused.layer == "layer2+layer3"
    assert float(fused.maps.max()) <= 1 < float(fused.peak) + 1
    averaged = maps("averaged", "--layers", "layer3", "--average", "flip,1.5")
    assert not torch.allclose(averaged.maps, plain.maps)
    few, many = (maps(f"steps{n}", "--methods", "integrated-gradients", "--options", f"steps={n}") for n in (1, 64))
    assert not torch.allclose(few.maps, many.maps)

    def refused(*options):
        return failure(capsys, "explain", trained, picture, "--out", tmp_path / "out", *options)

    assert "--options: steps; give name=number" in refused("--options", "steps")
    assert "options: stepz; " in refused("--methods", "integrated-gradients", "--options", "stepz=3")
    assert "average: flop" in refused("--average", "flop")
    assert "fuse" in refused("--fuse", "max", "--layers", "layer3")
