"""The training loop of every image model."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmq import checkpoints
from llmq.artifact import Artifact
from llmq.environment import forked_random
from llmq.errors import LlmqError, UserError
from llmq.finite import check_gradients, check_loss, check_weights
from llmq.reopened import Start, meant, reopened
from llmq.terminal import Bar
from llmq.types import Context, Loaded, Step
from llmq.vision.family import Batch, ImageModel, Learner, Training
from llmq.vision.state import save_network

STATE = "state.pt"
"""The one file of a checkpoint."""
History = dict[str, Any]
"""The losses and held-out figures of a training, as JSON holds them."""
Examples = Sequence[Any]


class Lessons(Protocol):
    """The methods of a family, or of a distillation, that the loop calls."""

    def learners(self, network: nn.Module) -> list[Learner]: ...
    def batch(self, examples: Examples, rng: np.random.Generator, augment: str, crop: int | None) -> Batch: ...
    def validate_on(self, loaded: Loaded, examples: Examples) -> tuple[str, float]: ...


def trained_stage(
    step: Step[ImageModel],
    artifact: Artifact[ImageModel],
    folder: Path,
    context: Context,
    lessons: Lessons,
    examples: Examples,
    held_out: Examples,
    training: Training,
    notes: History,
) -> Artifact:
    """Train an artifact, from the last checkpoint in `folder` if there is one, write the network there, and reopen it.

    The history joins the notes under `training`; entries that are there already win.
    """
    model = artifact.model
    with artifact.open(context.device) as loaded:
        start = Start(model, loaded.module)
        history = Run(lessons, loaded, training, folder).train(examples, held_out)
        save_network(loaded.module, folder)
        what = meant(model, loaded.module)
        moved = start.moved(loaded.module, what)
    notes = {**notes, "training": {**history, **notes["training"]}, **moved}
    return reopened(what, artifact.then(step, weights=folder, notes=notes), context.device)


class Run:
    """The training of one open network, in place: learners with optimizers, and checkpoints."""

    def __init__(self, lessons: Lessons, loaded: Loaded, training: Training, folder: Path) -> None:
        self.lessons, self.loaded, self.training = lessons, loaded, training
        self.checkpoints = folder / "checkpoints"
        with forked_random(loaded.device):
            torch.manual_seed(training.seed)  # a learner may be new, as the discriminator of a GAN is
            self.learners = lessons.learners(loaded.module)
        heavy = [(w, w == 0) for w in loaded.module.parameters() if w.dim() > 1] if training.keep_sparsity else []
        self.zeros = [(w, is_zero) for w, is_zero in heavy if not bool(is_zero.all())]  # a new head begins with zeros
        flat = all(w.dim() <= 4 for w in loaded.module.parameters())  # weights of volumes have five
        order_in_memory = torch.channels_last if training.channels_last and flat else torch.contiguous_format
        for learner in self.learners:
            learner.module.to(loaded.device, memory_format=order_in_memory).train()  # type: ignore[call-overload]
        self.optimizers = [_optimizer(training, learner.module) for learner in self.learners]

    def train(self, examples: Examples, held_out: Examples) -> History:
        """Train from the last checkpoint if there is one. Returns the history.

        Raises `LlmqError` for the first loss, gradient, weight or held-out figure that is not finite.
        """
        training, network = self.training, self.loaded.module
        done, history = self.resume()
        seconds_before = history.pop("seconds", 0.0)
        last = training.max_steps
        bar, began = Bar("training", last, start=done), time.perf_counter()
        for step in range(done, last):
            losses = self.step(examples, step)
            for weight, is_zero in self.zeros:
                weight.data.masked_fill_(is_zero, 0)  # pruned weights stay pruned
            _record(history, losses[-1], step + 1, last)
            if held_out and ((step + 1) % training.eval_steps == 0 or step + 1 == last):
                network.eval()
                metric, value = self.lessons.validate_on(self.loaded, held_out)
                network.train()
                if not math.isfinite(value):
                    raise LlmqError(f"the held-out {metric} after step {step + 1} is no finite number ({value})")
                history["held_out"].append([step + 1, round(value, 5)])
                history["metric"] = metric
            seen = f" · {history['metric']} {history['held_out'][-1][1]:.4g}" if history["held_out"] else ""
            bar.advance(" · ".join(f"{p.name} {v:.4f}" for p, v in zip(self.learners, losses, strict=True)) + seen)
            if (step + 1) % training.save_steps == 0 and step + 1 < last:  # the last step needs none
                self.check_state(step + 1)
                self.save(step + 1, {**history, "seconds": seconds_before + time.perf_counter() - began})
        bar.close()
        self.check_state(last)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        network.eval().to(memory_format=torch.contiguous_format)  # as files hold tensors
        seconds, examples_seen = seconds_before + time.perf_counter() - began, last * training.batch_size
        rates = {"seconds": round(seconds, 2), "examples_per_second": round(examples_seen / seconds, 1)}
        return {"steps": last, "examples": examples_seen, **rates, **history}

    def step(self, examples: Examples, step: int) -> list[float]:
        """Take one step of each learner in turn. Returns their losses."""
        training, device = self.training, self.loaded.device
        chosen = [examples[i] for i in order(len(examples), training.batch_size, training.seed, step)]
        rng = np.random.default_rng([training.seed, step, 1])  # a resumed step draws the same
        made = self.lessons.batch(chosen, rng, training.augment, training.crop)
        batch: Batch = _placed(made, device, training.channels_last)
        losses = []
        with forked_random(device):
            torch.manual_seed((training.seed << 20) + step)  # dropout and latents
            for learner, optimizer in zip(self.learners, self.optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = training.rate(step)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=training.autocast):
                    loss = _loss(learner, batch, training.batch_size)
                losses.append(loss.item())
                kept, who = checkpoints.last_sealed(self.checkpoints), self._who(learner)
                check_loss(losses[-1], step + 1, kept, who)
                loss.backward()  # type: ignore[no-untyped-call]
                check_gradients(learner.module.named_parameters(), step + 1, kept, who)
                if training.max_grad_norm:
                    nn.utils.clip_grad_norm_(learner.module.parameters(), training.max_grad_norm)
                optimizer.step()
        return losses

    def _who(self, learner: Learner) -> str:
        """The learner's name for an error, where several learn."""
        return f" of the {learner.name}" if len(self.learners) > 1 else ""

    def check_state(self, step: int) -> None:
        """Raise `LlmqError` for weights or running means that are not finite; call before they are written."""
        kept = checkpoints.last_sealed(self.checkpoints)
        for learner in self.learners:
            learned = {n for n, _ in learner.module.named_parameters()}
            state = learner.module.state_dict().items()
            check_weights(((n, t) for n, t in state if n in learned or "running_" in n), step, kept, self._who(learner))

    def save(self, step: int, history: History) -> None:
        """Write and seal a checkpoint, and drop old ones."""
        state = {
            "step": step,
            "history": history,
            "players": [learner.module.state_dict() for learner in self.learners],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        checkpoint = checkpoints.place(self.checkpoints, step)
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save(state, checkpoint / STATE)
        checkpoints.seal(checkpoint)
        checkpoints.drop_old(self.checkpoints)

    def resume(self) -> tuple[int, History]:
        """Load the newest checkpoint. Returns the steps done, 0 without a checkpoint, and their history."""
        checkpoint = checkpoints.newest(self.checkpoints)
        if not checkpoint:
            return 0, {"loss": [], "held_out": [], "metric": "", "running": []}
        state = torch.load(checkpoint / STATE, weights_only=True)  # runs no code
        for learner, kept in zip(self.learners, state["players"], strict=True):
            learner.module.load_state_dict(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        return state["step"], state["history"]


def order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of a step. Each epoch visits all in another order; a batch may end one epoch and begin the next."""
    places = range(step * batch_size, (step + 1) * batch_size)  # counted from the first epoch on
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in {p // n for p in places}}
    return [int(orders[p // n][p % n]) for p in places]


def _optimizer(training: Training, module: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    rate, decay = training.learning_rate, training.weight_decay
    if training.optim == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay)
    cls: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optim]
    return cls(parameters, rate, betas=training.betas, weight_decay=decay, fused=True)


def _loss(learner: Learner, batch: Batch, batch_size: int) -> Tensor:
    try:
        return learner.loss(batch)
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        raise UserError(
            "normalization over a batch has a single value a channel, and nothing to take a mean of; "
            f"raise batch_size above {batch_size}, or the images' size"
        ) from None


def _placed(value: Any, device: str, channels_last: bool) -> Any:
    """Move a tensor, or the tensors in lists and dicts, to the device."""
    if isinstance(value, dict):
        return {k: _placed(v, device, channels_last) for k, v in value.items()}
    if isinstance(value, list):
        return [_placed(v, device, channels_last) for v in value]
    images = channels_last and value.ndim == 4  # (n, channels, height, width)
    return value.to(device, memory_format=torch.channels_last if images else torch.preserve_format)


def _record(history: History, loss: float, step: int, last: int) -> None:
    """Record the mean loss of about 40 stretches; of several learners the last one's, whose module is the stage."""
    running = history["running"] = [*history["running"], loss]
    if step % max(1, last // 40) == 0 or step == last:
        history["loss"].append([step, round(sum(running) / len(running), 5)])
        history["running"] = []
    if step == last:
        history.pop("running")
