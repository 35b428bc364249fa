"""transformers' `Trainer`, fed with packed rows, evaluated exactly, and watched."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from llmq import checkpoints, processes, terminal
from llmq.environment import float32_products, forked_random, set_float32_products
from llmq.errors import LlmqError, UserError
from llmq.files import write_json
from llmq.finite import advice, check_gradients, check_loss, check_weights
from llmq.text.examples import IGNORED, Collator, Tokens
from llmq.text.fast_path import FastPath
from llmq.text.in_force import check_in_force
from llmq.text.made_again import made_again
from llmq.text.sharding import let_processors_shard, share_held

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmq.text.teaching import Teacher

CHECKPOINTS = "checkpoints"
"""The folder of checkpoints in that of a stage, until it is whole."""
COUNTS = "counts.json"
"""The file of a checkpoint with counts that `Trainer` does not keep."""


class PackedTrainer(Trainer):  # type: ignore[misc]
    """`Trainer` whose held-out loss is a mean over tokens, and leaves no trace in the training that follows."""

    def __init__(self, fast: FastPath | None, teacher: Teacher | None = None, **settings: object):
        super().__init__(**settings)
        self.fast, self.teacher = fast, teacher
        self.done: Path | None = checkpoints.newest(Path(self.args.output_dir))
        """The checkpoint that training goes on from."""
        self.tokens_seen = 0
        self.skipped = 0
        """Steps that the scaler of float16 left out, because their gradients overflowed."""
        self.seconds = 0.0
        """Seconds of training up to that checkpoint."""
        self.began = 0.0
        self.held: dict[str, float] = {}
        """The note on the share of the weights that this process holds."""

    def create_accelerator_and_postprocess(self) -> None:
        with let_processors_shard(self.args):
            super().create_accelerator_and_postprocess()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: object, **kwargs: object) -> Tensor:
        tokens, segments = inputs.pop("tokens"), inputs.pop("segments")  # ours: the model takes no such inputs
        if self.fast:
            self.fast.segments = segments
        if self.teacher:
            self.teacher.see(inputs)
        if model.training:
            self.tokens_seen += tokens
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        check_loss(float(loss), self.state.global_step + 1, self._kept())
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> object:
        # A scaler of float16 leaves out the steps whose gradients overflow, and lowers its scale: that is its work.
        if self.accelerator.scaler is None:
            check_gradients(self._trained(), self.state.global_step + 1, self._kept())
        return super()._clip_grad_norm(model)

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        self.check_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # no old one goes before this is whole
        super()._save_checkpoint(*args, **kwargs)
        tokens = self.tokens_of_all()
        self.args.save_total_limit = limit
        processes.wait(self.args.device.type)
        if processes.is_first():
            folder = Path(self.args.output_dir)
            checkpoint = checkpoints.place(folder, self.state.global_step)
            write_json(
                checkpoint / COUNTS,  # what `Trainer` does not keep
                {
                    "processes": processes.count(),
                    "tokens": tokens,
                    "skipped": self.skipped,
                    "seconds": self.elapsed,
                    "loss": float(self._tr_loss),
                    "logged": self._globalstep_last_logged,
                },
            )
            checkpoints.seal(checkpoint)
            best = self.state.best_model_checkpoint
            checkpoints.drop_old(folder, limit or sys.maxsize, [Path(best)] if best else [])

    def tokens_of_all(self) -> int:
        """The tokens that all processes have trained on."""
        return int(self.accelerator.reduce(torch.tensor(self.tokens_seen, device=self.args.device), "sum"))

    @property
    def elapsed(self) -> float:
        """Seconds of training, with the seconds before a kill."""
        return self.seconds + time.perf_counter() - self.began

    def go_on(self) -> None:
        """Take up the counts of the checkpoint, and the sum of the losses since the last logged one."""
        self.began = time.perf_counter()
        if self.done:
            counts = json.loads((self.done / COUNTS).read_text(encoding="utf-8"))
            if counts["processes"] != processes.count():  # each has random numbers of its own
                raise UserError(
                    f"{counts['processes']} process(es) began this training, and {processes.count()} would go on; "
                    "start as many"
                )
            self.tokens_seen = counts["tokens"] if processes.is_first() else 0  # the sum over all
            self.skipped, self.seconds = counts["skipped"], counts["seconds"]
            self._tr_loss += counts["loss"]
            self._globalstep_last_logged = counts["logged"]

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        # Where all steps are done, `Trainer` would begin the epoch all the same, and do one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def check_weights(self) -> None:
        """Raise `LlmqError` for an adapter that is not finite."""
        check_weights(self._trained(), self.state.global_step, self._kept())

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _kept(self) -> Path | None:
        return checkpoints.last_sealed(Path(self.args.output_dir))

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Loss in nats a token over all held-out rows, whatever the batch size. Raises `LlmqError` if not finite."""
        size, total, tokens = self.args.per_device_eval_batch_size, 0.0, 0
        model = self.model_wrapped
        model.eval()
        with torch.no_grad(), forked_random(str(self.args.device)):  # or training would draw other numbers
            for start in range(0, len(self.eval_dataset), size):
                batch = self._prepare_inputs(self.data_collator(self.eval_dataset[start : start + size]))
                learned = int((batch["labels"] != IGNORED).sum())  # labels (rows, tokens)
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    total += float(self.compute_loss(model, batch)) * learned  # a mean back to a sum
                tokens += learned
        model.train()
        metrics = {"eval_loss": total / tokens}
        if not isfinite(total):
            raise LlmqError(
                f"the held-out loss after step {self.state.global_step} is not a finite number; {advice(self._kept())}"
            )
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):  # type: ignore[misc]
    """A progress bar with loss and tokens a second; before training, a check that the asked settings are in force."""

    trainer: PackedTrainer
    bar: terminal.Bar

    def __init__(self, asked: Mapping[str, object]) -> None:
        self.asked = asked
        self.latest: dict[str, float] = {}

    def on_train_begin(self, *_: object, **__: object) -> None:
        check_in_force(self.trainer, self.asked)
        self.trainer.held = share_held(self.trainer.model)
        self.trainer.go_on()
        state = self.trainer.state
        self.bar = terminal.Bar("training", state.max_steps, start=state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        self.trainer.skipped += bool(self.trainer.accelerator.optimizer_step_was_skipped)
        figures = [f"{name} {value:.3f}" for name, value in self.latest.items()]
        speed = self.trainer.tokens_seen / self.trainer.elapsed
        self.bar.advance(" · ".join([*figures, f"{speed:.0f} tokens/s"]))

    def on_log(self, *_: object, logs: Mapping[str, float] | None = None, **__: object) -> None:
        names = {"loss": "loss", "eval_loss": "held-out"}
        self.latest.update({names[k]: v for k, v in (logs or {}).items() if k in names})

    def on_train_end(self, *_: object, **__: object) -> None:
        self.bar.close()


DETERMINISTIC = (
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
    "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip
"""The environment variables that transformers sets for `full_determinism`."""


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment variables by which transformers tells accelerate of one training, for the next.

    The precision of products, which `tf32` changes, is that of the run again, and `full_determinism` ends.
    """
    precision = float32_products()
    exact, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    of_cudnn = cudnn.deterministic, cudnn.benchmark
    names = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", *DETERMINISTIC)
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    try:
        yield
    finally:
        for name in [n for n in os.environ if n.startswith(names) and n not in before]:
            del os.environ[name]
        os.environ.update(before)
        if float32_products() != precision:
            set_float32_products(precision)
        torch.use_deterministic_algorithms(exact)
        cudnn.deterministic, cudnn.benchmark = of_cudnn


def train(
    model: PeftModel | PreTrainedModel,
    fast: FastPath | None,
    teacher: Teacher | None,
    rows: Sequence[Sequence[Tokens]],
    held_out: Sequence[Sequence[Tokens]],
    pad_token_id: int,
    folder: Path,
    arguments: Mapping[str, object],
    asked: Mapping[str, object],
    save: Callable[[PackedTrainer], None],
) -> dict[str, object]:
    """Train, from the last whole checkpoint in `folder` if there is one, and save the model; then checkpoints go.

    `asked` are those `arguments` that the recipe names itself. Returns the history. Raises `LlmqError` if training sees
    other processes than were started or learns a value that is not finite, `UserError` for an asked argument that is
    not in force.
    """
    data = {"train_dataset": rows, "eval_dataset": held_out or None, "data_collator": Collator(pad_token_id)}
    with teacher.teaching(model, fast) if teacher else nullcontext():
        trainer, history = trained(PackedTrainer, folder, arguments, asked, fast, teacher, model=model, **data)
    save(trainer)
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # or it would answer in autocast
    if processes.is_first():
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return history


def save_adapter(trainer: PackedTrainer) -> None:
    """Write the adapter to the folder that holds the checkpoints."""
    folder = Path(trainer.args.output_dir).parent
    trainer.save_model(str(folder))
    if processes.is_first():
        _settle(folder / "adapter_config.json", trainer.model.get_base_model().name_or_path)
        (folder / "training_args.bin").unlink()  # a pickle, which nobody should have to open


@_environment_kept()
def trained(
    kind: type[PackedTrainer],
    folder: Path,
    arguments: Mapping[str, object],
    asked: Mapping[str, object],
    fast: FastPath | None = None,
    teacher: Teacher | None = None,
    **parts: object,
) -> tuple[PackedTrainer, dict[str, object]]:
    """A trainer of this kind after its training, from the last whole checkpoint in `folder` on, and the history."""
    trainer = _trainer(kind, fast, teacher, folder / CHECKPOINTS, arguments, asked, **parts)
    with fast.switched_on() if fast else nullcontext(), made_again():
        trainer.train(resume_from_checkpoint=str(trainer.done) if trainer.done else None)
    seconds = trainer.elapsed
    trainer.check_weights()
    steps = trainer.state.global_step
    skipped = _note_skipped(trainer.skipped, steps)
    tokens = trainer.tokens_of_all()
    best = {"kept_step": trainer.state.best_global_step} if trainer.args.load_best_model_at_end else {}

    def logged(name: str) -> list[list[float]]:
        return [[entry["step"], round(entry[name], 4)] for entry in trainer.state.log_history if name in entry]

    return trainer, {
        "processes": processes.count(),
        **trainer.held,
        "steps": steps,
        **best,
        **skipped,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "loss": logged("loss"),
        "held_out_loss": logged("eval_loss"),
    }


def schedule(steps: int, warmup_ratio: float, eval_steps: int | None, save_steps: int | None) -> dict[str, object]:
    """The `TrainingArguments` for a number of steps; checkpoints and held-out losses come each quarter if unset."""
    quarter = max(1, steps // 4)
    return {
        "max_steps": steps,
        "warmup_steps": round(warmup_ratio * steps),
        "eval_steps": eval_steps or quarter,
        "save_steps": save_steps or quarter,
        "save_total_limit": checkpoints.KEPT,
        "logging_steps": max(1, steps // 40),
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def _trainer(
    kind: type[PackedTrainer],
    fast: FastPath | None,
    teacher: Teacher | None,
    folder: Path,
    arguments: Mapping[str, object],
    asked: Mapping[str, object],
    **parts: object,
) -> PackedTrainer:
    """The prepared trainer. Raises `UserError` in one line for an argument that a library refuses."""
    watch = Watch(asked)
    try:
        settings = TrainingArguments(str(folder), **arguments)
        if processes.count() == 1:
            # Several cards in one process would mean DataParallel, which splits a batch behind our attention's back.
            settings._n_gpu = min(settings.n_gpu, 1)
        trainer = kind(fast, teacher, args=settings, callbacks=[watch], **parts)
        trainer.get_train_dataloader()
        # The scheduler would refuse its settings after everything was prepared.
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
        kwargs = settings.lr_scheduler_kwargs
        get_scheduler(settings.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if not asked:
            raise
        raise UserError(f"training_arguments {dict(asked)}: {' '.join(str(error).split())}") from None
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    seen = trainer.accelerator.num_processes
    if seen != processes.count():  # a launcher's flag alone starts nothing
        raise LlmqError(f"{processes.count()} processes were started, and training sees {seen}")
    return trainer


def _note_skipped(skipped: int, steps: int) -> dict[str, int]:
    """The note on steps whose gradients overflowed float16, if any did. Raises `LlmqError` if all did."""
    if not skipped:
        return {}
    if skipped >= steps:
        raise LlmqError(
            f"the gradients of all {steps} steps overflowed float16, and nothing was learned; set the model's "
            "dtype to bfloat16 or float32"
        )
    terminal.say(f"  {skipped} of {steps} steps were left out: their gradients overflowed float16")
    return {"skipped_steps": skipped}


def _settle(config: Path, base: str) -> None:
    """Make the configuration of an adapter the same in every process and folder.

    PEFT keeps the names of modules as a set, and names the base by the folder that the base was opened from.
    """
    told = json.loads(config.read_text(encoding="utf-8"))
    plain = {key: sorted(value) if isinstance(value, list) else value for key, value in told.items()}
    write_json(config, {**plain, "base_model_name_or_path": base})
