"""`clearwing doctor` on a run, on drawn pictures, and on a network that is sick."""

import json

from commands import failure, run


def test_doctor_on_a_run_and_its_pictures(capsys, photos, trained):
    code, out, err = run(capsys, "doctor", trained, photos / "val")
    assert code == 0, out
    lines = out.splitlines()
    assert lines[0].startswith("tiny: ResNet6n2, 3 classes; 4 pictures of 3 x 32 x 32, float32 on")
    assert lines[1].startswith("Healthy: ")
    assert any("layer3" in line and line.endswith("<- default") for line in lines)
    assert sum(line.startswith("  passed ") for line in lines) >= 12
    assert "Traceback" not in err


def test_doctor_gives_plain_values_and_skips_what_it_cannot_read(capsys, photos, trained, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    picture = next(photos.glob("val/*/*.png"))
    code, out, _ = run(capsys, "doctor", trained, picture, tmp_path / "broken.png", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["model"], result["drawn"], result["skipped"]) == ("tiny", False, 1)
    assert result["pictures"] == [1, 3, 32, 32]
    assert result["guided"] == {"replaced": 7, "kept": {}, "refused": ""}
    assert result["layers"][-1]["name"] == result["layer"] == "layer3"
    assert all(row["verdict"] != "failed" for row in result["checks"])


def test_doctor_fails_on_a_sick_network_and_says_what_to_do(capsys, tmp_path):
    file = tmp_path / "sick.py"
    file.write_text(
        "from torch import nn\n"
        "def grey():\n"
        "    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())\n"
        "    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
    )
    code, out, _ = run(capsys, "doctor", f"{file}:grey", "--size", "16", "--limit", "2")
    assert code == 1
    assert "2 pictures of 1 x 16 x 16" in out.splitlines()[0]
    assert out.splitlines()[1].startswith("Sick: ")
    assert "failed: 0.1 has no running statistics" in out
    assert "  failed a batch = one picture at a time" in out
    code, out, _ = run(capsys, "doctor", f"{file}:grey", "--size", "16", "--json")
    assert code == 1
    assert json.loads(out)["verdict"] == "failed"
    assert json.loads(out)["drawn"] is True


def test_doctor_refuses_wrong_calls(capsys, trained, tmp_path):
    assert "needs MODEL" in failure(capsys, "doctor")
    assert "no such file or folder" in failure(capsys, "doctor", trained, tmp_path / "none.png")
    assert "--limit: 0; give at least 1" in failure(capsys, "doctor", trained, "--limit", "0")
