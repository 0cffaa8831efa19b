"""Training: sheets in, a saved network and what there is to know about it out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herbarium import images, metrics, model
from herbarium.sources import Source


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: everything that the result depends on besides the sheets."""

    seed: int
    height: int = 32
    epochs: int = 8
    batch: int = 16
    rate: float = 0.006


class TooFew(Exception):
    """There are not sheets of both classes to train on."""


def train(
    source: Source,
    specimens: Sequence[int],
    recipe: Recipe,
    *,
    held: model.Held,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train on those specimens, save to the folder, and return the record saved beside it."""
    start = time.monotonic()
    sheets = list(source.sheets(specimens))
    drawn = time.monotonic()
    pixels, problems = images.decode_all(sheets, height=recipe.height)
    good = [at for at, problem in enumerate(problems) if problem is None]
    labels = np.array([sheets[at].label for at in good], np.int64)
    pixels = pixels[good]
    if len(set(labels.tolist())) < 2:
        raise TooFew(f"{len(labels)} sheets to train on, and not of both classes")
    decoded = time.monotonic()
    say(f"{len(labels)} sheets of {len(specimens)} specimens; importing Keras")
    keras = model.load_framework(held)
    imported = time.monotonic()
    device = model.describe_device(keras, held)
    say(f"training on {device}")
    network, losses = fit(keras, pixels, labels, recipe, say=say)
    fitted = time.monotonic()
    scores = model.predict(network, pixels)
    counts = metrics.confusion(labels, (scores >= model.THRESHOLD).astype(np.int64))
    record = {
        "schema": 1,
        "synthetic": source.synthetic,
        "source": _describe(source),
        "specimens": len(specimens),
        "sheets": len(labels),
        "unreadable": len(sheets) - len(good),
        "recipe": asdict(recipe),
        "width": images.width_for(recipe.height),
        "parameters": network.count_params(),
        "threshold": model.THRESHOLD,
        "device": device,
        "versions": model.versions(keras),
        "losses": [round(loss, 4) for loss in losses],
        "training_accuracy": metrics.accuracy(counts),
        "colour_baseline": asdict(
            metrics.fit_colour_baseline(images.mean_colours(pixels), labels.tolist())
        ),
        "seconds": {
            "draw": round(drawn - start, 2),
            "decode": round(decoded - drawn, 2),
            "import": round(imported - decoded, 2),
            "fit": round(fitted - imported, 2),
        },
    }
    model.save(network, record, folder)
    return record


def fit(
    keras: Any,
    pixels: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Any, list[float]]:
    """A network trained from nothing, and its mean loss in each epoch.

    Half of the sheets are mirrored anew in each epoch; the rate falls
    towards 0 along a cosine, epoch by epoch.
    """
    keras.utils.set_random_seed(recipe.seed)
    random = np.random.default_rng(recipe.seed)
    height, width = pixels.shape[1:3]
    network = model.build(keras, height=height, width=width, widths=model.widths_for(height))
    batch = min(recipe.batch, len(labels))
    steps = len(labels) // batch
    network.compile(
        optimizer=keras.optimizers.Adam(recipe.rate),
        loss="binary_crossentropy",
        jit_compile=model.may_compile(keras),
    )
    # Else TensorFlow traces the first step twice, the second time without new variables.
    network.optimizer.build(network.trainable_variables)
    losses = []
    for epoch in range(recipe.epochs):
        network.optimizer.learning_rate = recipe.rate * _cosine(epoch / recipe.epochs)
        order = random.permutation(len(labels))[: steps * batch].reshape(steps, batch)
        mirrored = random.random((steps, batch)) < 0.5
        total = 0.0
        for chosen, turn in zip(order, mirrored, strict=True):
            part = pixels[chosen]
            part[turn] = part[turn, :, ::-1]
            target = labels[chosen, None].astype(np.float32)
            total += float(np.asarray(network.train_on_batch(part.astype(np.float32), target)))
        losses.append(total / steps)
        say(f"epoch {epoch + 1} of {recipe.epochs}: loss {losses[-1]:.3f}")
    return network, losses


def _cosine(share: float) -> float:
    """1 at the beginning, 0 at the end."""
    return 0.5 + 0.5 * math.cos(math.pi * share)


def _describe(source: Source) -> dict[str, Any]:
    kind = type(source).__name__.lower()
    if source.synthetic:
        return {"kind": kind, **asdict(source)}  # type: ignore[call-overload]
    return {"kind": kind, "folder": source.folder, "specimens": len(source.names)}  # type: ignore[attr-defined]
