"""The picture of the README, from a run of `clearwing demo`:  python docs/picture.py runs/demo"""

import sys
from pathlib import Path

from PIL import Image

import clearwing as cw
from clearwing.jobs import inputs
from clearwing.run import read_json
from clearwing.show import draw

METHODS = ["saliency", "guided-backprop", "grad-cam", "layer-cam"]
ROWS = 4

run = cw.Run.load(sys.argv[1])
folder = Path(sys.argv[1], "masks", "refine")
found = read_json(folder / "segmentation.json")
samples = {sample.key: sample for sample in inputs.open_run_data(run, None).splits["test"]}
# Evenly spread over the IoUs, best to worst quarter: neither the best alone nor the worst.
keys = sorted(found["per_image"], key=lambda key: -found["per_image"][key])
keys = [keys[(2 * i + 1) * len(keys) // (2 * ROWS)] for i in range(ROWS)]
pictures = cw.load_pictures([samples[key] for key in keys], run.config["model"]["input_size"], fit="squash")
batch = next(pictures.batches(ROWS))
maps = {name: cw.restore(e.maps[:, 0], e.geometry) for name, e in cw.explain(run.model, batch, METHODS).items()}
tiles, captions = [], []
for i, sample in enumerate(pictures.samples):
    picture = draw.to_rgb(cw.read_picture(sample.source))
    mask = cw.read_mask(folder / found["files"][sample.key])
    tiles += [picture, *(draw.overlay(picture, maps[name][i]) for name in maps), draw.outline(picture, mask)]
    captions += [run.class_names[batch.labels[i]], *METHODS, f"mask, IoU {found['per_image'][sample.key]:.2f}"]
sheet = draw.montage(tiles, captions, columns=2 + len(METHODS), size=200)
Image.fromarray(sheet).save(Path(__file__).parent / "demo.jpg", quality=88)
