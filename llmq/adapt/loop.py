"""The training loop of every image model."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmq.adapt import checkpoints
from llmq.adapt.finite import check_gradients, check_loss, check_weights
from llmq.errors import LlmqError, UserError
from llmq.models.vision import Player
from llmq.terminal import Bar
from llmq.types import Loaded

STATE = "state.pt"
"""All that a checkpoint holds."""


@dataclass(frozen=True)
class Plan:
    """How to train: every setting decided."""

    steps: int
    batch_size: int
    learning_rate: float
    schedule: str
    warmup: int
    optim: str
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float | None
    augment: str
    crop: int | None
    autocast: bool
    channels_last: bool
    eval_steps: int
    save_steps: int
    seed: int
    keep_zeros: bool = False
    """Whether weights that are zero when training begins are zero after every step."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear warm-up, then the schedule down to 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        factors = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * factors[self.schedule]

    def optimizer(self, module: Any) -> Any:
        """The optimizer of a player's parameters."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if self.optim == "sgd":
            return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optim]
        return cls(parameters, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, fused=True)


def order(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The examples of a step: each epoch visits all in an order of its own, and its rest begins the next."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in {p // n for p in places}}
    return [int(orders[p // n][p % n]) for p in places]


def train(loaded: Loaded, examples: Sequence[Any], held_out: Sequence[Any], plan: Plan, folder: Path) -> dict[str, Any]:
    """Train the opened network in place; returns the history.

    Raises `LlmqError` for the first loss, gradient, weight or held-out figure that is not finite.
    """
    model: Any = loaded.artifact.model
    network = loaded.module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        players: list[Player] = model.players(network)
    heavy = [(w, w == 0) for w in network.parameters() if w.dim() > 1] if plan.keep_zeros else []
    zeros = [(weight, is_zero) for weight, is_zero in heavy if not bool(is_zero.all())]  # a new head begins with zeros
    order_in_memory = torch.channels_last if plan.channels_last else torch.contiguous_format
    for player in players:
        player.module.to(loaded.device, memory_format=order_in_memory).train()
    optimizers = [plan.optimizer(player.module) for player in players]
    kept = folder / "checkpoints"
    done, history = _resume(kept, players, optimizers)
    seconds_before = history.pop("seconds", 0.0)
    bar, began = Bar("training", plan.steps, start=done), time.perf_counter()
    for step in range(done, plan.steps):
        losses = _step(loaded, examples, players, optimizers, plan, kept, step)
        for weight, is_zero in zeros:
            weight.data.masked_fill_(is_zero, 0)
        _record(history, players, losses, step + 1, plan)
        if held_out and ((step + 1) % plan.eval_steps == 0 or step + 1 == plan.steps):
            network.eval()
            metric, value = model.validate_on(loaded, held_out)
            network.train()
            if not math.isfinite(value):
                raise LlmqError(f"the held-out {metric} after step {step + 1} is no finite number ({value})")
            history["held_out"].append([step + 1, round(value, 5)])
            history["metric"] = metric
        seen = f" · {history['metric']} {history['held_out'][-1][1]:.4g}" if history["held_out"] else ""
        bar.advance(" · ".join(f"{p.name} {v:.4f}" for p, v in zip(players, losses, strict=True)) + seen)
        if (step + 1) % plan.save_steps == 0 and step + 1 < plan.steps:
            _check_state(players, step + 1, kept)
            seconds = seconds_before + time.perf_counter() - began
            _save(kept, players, optimizers, step + 1, {**history, "seconds": seconds})
    bar.close()
    _check_state(players, plan.steps, kept)
    shutil.rmtree(kept, ignore_errors=True)
    network.eval().to(memory_format=torch.contiguous_format)
    seconds, examples_seen = seconds_before + time.perf_counter() - began, plan.steps * plan.batch_size
    rates = {"seconds": round(seconds, 2), "examples_per_second": round(examples_seen / seconds, 1)}
    return {"steps": plan.steps, "examples": examples_seen, **rates, **history}


def _step(
    loaded: Loaded,
    examples: Sequence[Any],
    players: list[Player],
    optimizers: list[Any],
    plan: Plan,
    checkpoints_folder: Path,
    step: int,
) -> list[float]:
    model: Any = loaded.artifact.model
    chosen = [examples[i] for i in order(len(examples), plan.batch_size, plan.seed, step)]
    made = model.batch(chosen, np.random.default_rng([plan.seed, step, 1]), plan.augment, plan.crop)
    batch = {name: _placed(value, loaded.device, plan.channels_last) for name, value in made.items()}
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((plan.seed << 20) + step)  # dropout and latents
        for player, optimizer in zip(players, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(loaded.device.split(":")[0], torch.bfloat16, enabled=plan.autocast):
                loss = _loss(player, batch, plan)
            losses.append(loss.item())
            kept = checkpoints.last_sealed(checkpoints_folder)
            check_loss(losses[-1], step + 1, kept, _who(player, players))
            loss.backward()
            check_gradients(player.module.named_parameters(), step + 1, kept, _who(player, players))
            if plan.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(player.module.parameters(), plan.max_grad_norm)
            optimizer.step()
    return losses


def _loss(player: Player, batch: dict[str, Any], plan: Plan) -> Any:
    try:
        return player.loss(batch)
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        raise UserError(
            "normalization over a batch has a single value a channel, and nothing to take a mean of; "
            f"raise batch_size above {plan.batch_size}, or the images' size"
        ) from None


def _who(player: Player, players: list[Player]) -> str:
    """The name of what is not finite: of several players, whose."""
    return f" of the {player.name}" if len(players) > 1 else ""


def _check_state(players: list[Player], step: int, checkpoints_folder: Path) -> None:
    """Weights and running means, before they are kept."""
    kept = checkpoints.last_sealed(checkpoints_folder)
    for player in players:
        learned = {n for n, _ in player.module.named_parameters()}
        state = player.module.state_dict().items()
        running = ((n, t) for n, t in state if n in learned or "running_" in n)
        check_weights(running, step, kept, _who(player, players))


def _placed(value: Any, device: str, channels_last: bool) -> Any:
    """A tensor, or tensors in lists and dicts, on the device."""
    if isinstance(value, dict):
        return {k: _placed(v, device, channels_last) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(v, device, channels_last) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    images = channels_last and value.ndim == 4
    return value.to(device, memory_format=torch.channels_last if images else torch.preserve_format)


def _record(history: dict[str, Any], players: list[Player], losses: list[float], step: int, plan: Plan) -> None:
    """Keep the mean loss of about 40 stretches; of several players the last one's, who is what is kept of them."""
    history["running"] = [*history["running"], losses[-1]]
    if step % max(1, plan.steps // 40) == 0 or step == plan.steps:
        history["loss"].append([step, round(sum(history["running"]) / len(history["running"]), 5)])
        history["running"] = []
    if step == plan.steps:
        history.pop("running")


def _save(folder: Path, players: list[Player], optimizers: list[Any], step: int, history: Mapping[str, Any]) -> None:
    state = {
        "step": step,
        "history": history,
        "players": [p.module.state_dict() for p in players],
        "optimizers": [o.state_dict() for o in optimizers],
    }
    checkpoint = checkpoints.place(folder, step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.save(state, checkpoint / STATE)
    checkpoints.seal(checkpoint)
    checkpoints.drop_old(folder)


def _resume(folder: Path, players: list[Player], optimizers: list[Any]) -> tuple[int, dict[str, Any]]:
    checkpoint = checkpoints.newest(folder)
    if not checkpoint:
        return 0, {"loss": [], "held_out": [], "metric": "", "running": []}
    state = torch.load(checkpoint / STATE, weights_only=True)
    for player, kept in zip(players, state["players"], strict=True):
        player.module.load_state_dict(kept)
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return state["step"], state["history"]
