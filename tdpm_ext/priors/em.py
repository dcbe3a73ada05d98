"""Expectation maximisation for full-covariance Gaussian mixtures, with restarts. float64, a few dozen dimensions."""

from __future__ import annotations

import math

import torch

EM_AXES = 24  # assignments are decided in the leading coordinates; covariances are measured in all
ITERATIONS = 40
RESTARTS = 3


def log_density(points, log_weights, means, covariances, noise: float, joint: bool = False) -> torch.Tensor:
    """log p of points [N, q] under the mixture blurred by ``noise`` variance; [N], or [N, K] per component."""
    values, vectors = torch.linalg.eigh(covariances)
    values = values.clamp_min(0) + noise
    columns = []
    for k in range(len(log_weights)):
        quad = (((points - means[k]) @ vectors[k]).square() / values[k]).sum(1)
        columns.append(log_weights[k] - 0.5 * (quad + values[k].log().sum()))
    logits = torch.stack(columns, 1) - 0.5 * points.shape[1] * math.log(2 * math.pi)
    return logits if joint else logits.logsumexp(1)


def responsibilities(points: torch.Tensor, k: int, noise: float, seed: int, width: int | None = None) -> torch.Tensor:
    """Soft assignment [N, width] of points [N, q] to k components: the best of several k-means++ starts."""
    out = torch.zeros(len(points), width or k, dtype=torch.float64)
    if k == 1:
        out[:, 0] = 1.0
        return out
    low = points[:, :EM_AXES]
    best, score = None, -math.inf
    for restart in range(RESTARTS):
        share, value = _em(low, k, noise, torch.Generator().manual_seed(1000 * seed + restart))
        if value > score:
            best, score = share, value
    out[:, :k] = best
    return out


def _em(points, k: int, noise: float, generator) -> tuple[torch.Tensor, float]:
    centres = _plus_plus(points, k, generator)
    share = torch.nn.functional.one_hot(torch.cdist(points, centres).argmin(1), k).double()
    before = -math.inf
    pooled = torch.cov(points.T, correction=0).reshape(points.shape[1], -1) if len(points) > 1 else None
    pull = 0.5 * points.shape[1]
    for _ in range(ITERATIONS):
        counts = share.sum(0) + 1e-9
        means = (share.T @ points) / counts[:, None]
        covariances = torch.stack([((points - m) * s[:, None]).T @ (points - m) for m, s in zip(means, share.T)])  # noqa: B905
        covariances = (covariances + 0.1 * pull * pooled) / (counts + 0.1 * pull)[:, None, None]
        logits = log_density(points, (counts / counts.sum()).log(), means, covariances, noise, joint=True)
        value = float(logits.logsumexp(1).mean())
        share = logits.softmax(1)
        if value - before < 1e-4:
            break
        before = value
    return share, value


def _plus_plus(points, k: int, generator) -> torch.Tensor:
    """k-means++ seeding: each next centre drawn in proportion to the squared distance from the nearest one."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(k - 1):
        distance = torch.cdist(points, points[chosen]).amin(1).square() + 1e-12
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return points[chosen]
