"""What runs on a GPU gives what runs on the CPU; skipped where there is none."""

import pytest
import torch

import clearwing as cw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_maps_on_the_gpu_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = cw.build("resnet8", 3).eval()
    images = torch.rand(4, 3, 32, 32)
    methods = [name for name, row in cw.METHODS.items() if not row.attention]
    few = {"samples": 4, "steps": 4, "masks": 16, "budget": 8}
    ours = cw.explain(model, images, methods, layers=["layer3"], options=few)
    theirs = cw.explain(model.cuda(), images, methods, layers=["layer3"], options=few)
    for key, e in ours.items():
        torch.testing.assert_close(theirs[key].maps.cpu(), e.maps, rtol=1e-3, atol=1e-5)


def test_a_run_trains_on_the_gpu(photos, tmp_path):
    from clearwing.config import TrainConfig
    from clearwing.jobs.train import train

    config = TrainConfig(data=str(photos), out=str(tmp_path / "run"), model="resnet8", size=16, epochs=2, device="cuda")
    assert train(config)["json"]["epochs"] == 2
    assert cw.Run.load(tmp_path / "run").model(torch.rand(1, 3, 16, 16)).shape == (1, 3)
