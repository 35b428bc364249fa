"""transformers' `Trainer`, fed with packed rows, evaluated exactly, and watched."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from llmq import processes, terminal
from llmq.adapt import checkpoints
from llmq.adapt.fast_path import FastPath
from llmq.adapt.finite import advice, check_gradients, check_loss, check_weights
from llmq.adapt.in_force import check_in_force
from llmq.adapt.packing import Collator
from llmq.data.tokens import IGNORED
from llmq.errors import LlmqError, UserError
from llmq.files import write_json

COUNTS = "counts.json"
"""In a checkpoint, beside what `Trainer` writes there."""


class PackedTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` whose held-out loss is a mean over tokens, and leaves no trace in the training that follows."""

    def __init__(self, fast: FastPath | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.fast = fast
        self.done: Path | None = checkpoints.newest(Path(self.args.output_dir))
        """The checkpoint that training goes on from."""
        self.tokens_seen = 0
        self.skipped = 0
        """Steps that the scaler of float16 left out, because their gradients overflowed."""
        self.seconds = 0.0
        """How long it took up to that checkpoint."""
        self.began = 0.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`, telling the attention where the examples lie."""
        if self.fast:
            self.fast.see(inputs)
        if model.training:
            self.tokens_seen += int(inputs.pop("tokens"))
        else:
            inputs.pop("tokens")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; raises `LlmqError` for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        check_loss(float(loss), self.state.global_step + 1, self._kept())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        # A scaler of float16 leaves out the steps whose gradients overflow, and lowers its scale: that is its work.
        if self.accelerator.scaler is None:
            check_gradients(_trained(self.model), self.state.global_step + 1, self._kept())
        return super()._clip_grad_norm(model)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # no old one goes before this is whole
        super()._save_checkpoint(*args, **kwargs)
        self.args.save_total_limit = limit
        processes.wait(self.args.device.type)
        if processes.is_first():
            folder = Path(self.args.output_dir)
            checkpoint = checkpoints.place(folder, self.state.global_step)
            write_json(checkpoint / COUNTS, self._counts())
            checkpoints.seal(checkpoint)
            best = self.state.best_model_checkpoint
            checkpoints.drop_old(folder, limit or sys.maxsize, [Path(best)] if best else [])

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a kill with them."""
        return self.seconds + time.perf_counter() - self.began

    def _counts(self) -> dict[str, float]:
        """What `Trainer` does not keep in a checkpoint."""
        return {
            "processes": processes.count(),
            "tokens": self.tokens_seen,
            "skipped": self.skipped,
            "seconds": self.elapsed,
            "loss": float(self._tr_loss),
            "logged": self._globalstep_last_logged,
        }

    def go_on(self) -> None:
        """Take up the counts of the checkpoint, and the sum of the losses since the last one that was told."""
        self.began = time.perf_counter()
        if self.done:
            counts = json.loads((self.done / COUNTS).read_text(encoding="utf-8"))
            if counts["processes"] != processes.count():  # each has random numbers of its own
                began_by = f"{counts['processes']} process(es) began this training"
                raise UserError(f"{began_by}, and {processes.count()} would go on; start as many")
            self.tokens_seen, self.seconds = counts["tokens"], counts["seconds"]
            self.skipped = counts["skipped"]
            self._tr_loss += counts["loss"]
            self._globalstep_last_logged = counts["logged"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Where all steps are done, `Trainer` would begin the epoch all the same, and do one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def check_weights(self) -> None:
        """Raise `LlmqError` for an adapter that is not finite."""
        check_weights(_trained(self.model), self.state.global_step, self._kept())

    def _kept(self) -> Path | None:
        return checkpoints.last_sealed(Path(self.args.output_dir))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss in nats a token over all held-out rows, independent of how they are batched."""
        collate, size = Collator(self.data_collator.pad_token_id), self.args.per_device_eval_batch_size
        total = tokens = 0.0
        model = self.model_wrapped
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for start in range(0, len(self.eval_dataset), size):
                batch = self._prepare_inputs(collate(self.eval_dataset[start : start + size]))
                learned = int((batch["labels"] != IGNORED).sum())
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    total += float(self.compute_loss(model, batch)) * learned
                tokens += learned
        model.train()
        metrics = {"eval_loss": total / tokens}
        if not isfinite(metrics["eval_loss"]):
            step, kept = self.state.global_step, self._kept()
            raise LlmqError(f"the held-out loss after step {step} is not a finite number; {advice(kept)}")
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):  # type: ignore[misc]
    """A progress bar with loss and tokens a second; before it begins, a look at what is in force."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.asked = asked
        self.trainer: Any = None
        self.bar: Any = None
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that what was asked is in force, and begin the bar."""
        check_in_force(self.trainer, self.asked)
        self.trainer.go_on()
        self.bar = terminal.Bar("training", state.max_steps, start=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step that changed nothing, and move the bar."""
        self.trainer.skipped += bool(self.trainer.accelerator.optimizer_step_was_skipped)
        figures = [f"{name} {value:.3f}" for name, value in self.latest.items()]
        speed = self.trainer.tokens_seen / self.trainer.elapsed
        self.bar.advance(" · ".join([*figures, f"{speed:.0f} tokens/s"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Remember the latest losses."""
        names = {"loss": "loss", "eval_loss": "held-out"}
        self.latest.update({names[k]: v for k, v in (logs or {}).items() if k in names})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.bar.close()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """What transformers tells accelerate of one training by environment variables is not told to the next."""
    names = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    try:
        yield
    finally:
        for name in [n for n in os.environ if n.startswith(names) and n not in before]:
            del os.environ[name]
        os.environ.update(before)


@_environment_kept()
def train(
    model: Any,
    fast: FastPath | None,
    rows: Sequence[Any],
    held_out: Sequence[Any],
    pad_token_id: int,
    folder: Path,
    arguments: dict[str, Any],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, from the last whole checkpoint in `folder` if there is one, and write the adapter there.

    `asked` is what of the `arguments` the recipe wants of transformers by name. Returns the history. Raises `LlmqError`
    if training does not see the processes that were started or what is learned is not finite, `UserError` for what was
    asked and is not in force.
    """
    from transformers.trainer_callback import PrinterCallback

    kept = folder / "checkpoints"
    watch = Watch(asked)
    with _one_line(asked):
        made = _arguments(kept, arguments)
        trainer = PackedTrainer(
            fast,
            model=model,
            train_dataset=rows,
            eval_dataset=held_out or None,
            data_collator=Collator(pad_token_id),
            args=made,
            callbacks=[watch],
        )
        trainer.get_train_dataloader()
        _check_scheduler(made)
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    seen = trainer.accelerator.num_processes
    if seen != processes.count():  # a launcher's flag alone starts nothing
        raise LlmqError(f"{processes.count()} processes were started, and training sees {seen}")
    with fast.switched_on() if fast else nullcontext():
        trainer.train(resume_from_checkpoint=str(trainer.done) if trainer.done else None)
    seconds = trainer.elapsed
    trainer.check_weights()
    skipped = _told_of_skipped(trainer.skipped, trainer.state.global_step)
    trainer.save_model(str(folder))
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # or it would answer in autocast
    if processes.is_first():
        _sort_modules(folder / "adapter_config.json")
        (folder / "training_args.bin").unlink()  # a pickle, which nobody should have to open
        shutil.rmtree(kept, ignore_errors=True)
    history = trainer.state.log_history
    tokens = trainer.tokens_seen * processes.count()
    return {
        "processes": processes.count(),
        "steps": trainer.state.global_step,
        **skipped,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": [[e["step"], round(e["loss"], 4)] for e in history if "loss" in e],
        "held_out_loss": [[e["step"], round(e["eval_loss"], 4)] for e in history if "eval_loss" in e],
    }


def _told_of_skipped(skipped: int, steps: int) -> dict[str, int]:
    """The note on steps whose gradients overflowed float16, if there were any. Raises `LlmqError` if all were such."""
    if not skipped:
        return {}
    if skipped >= steps:
        raise LlmqError(
            f"the gradients of all {steps} steps overflowed float16, and nothing was learned; set the model's "
            "dtype to bfloat16 or float32"
        )
    terminal.say(f"  {skipped} of {steps} steps were left out: their gradients overflowed float16")
    return {"skipped_steps": skipped}


def _sort_modules(config: Path) -> None:
    """PEFT writes the names of modules, which it keeps as a set, in an order that changes from process to process."""
    told = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {key: sorted(value) if isinstance(value, list) else value for key, value in told.items()})


@contextmanager
def _one_line(asked: Mapping[str, Any]) -> Iterator[None]:
    """What a library says of arguments that it cannot follow, in one line."""
    try:
        yield
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if not asked:
            raise
        raise UserError(f"training_arguments {dict(asked)}: {' '.join(str(error).split())}") from None


def _check_scheduler(arguments: Any) -> None:
    """Raise what the scheduler would raise after everything was prepared."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    kwargs = arguments.lr_scheduler_kwargs
    get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=kwargs)


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _arguments(checkpoints: Path, arguments: dict[str, Any]) -> Any:
    from transformers import TrainingArguments

    made = TrainingArguments(str(checkpoints), **arguments)
    if processes.count() == 1:
        # Several cards in one process would mean DataParallel, which splits a batch behind our attention's back.
        made._n_gpu = min(made.n_gpu, 1)
    return made
