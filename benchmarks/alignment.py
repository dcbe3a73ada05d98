"""Whether pictures show what their captions say: a ridge regression from picture features to text embeddings.

    alignment = Alignment.fit(features, embeddings, groups)       # of training pictures and their names
    alignment.measure(features, truth, candidates)                # held-out names: R@1, R@10, median rank, cosine

Called "text-picture alignment (MiniLM ridge)": EfficientNet-Lite0 features of a picture predict the sentence
embedding of its name, and the names of all held-out pictures are ranked by their cosine with the prediction. It ranks
variants of one model on one set; it is not CLIPScore.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.features import EffLiteMid

RIDGES = (10.0, 100.0, 1000.0, 10_000.0)
HELD_OUT = 0.2  # of the training names, to choose the ridge by


class EffLiteBoth(EffLiteMid):
    """The 112 features of block 10 and the 1,280 of the last layer, from one pass."""

    dim = 112 + 1280

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 1 or 3, H, W] in [-1, 1] -> features [B, 1392], block 10's first."""
        x = self.middle(x)
        first = x.mean((2, 3))
        for block in self.net._blocks[11:]:
            x = block(x)
        x = self.net._swish(self.net._bn1(self.net._conv_head(x)))
        return torch.cat([first, x.mean((2, 3))], 1)


@dataclass(frozen=True)
class Alignment:
    """The regression: features are centred and scaled by ``mean`` and ``scale`` [D]; ``weights`` [D, E]; ``offset``."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    offset: np.ndarray
    ridge: float

    @classmethod
    def fit(cls, features: np.ndarray, embeddings: np.ndarray, groups: np.ndarray, seed: int = 0) -> Alignment:
        """From features [N, D], embeddings [N, E] and the name each picture shows (groups, int [N]).

        The ridge is the one whose predictions for a fifth of the names, left out, have the highest mean cosine.
        """
        names = np.unique(groups)
        left_out = np.random.default_rng(seed).permutation(names)[: max(1, int(HELD_OUT * len(names)))]
        held = np.isin(groups, left_out)
        if held.all():
            raise ValueError(f"{len(names)} names are too few to choose a ridge by: give pictures of 2 or more")
        scores = {}
        for ridge in RIDGES:
            trial = cls._solve(features[~held], embeddings[~held], ridge)
            scores[ridge] = float((trial.predict(features[held]) * _unit(embeddings[held])).sum(1).mean())
        return cls._solve(features, embeddings, max(scores, key=scores.get))

    @classmethod
    def _solve(cls, features, embeddings, ridge: float) -> Alignment:
        x, y = np.asarray(features, np.float64), _unit(np.asarray(embeddings, np.float64))
        mean, scale, offset = x.mean(0), x.std(0) + 1e-9, y.mean(0)
        x = (x - mean) / scale
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] += ridge
        return cls(mean, scale, np.linalg.solve(gram, x.T @ (y - offset)), offset, ridge)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Unit embeddings [N, E] that the pictures' features [N, D] speak for."""
        return _unit((np.asarray(features, np.float64) - self.mean) / self.scale @ self.weights + self.offset)

    def measure(self, features: np.ndarray, truth: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
        """How well pictures [N] find their own name (``truth``, rows of ``candidates`` [K, E]).

        Returns ``r1``, ``r10`` (share whose name is the first, among the first ten), ``median_rank`` (1 = first) and
        ``cosine``, the mean over pictures; by chance the first two are 1/K and 10/K.
        """
        similarity = self.predict(features) @ _unit(np.asarray(candidates, np.float64)).T
        own = similarity[np.arange(len(truth)), truth]
        rank = 1 + (similarity > own[:, None]).sum(1)
        return {
            "r1": float((rank <= 1).mean()),
            "r10": float((rank <= 10).mean()),
            "median_rank": float(np.median(rank)),
            "cosine": float(own.mean()),
        }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
