"""The ideal denoiser of a finite data set: exact, no network, a test instrument.

For data x_1..x_N and x = x_0 + sigma * eps, the posterior mean is the softmax-weighted mean
D(x, sigma) = sum_i softmax_i(-|x - x_i|^2 / (2 sigma^2)) x_i (Karras et al., arXiv 2206.00364, appendix B.3).
Run with it, a sampler shows the error of its prior and its steps alone: the network's own error is absent.
"""

from __future__ import annotations

import torch
from torch import nn

NEGLIGIBLE = 1e-20  # share of a data point, relative to the nearest one's, that float32 cannot feel


class IdealDenoiser(nn.Module):
    """``model(x, sigma, class_cond=None) -> denoised`` over a stored data set.

    Args:
        images: [N, ...] float, in the units the sampler works in.
        labels: int64 [N] or None. With labels, ``class_cond`` [B] restricts each row to its class; a value
            that no picture has, such as ``num_classes``, means unconditional.
        chunk: how many data points one block of the softmax holds (bounds memory to B * chunk floats).
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | None = None, chunk: int = 16384):
        super().__init__()
        if images.ndim < 2 or len(images) == 0:
            raise ValueError(f"images have shape {tuple(images.shape)}: give [N, ...] with N >= 1")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
        flat = images.reshape(len(images), -1).float()
        self.shape = tuple(images.shape[1:])
        self.chunk = chunk
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        # Centring keeps |x|^2 small, so that the expansion of |x - x_i|^2 stays exact in float32.
        mean = flat.double().mean(0).float()
        self.register_buffer("mean", mean)
        self.register_buffer("data", flat - mean)
        self.register_buffer("half_norms", 0.5 * (flat - mean).double().square().sum(1).float())
        self.register_buffer("labels", labels)
        self.register_buffer("classes", None if labels is None else labels.unique())

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_cond: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, ...], sigma scalar or [B] -> denoised, of x's shape and dtype."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x has pictures of shape {tuple(x.shape[1:])}; this data set holds {self.shape}")
        if class_cond is not None and self.labels is None:
            raise ValueError("class_cond was given, but the data set has no labels")
        y = x.reshape(len(x), -1).float() - self.mean
        scale = torch.as_tensor(sigma, device=x.device).float().reshape(-1, 1).square().reciprocal()
        bound = None if class_cond is None else torch.isin(class_cond, self.classes)[:, None]
        top = y.new_full([len(y), 1], -torch.inf)
        total, weight = torch.zeros_like(y), y.new_zeros([len(y), 1])
        for k in range(0, len(self.data), self.chunk):
            block = self.data[k : k + self.chunk]
            logits = torch.addmm(-self.half_norms[k : k + self.chunk], y, block.T).mul_(scale)
            if class_cond is not None:
                other = self.labels[k : k + self.chunk][None] != class_cond[:, None]
                logits.masked_fill_(other & bound, -torch.inf)
            best = torch.maximum(top, logits.amax(1, keepdim=True))
            if class_cond is not None:  # a block without any picture of the class leaves -inf: subtract 0 there
                best = best.nan_to_num(neginf=torch.finfo(y.dtype).min)
            old = (top - best).exp_()
            share = logits.sub_(best).exp_()
            total.mul_(old)
            if share.is_cuda:  # to choose points would make the host wait, and no graph could hold it
                total.addmm_(share, block)
            else:
                near = share.amax(0) > NEGLIGIBLE  # at small sigma a handful: two thirds of the time are saved
                total.addmm_(share[:, near], block[near])
            weight.mul_(old).add_(share.sum(1, keepdim=True))
            top = best
        return (total.div_(weight).add_(self.mean)).reshape(x.shape).to(x.dtype)
