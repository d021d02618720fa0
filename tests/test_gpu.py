"""What runs on a GPU gives what runs on the CPU; skipped where there is none."""

import pytest
import torch

import clearwing as cw

DEVICE = "cuda"
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

    config = TrainConfig(data=str(photos), out=str(tmp_path / "run"), model="resnet8", size=16, epochs=2, device=DEVICE)
    assert train(config)["json"]["epochs"] == 2
    assert cw.Run.load(tmp_path / "run").model(torch.rand(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize("step", [{"sam": 0.05}, {"accumulate": 2}])
def test_all_settings_together_train_and_resume_on_the_gpu(photos, tmp_path, monkeypatch, step):
    from clearwing.config import TrainConfig
    from clearwing.jobs.session import Session
    from clearwing.jobs.train import train

    def config(**more):
        return TrainConfig(
            data=str(photos),
            out=str(tmp_path / "run"),
            model="resnet8",
            size=16,
            train_size=12,
            epochs=4,
            batch_size=7,  # the last batch is another one
            device=DEVICE,
            compile=True,
            ema=0.9,
            clip=1.0,
            whiten=True,
            residual="dirac",
            auto_augment="trivial",
            mixup=0.2,
            cutmix=1.0,
            rotate=10.0,
            cutout=4,
            cutout_off=0.25,
            explain=2,
            save_every="0.0001s",
            json=True,
            **step,
            **more,
        )

    save = Session.save

    def killed(self, state):
        save(self, state)
        if state.epoch == 2 and state.batch:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", killed)
        with pytest.raises(SystemExit):
            train(config())
    result = train(config(resume=True))["json"]
    assert result["epochs"] == 4
    rows = cw.Run.load(tmp_path / "run").metrics
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["train_loss"] < 10 for row in rows)


def test_the_batch_that_fits_is_found_on_the_gpu(photos, tmp_path):
    from clearwing.config import TrainConfig
    from clearwing.jobs.train import train

    more = {"model": "resnet8", "size": 16, "epochs": 1, "device": DEVICE, "batch_size": "auto"}
    config = TrainConfig(data=str(photos), out=str(tmp_path / "run"), **more)
    assert train(config)["json"]["epochs"] == 1
