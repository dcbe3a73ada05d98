"""Training by the clock: a run that is given minutes, can be interrupted, and goes on where it stopped.

The learning rate follows the share of the budget that is used up (steps or seconds over all sessions, whichever is
further): a short linear rise, then a cosine to zero. Seconds are the process's own CPU time on a CPU, so that a busy
machine makes a run longer and not worse, and the clock's on a GPU. Batches are drawn on the device, and the host
waits for the device only every ``CHECK`` steps, so that a fast device is kept busy.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

CHECK = 25  # steps between two looks at the loss and the clock


@dataclass(frozen=True)
class Budget:
    """``minutes`` and ``steps`` of the whole run, ``rate`` the highest learning rate, ``warmup`` a share of the run."""

    minutes: float
    steps: int
    rate: float
    warmup: float = 0.04

    def used(self, step: int, seconds: float) -> float:
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def rate_at(self, used: float) -> float:
        if used < self.warmup:
            return self.rate * (used / self.warmup * 0.95 + 0.05)
        return self.rate * (0.5 + 0.5 * math.cos(math.pi * (used - self.warmup) / (1 - self.warmup)))


class TimedRun:
    """Weights, their moving average (EMA), optimizer and clock of one network, kept in ``folder/state.safetensors``.

    Step k draws from a generator seeded by ``seed`` and k, so that an interrupted run sees what it would have seen.
    """

    def __init__(
        self, net: nn.Module, folder: Path, device: torch.device, budget: Budget, *, seed=0, ema=0.999, decay=1e-3
    ):
        self.seed = seed
        self.net, self.folder, self.device, self.budget = net.to(device), folder, device, budget
        self.names = [name for name, _ in net.named_parameters()]
        self.params = [p for _, p in net.named_parameters()]
        plain = [p for p in self.params if p.ndim < 2]
        groups = [
            {"params": [p for p in self.params if p.ndim >= 2], "weight_decay": decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=budget.rate, betas=(0.9, 0.99), fused=fused)
        self.ema = [p.detach().clone() for p in self.params]
        self.ema_decay, self.step, self.seconds = ema, 0, 0.0
        self.path = folder / "state.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        with safe_open(self.path, "pt") as file:
            meta, get = file.metadata(), file.get_tensor
            self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
            for name, value in self.net.named_buffers():
                value.copy_(get(f"buffer.{name}"))
            for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
                p.data.copy_(get(f"model.{name}"))
                self.ema[i].copy_(get(f"ema.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step), device=self.device if self.device.type == "cuda" else "cpu"),
                    # the fused optimizer wants its averages in the memory layout of the weights
                    "exp_avg": torch.empty_like(p, requires_grad=False).copy_(get(f"m.{name}")),
                    "exp_avg_sq": torch.empty_like(p, requires_grad=False).copy_(get(f"v.{name}")),
                }
        print(f"resumed {self.path} at step {self.step} after {self.seconds:.0f} s")

    def save(self) -> None:
        """Write everything that going on needs, atomically."""
        tensors = {f"buffer.{name}": value for name, value in self.net.named_buffers()}
        for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": self.ema[i]}
            if p in self.optimizer.state:
                state = self.optimizer.state[p]
                tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        content = save(
            {name: value.cpu().contiguous() for name, value in tensors.items()},
            metadata={"step": str(self.step), "seconds": f"{self.seconds:.1f}"},
        )
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, self.path)

    def load_ema(self) -> None:
        """Put the moving average into the network: what is shipped and judged."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.ema)

    def update(self, loss: Tensor) -> None:
        """One optimizer step for a loss, then the moving average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.step += 1
        weight = 1 - min(self.ema_decay, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, weight)

    def train(
        self, loss_of: Callable[[], Tensor], *, save_every: float = 120, judge: Callable[[], float] | None = None
    ):
        """Steps until the budget is used up or Ctrl-C; saves at the end and every ``save_every`` seconds.

        ``judge`` (a loss on held-out data) is called at each tenth of the budget and goes into ``log.jsonl``.
        """
        clock = time.process_time if self.device.type == "cpu" else time.monotonic
        begin, base = clock(), self.seconds
        saved, tenth = time.monotonic(), int(10 * self.budget.used(self.step, self.seconds))
        total, window = torch.zeros((), device=self.device), 0
        bar = tqdm(total=self.budget.steps, initial=self.step, desc=f"train {self.folder.name}", mininterval=5)
        with (self.folder / "log.jsonl").open("a") as log:
            try:
                while (used := self.budget.used(self.step, self.seconds)) < 1:
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.budget.rate_at(used)
                    torch.manual_seed(self.seed * 1_000_000_007 + self.step)
                    loss = loss_of()
                    self.update(loss)
                    total, window = total + loss.detach(), window + 1
                    bar.update()
                    if self.step % CHECK and self.device.type == "cuda":
                        continue
                    self.seconds = base + clock() - begin
                    if self.step % CHECK == 0:
                        mean = float(total) / window
                        if not math.isfinite(mean):
                            raise SystemExit(f"the loss is {mean} at step {self.step}; last good state: {self.path}")
                        self.seconds = base + clock() - begin  # again: reading the loss has waited for a GPU
                        row = {"step": self.step, "loss": round(mean, 5), "seconds": round(self.seconds, 1)}
                        if judge and (reached := int(10 * self.budget.used(self.step, self.seconds))) > tenth:
                            tenth, row["held_out"] = reached, round(judge(), 5)
                        log.write(json.dumps(row) + "\n")
                        log.flush()
                        bar.set_postfix(loss=f"{mean:.4f}")
                        total.zero_()
                        window = 0
                    if time.monotonic() - saved > save_every:
                        self.save()
                        saved = time.monotonic()
            except KeyboardInterrupt:
                print("interrupted: saving")
        bar.close()
        self.save()
