"""How good predictions are, and how good they would be with no network at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, *, classes: int = 2) -> np.ndarray:
    """Counts, a row per true class and a column per predicted one: [[tn, fp], [fn, tp]]."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def accuracy(counts: np.ndarray) -> float:
    """The share on the diagonal of a confusion matrix; 0 when it is empty."""
    return float(np.trace(counts) / max(1, counts.sum()))


def majority(counts: np.ndarray) -> float:
    """The accuracy of always naming the commonest true class."""
    return float(counts.sum(axis=1).max() / max(1, counts.sum()))


def quadratic_kappa(counts: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights: 1 is perfect, 0 is what chance gives.

    Over two classes the weights change nothing.  0 also when there is but one class in
    labels and predictions alike, where kappa is undefined (0/0) and nothing is shown.
    """
    classes = len(counts)
    at = np.arange(classes)
    weights = (at[:, None] - at[None, :]) ** 2 / max(1, (classes - 1) ** 2)
    total = max(1, counts.sum())
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
    chance = (weights * expected).sum()
    return float(1 - (weights * counts).sum() / chance) if chance else 0.0


@dataclass(frozen=True, slots=True)
class ColourBaseline:
    """A logistic regression on a sheet's mean red, green and blue: what needs no network."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def predict(self, colours: np.ndarray) -> np.ndarray:
        """0 or 1 for each row of mean colours."""
        features = (colours - np.array(self.centre)) / np.array(self.scale)
        return (features @ np.array(self.weights) + self.bias > 0).astype(np.int64)


def fit_colour_baseline(colours: np.ndarray, labels: Sequence[int]) -> ColourBaseline:
    """Newton's method with a touch of ridge, to convergence for three features."""
    centre, scale = colours.mean(axis=0), colours.std(axis=0) + 1e-6
    features = np.hstack([(colours - centre) / scale, np.ones((len(colours), 1))])
    truth = np.asarray(labels, np.float64)
    weights = np.zeros(features.shape[1])
    ridge = 1e-3 * np.eye(len(weights))
    for _ in range(25):
        chance = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (truth - chance) - ridge @ weights
        curve = (features.T * (chance * (1 - chance))) @ features + ridge
        weights = weights + np.linalg.solve(curve, slope)
    return ColourBaseline(
        tuple(map(float, centre)),
        tuple(map(float, scale)),
        tuple(map(float, weights[:-1])),
        float(weights[-1]),
    )
