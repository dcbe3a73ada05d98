"""The training run: parts, loop, checks, saving. Everything that decides which weights come out is in `Options`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tdpm_ext.priors.io import save_prior
from tdpm_ext.text import Text
from tdpm_ext.training.conditions import Captions, Classes
from tdpm_ext.training.data import Data
from tdpm_ext.training.discriminator import Discriminator, FeatureDiscriminator
from tdpm_ext.training.losses import adversarial_loss
from tdpm_ext.training.options import Options
from tdpm_ext.training.product import finished, new_prior, save_denoiser
from tdpm_ext.training.show import MOST, plot_log, save_grid
from tdpm_ext.training.state import load_state, save_state, write_atomically
from tdpm_ext.training.step import STATS, Step, mean_gradients, scores_apart
from tdpm_ext.training.teacher import Teacher, trajectories
from tdpm_ext.training.watch import Health, Watch

log = logging.getLogger("tdpm_ext")
UNLIMITED = 10**9  # steps


@dataclass(frozen=True)
class Limits:
    """When to stop and how often to look; none of it changes the weights at a given step.

    Attributes:
        steps, minutes: stop and save at whichever comes first. save_minutes: between saves.
        clock: what ``minutes`` are measured with, in seconds; `time.process_time` makes them the process's own.
        log_every: steps. check_every: steps between two looks at ``check_samples`` pictures; 0: never.
    """

    steps: int = UNLIMITED
    minutes: float = math.inf
    save_minutes: float = 3.0
    log_every: int = 20
    check_every: int = 200
    check_samples: int = 512
    clock: Callable[[], float] = time.monotonic


class TrainingFailed(RuntimeError):
    """The run ended itself: NaN, or a prior that lost its modes. The message says what stands on disk."""


class Run:
    """A run in folder ``out``; one that stands there is continued.

    Args:
        checkpoint: what `tdpm_ext.open_checkpoint` returns. Its model is trained too when ``options.denoising`` > 0.
        images, labels: uint8 [N, *shape] and int64 [N]; None: data-free, the teacher's pictures take their place.
        captions: encoded, for a denoiser that takes text (a `TextDenoiser`): those of ``images`` in their order, or
            without images the prompts that trajectories are drawn for.
        base: closed-form prior that leads to ``sigma_init``, or None.
        accelerator: of ``accelerate``; brings device, precision and processes.
        start: folder of a run to go on from with other options (rates, weights of losses): its weights, discriminator,
            optimizers and step. Without effect once the run in ``out`` has a state of its own.
        show: makes pictures of latents, for the grids.
        accelerate: precision of `tdpm_ext.kernels.accelerate` while trajectories are drawn, or "off".

    Raises:
        ValueError: options that do not fit each other, the checkpoint, or the run that stands in ``out``.
    """

    def __init__(
        self, options: Options, checkpoint, out: Path, accelerator, *, images: Tensor | None = None,
        labels: Tensor | None = None, captions: Text | None = None, base=None, teacher: Path | None = None,
        check_samples: int = 512, start: Path | None = None, show: Callable[[Tensor], Tensor] | None = None,
        accelerate: str = "off",
    ):  # fmt: skip
        self.options, self.checkpoint, self.out, self.accelerator = options, checkpoint, out, accelerator
        self.device, processes = accelerator.device, accelerator.num_processes
        if options.batch % processes:
            raise ValueError(f"batch {options.batch} does not divide among {processes} processes")
        share = options.batch // processes
        self.own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        self._settle(out / "options.json")
        model = checkpoint.model.to(self.device)
        torch.manual_seed(options.seed)
        self.show = show or (lambda pictures: pictures)
        self.conditions, labels = self._conditions(images, labels, captions)
        self.prior = new_prior(options, checkpoint, base, self.conditions)
        self.teacher = self._trajectories(teacher or out / "teacher", accelerate)
        self.pictures = 0 if images is None else len(images)
        data = (images, labels, self.teacher, self.conditions)
        self.data = Data(options, self.prior, self.device, *data)
        disc, loss = self._opponent()
        self.trained = list(self.prior.parameters())
        if options.denoising:
            known = {id(p) for p in self.trained}
            self.trained += [p for p in model.requires_grad_(True).parameters() if id(p) not in known]
        if isinstance(loss, torch.nn.Module):  # a transport's navigator is trained on the prior's side
            self.trained += list(loss.to(self.device).parameters())
        sigma_data = float(checkpoint.config["model"].get("sigma_data", 1.0))
        average = mean_gradients(accelerator)
        parts = (options, model, self.prior, disc, loss, self.trained, self.device, average, accelerator.autocast)
        self.update = Step(*parts, sigma_data, self.conditions)
        self.mean = [p.detach().clone() for p in self.trained]
        watched = self.data.images if self.data.images is not None else self.teacher.final
        self.watch = Watch(options, watched.cpu(), check_samples, self.conditions, self.device)
        self.step, self.seconds, self.health = 0, 0.0, Health()
        found = [folder / "state.safetensors" for folder in (out, start) if folder is not None]
        if state := next((path for path in found if path.exists()), None):
            self.step, self.seconds, health = load_state(state, self.tensors())
            self.health = health if state == found[0] else Health()  # a new phase has its own best
            self.say(f"resumed at step {self.step}, after {self.seconds / 60:.1f} minutes")

    # -- parts ---------------------------------------------------------------------------------------------------

    def _conditions(self, images, labels, captions: Text | None) -> tuple[Classes, Tensor | None]:
        if captions is None:
            return Classes(self.checkpoint.num_classes), labels
        if images is not None and len(images) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(images)} pictures: give one each, in their order")
        if self.options.loss == "transport" and self.options.adversarial:
            raise ValueError(
                "loss 'transport' compares pictures of one class, and every caption is its own: choose relativistic "
                "or non_saturating"
            )
        return Captions(captions, self.device), None if images is None else torch.arange(len(images))

    def _settle(self, path: Path) -> None:
        """The options of the run that stands in the folder must be these."""
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, self.options.to_json().encode())
        self.accelerator.wait_for_everyone()
        if differing := self.options.differs_from(path):
            raise ValueError(f"{path.parent} holds a run with other options ({'; '.join(differing[:4])}): name another")

    def _trajectories(self, folder: Path, accelerate: str) -> Teacher | None:
        o, main = self.options, self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            about = (o, self.checkpoint, folder, self.conditions, self.device)
            teacher = trajectories(*about, progress=main, accelerate=accelerate)
        if teacher is not None:
            whole = "final" if o.finish else "state"
            teacher.aim("denoised" if o.noise == "fresh" and not o.finish and not o.kind.startswith("raw") else whole)
        return teacher

    def _opponent(self):
        o, c = self.options, self.checkpoint
        if not o.adversarial:
            return None, None
        about = {"conditions": self.conditions, "width": o.disc_width}
        if o.critic == "features":
            disc = FeatureDiscriminator(c.model, tuple(c.shape), **about).to(self.device)
        else:
            sigma_data = float(c.config["model"].get("sigma_data", 1.0))
            disc = Discriminator(tuple(c.shape), **about, sigma_data=sigma_data).to(self.device)
        return disc, adversarial_loss(o.loss, gamma=o.gamma, every=o.every, features=disc.width)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: weights, both optimizers, the running means."""
        return self.update.tensors() | {f"mean.{i}": value for i, value in enumerate(self.mean)}

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self, limits: Limits) -> Path:
        """Go on until a limit, Ctrl-C or a failure; always saves. Returns the prior's path.

        Raises:
            KeyboardInterrupt: after saving, when Ctrl-C was pressed (a second one does not wait for the step).
            TrainingFailed: NaN or collapse; the last good state stands.
        """
        began, saved, base = limits.clock(), time.monotonic(), self.seconds
        window: list[Tensor] = []
        main = self.accelerator.is_main_process
        total = limits.steps if limits.steps < UNLIMITED else None
        bar = tqdm(total=total, initial=self.step, desc="train", disable=not main, mininterval=5)
        with _Interrupted() as interrupted, bar:
            while self.step < limits.steps:
                window.append(self._advance())
                bar.update()
                self.seconds = base + limits.clock() - began
                if self.step % limits.log_every == 0:
                    self._report(torch.stack(window), bar)
                    window = []
                if limits.check_every and self.step % limits.check_every == 0:
                    self._check()
                out_of_time = limits.clock() - began > limits.minutes * 60
                if self._anyone(interrupted.asked or out_of_time):
                    break
                if time.monotonic() - saved > limits.save_minutes * 60:
                    self.save()
                    saved = time.monotonic()
        self.save()
        if interrupted.asked:
            self.say(f"interrupted: saved at step {self.step}; the same command goes on from there")
            raise KeyboardInterrupt
        return self.out / "prior.safetensors"

    def _advance(self) -> Tensor:
        batch = self.data.batch(self.step).rows(self.own)
        stats = self.update(batch, self.step)
        self.step += 1
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.trained], 1 - decay)
        return stats

    def _anyone(self, here: bool) -> bool:
        """Whether any process wants to stop; all of them hear the same answer."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _report(self, window: Tensor, bar: tqdm) -> None:
        """Log the window's means; NaN ends the run."""
        if self.accelerator.num_processes > 1:
            window = self.accelerator.reduce(window, "mean")
        window = window.cpu()
        means = dict(zip(STATS, window.nanmean(0).tolist(), strict=True))
        row = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {name: round(value, 5) for name, value in means.items() if math.isfinite(value)}
        expected = {"prior": self.options.adversarial, "regression": self.options.regression}
        wrong = [name for name, weight in expected.items() if weight and name not in row]
        if wrong or not self._finite():
            raise TrainingFailed(self._last_good(f"the {wrong[0] if wrong else 'weights'} became NaN or infinite"))
        if self.options.adversarial and (text := self.health.see_scores(scores_apart(window))):
            self._warn(text, row)
        bar.set_postfix({name: f"{means[name]:.3f}" for name in STATS if name in row}, refresh=False)
        self._write(row)

    def _check(self) -> None:
        """Look at the pictures; keep the best prior; end a run whose prior is lost."""
        row: dict = {"step": self.step, "seconds": round(self.seconds, 1)}
        lost = text = None
        if self.accelerator.is_main_process:
            with self.averaged():
                distance, covered, pictures = self.watch.look(self.checkpoint.model, self.prior)
                best, text, lost = self.health.see_check(distance, covered)
                row |= {"distance": round(distance, 4), "coverage": round(covered, 4)}
                save_grid(self.show(pictures[:MOST]), self.out / "grid.png")
                if best:
                    self._save_products("best")
            if text:
                self._warn(text, row)
            self._write(row)
            plot_log(self.out / "log.jsonl", self.out / "log.png")
        if self._anyone(bool(lost)):
            raise TrainingFailed(self._last_good(text or "the prior collapsed"))

    def _last_good(self, what: str) -> str:
        state = self.out / "state.safetensors"
        kept = f"the last good state is {state}" if state.exists() else "nothing had been saved yet"
        advice = "a smaller lr or a larger gamma may hold; delete the folder to begin anew"
        return f"step {self.step}: {what}; {kept}, the best prior best.safetensors beside it; {advice}"

    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in (*self.trained, *self.update.judging))

    # -- what is written -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self):
        """The running mean of the weights in place of the weights."""
        now = [p.detach().clone() for p in self.trained]
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.trained], self.mean)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.data for p in self.trained], now)

    def save(self) -> None:
        """State and products, each whole; nothing is touched when a weight is not finite."""
        if not self._finite():
            raise TrainingFailed(self._last_good("a weight became NaN or infinite"))
        if self.accelerator.is_main_process:
            with self.averaged():
                self._save_products("prior")
            save_state(self.out / "state.safetensors", self.tensors(), self.step, self.seconds, self.health)
        self.accelerator.wait_for_everyone()

    def _save_products(self, name: str) -> None:
        fingerprint = self.checkpoint.fingerprint
        if self.options.denoising:
            fingerprint = save_denoiser(self.checkpoint, self.out / f"{name}-denoiser.safetensors")
        about = {"steps": self.step, "minutes": round(self.seconds / 60, 1), "pictures": self.pictures}
        save_prior(finished(self.prior, self.options, fingerprint, about), self.out / f"{name}.safetensors")

    def _write(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _warn(self, text: str, row: dict) -> None:
        row["warning"] = text
        if self.accelerator.is_main_process:
            log.warning("step %d: %s", self.step, text)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            log.warning("%s", text)


class _Interrupted:
    """Ctrl-C asks; the step at hand is finished first. A second Ctrl-C does not wait."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> _Interrupted:
        try:
            self._before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread: whoever runs us handles Ctrl-C
            self._before = None
        return self

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
