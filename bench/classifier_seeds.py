"""How well the classifier learns, over seeds: a table as in docs/classifier.md.

    python bench/classifier_seeds.py --seeds 1 2 3 [--train-specimens N] [--epochs N] …

Needs TensorFlow (or JAX) here; no Spark, no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rolls/classifier/files"))

import numpy as np
from herbarium import images, metrics, model
from herbarium.sources import Drawn, split_drawn
from herbarium.train import Recipe, train


def measure(seed: int, asked: argparse.Namespace) -> dict[str, float]:
    """Train and apply once; the measures on held-out specimens."""
    source = Drawn(seed, asked.sheet_height)
    split = split_drawn(train=asked.train_specimens, apply=asked.apply_specimens)
    recipe = Recipe(seed=seed, height=asked.height, epochs=asked.epochs)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "model")
        record = train(source, split.train, recipe, held=model.Held(()), folder=where)
        network, _ = model.load(model.load_framework(model.Held(())), where)
    sheets = list(source.sheets(split.apply))
    pixels, _ = images.decode_all(sheets, height=recipe.height)
    labels = np.array([sheet.label for sheet in sheets])
    scores = model.predict(network, pixels)
    counts = metrics.confusion(labels, (scores >= model.THRESHOLD).astype(np.int64))
    colour = metrics.ColourBaseline(**record["colour_baseline"])
    guessed = colour.predict(images.mean_colours(pixels))
    return {
        "seed": seed,
        "trained_on": record["sheets"],
        "applied_to": len(sheets),
        "accuracy": metrics.accuracy(counts),
        "kappa": metrics.quadratic_kappa(counts),
        "majority": metrics.majority(counts),
        "colour": metrics.accuracy(metrics.confusion(labels, guessed)),
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--train-specimens", type=int, default=240)
    parser.add_argument("--apply-specimens", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--height", type=int, default=32)
    parser.add_argument("--sheet-height", type=int, default=128)
    asked = parser.parse_args()
    print(
        "| seed | trained on | applied to | accuracy | kappa | majority | mean colour | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed in asked.seeds:
        found = measure(seed, asked)
        print(
            f"| {seed} | {found['trained_on']} | {found['applied_to']} | {found['accuracy']:.3f}"
            f" | {found['kappa']:.3f} | {found['majority']:.3f} | {found['colour']:.3f}"
            f" | {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
