"""Trains on a few drawn specimens and applies to others; prints one JSON object.

    python learn.py SEED SPECIMENS EPOCHS [--shuffled]

--shuffled gives the training sheets each other's labels: then there is nothing to learn.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "rolls/classifier/files"))

import numpy as np
from herbarium import images, metrics, model
from herbarium.sources import Drawn, split_drawn
from herbarium.train import Recipe, fit


def main() -> None:
    seed, specimens, epochs = map(int, sys.argv[1:4])
    source, split = Drawn(seed), split_drawn(train=specimens, apply=300)
    recipe = replace(Recipe(seed), epochs=epochs)
    known, unknown = list(source.sheets(split.train)), list(source.sheets(split.apply))
    labels = np.array([sheet.label for sheet in known])
    if "--shuffled" in sys.argv:
        labels = np.random.default_rng(seed).permutation(labels)
    keras = model.load_framework(model.Held(()))
    pixels, _ = images.decode_all(known, height=recipe.height)
    network, _ = fit(keras, pixels, labels, recipe)
    others, _ = images.decode_all(unknown, height=recipe.height)
    predicted = (model.predict(network, others) >= model.THRESHOLD).astype(np.int64)
    counts = metrics.confusion(np.array([sheet.label for sheet in unknown]), predicted)
    found = {
        "accuracy": metrics.accuracy(counts),
        "majority": metrics.majority(counts),
        "kappa": metrics.quadratic_kappa(counts),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
