"""The arguments that a recipe gives to transformers' `Trainer`, compared with the prepared trainer.

Libraries drop arguments that they cannot follow, without a message: most optimizers read no `optim_args`. So each
argument that a recipe may set has a check of the prepared trainer in `LOOKS`, and an argument without one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from operator import attrgetter

import torch
from transformers import Trainer, TrainingArguments

from llmq.errors import UserError, did_you_mean

Look = Callable[[Trainer, object], bool]
"""(prepared trainer, value asked for) -> True if the value is in force."""

ELSEWHERE = {
    "bf16": "model.dtype decides",
    "fp16": "model.dtype decides",
    "use_cpu": "--device decides",
    "output_dir": "--out decides",
    "eval_strategy": "set held_out_rows and eval_steps",
    "warmup_steps": "set warmup_ratio",
    "activation_checkpointing": "set gradient_checkpointing",
    "auto_find_batch_size": "set per_device_train_batch_size",
    "label_smoothing_factor": "the loss is over shifted labels",
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "remove_unused_columns": "the rows have no columns",
    "resume_from_checkpoint": "use --resume",
    "push_to_hub": "use llmq push",
    "disable_tqdm": "the progress bar is llmq's own",
    "torch_compile": "rows differ in their examples, and each would be compiled anew",
    "use_cache": "no cache is kept while training",
    "save_only_model": "a killed training could not go on to the same adapter",
}
"""Arguments that are decided elsewhere, and the place that decides."""


def _distributed(kind: str) -> Look:
    return lambda trainer, asked: not asked or str(trainer.accelerator.distributed_type).endswith(kind)


def _has(path: str) -> Look:
    """A check that the attribute at `path` of the trainer has the value asked for."""

    def look(trainer: Trainer, asked: object) -> bool:
        try:
            return bool(attrgetter(path)(trainer) == asked)
        except AttributeError:
            return False

    return look


def _drops_last(trainer: Trainer, asked: object) -> bool:
    loader = trainer.callback_handler.train_dataloader
    return bool(getattr(loader.batch_sampler, "drop_last", loader.drop_last) == asked)


def _beta(place: int) -> Look:
    # A slice, since an optimizer may have no betas.
    return lambda trainer, asked: asked in trainer.optimizer.defaults.get("betas", ())[place : place + 1]


def _optim_args(trainer: Trainer, asked: object) -> bool:
    pairs = (part.partition("=") for part in str(asked).replace(" ", "").split(","))  # "a=1, b=2"
    return all(str(trainer.optimizer.defaults.get(key)) == value for key, _, value in pairs)


def _scheduler(trainer: Trainer, asked: object) -> bool:
    lambdas = getattr(trainer.lr_scheduler, "lr_lambdas", [])
    settings = getattr(lambdas[0], "keywords", {}) if lambdas else {}  # a schedule is a partial function
    return bool(lambdas) and isinstance(asked, Mapping) and all(settings.get(k) == v for k, v in asked.items())


def _reports(trainer: Trainer, asked: object) -> bool:
    names = asked if isinstance(asked, list | tuple) else [asked]
    present = [type(c).__name__.lower() for c in trainer.callback_handler.callbacks]  # such as wandbcallback
    return all(name == "none" or any(str(name).replace("_", "") in p for p in present) for name in names)


def _always(trainer: Trainer, asked: object) -> bool:
    return True  # the trainer itself follows it at every log, evaluation or checkpoint


LOOKS: dict[str, Look] = {
    "fsdp": _distributed("FSDP"),
    "fsdp_config": _distributed("FSDP"),
    "deepspeed": _distributed("DEEPSPEED"),
    "ddp_find_unused_parameters": _has("model_wrapped.find_unused_parameters"),
    "ddp_broadcast_buffers": _has("model_wrapped.broadcast_buffers"),
    "ddp_static_graph": _has("model_wrapped.static_graph"),
    "ddp_backend": lambda _, asked: torch.distributed.is_initialized() and torch.distributed.get_backend() == asked,
    # The trainer leaves the hook's handle here once embeddings get noise.
    "neftune_noise_alpha": lambda trainer, asked: hasattr(trainer, "neftune_hook_handle"),
    "lr_scheduler_kwargs": _scheduler,
    "optim_args": _optim_args,
    "adam_beta1": _beta(0),
    "adam_beta2": _beta(1),
    "adam_epsilon": lambda trainer, asked: trainer.optimizer.defaults.get("eps") == asked,
    # There is no such cache on a processor.
    "torch_empty_cache_steps": lambda trainer, asked: trainer.args.device.type != "cpu",
    "tf32": lambda trainer, asked: (
        trainer.args.device.type == "cuda" and (torch.backends.cuda.matmul.fp32_precision == "tf32") == asked
    ),
    "full_determinism": lambda _, asked: torch.are_deterministic_algorithms_enabled() == asked,
    "data_seed": _has("accelerator.dataloader_config.data_seed"),
    "dataloader_num_workers": _has("callback_handler.train_dataloader.num_workers"),
    "dataloader_prefetch_factor": _has("callback_handler.train_dataloader.prefetch_factor"),
    "dataloader_persistent_workers": _has("callback_handler.train_dataloader.persistent_workers"),
    "dataloader_pin_memory": _has("callback_handler.train_dataloader.pin_memory"),
    "dataloader_drop_last": _drops_last,
    # Without a held-out set no checkpoint is the best.
    "load_best_model_at_end": lambda trainer, asked: not asked or bool(trainer.eval_dataset),
    "report_to": _reports,
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_first_step", "eval_delay", "eval_on_start"), _always
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "save_strategy", "save_total_limit", "run_name"), _always),
}


def check_names(asked: Mapping[str, object], fields: Mapping[str, object], set_fields: frozenset[str]) -> None:
    """Raise `UserError` for an argument that is unknown, that is decided elsewhere, or that a field contradicts.

    `fields` are the step's own settings by name, `set_fields` the names of those that the recipe sets.
    """
    known = {f.name: f.default for f in fields_of(TrainingArguments)}
    for name, value in asked.items():
        if name in fields:
            if name in set_fields and fields[name] != value:
                raise _refused(f"{name!r} is {value!r}, and {name} of the step is {fields[name]!r}; set one of them")
        elif name not in known:
            raise _refused(f"transformers has no {name!r}{did_you_mean(name, known)}")
        elif name in ELSEWHERE:
            raise _refused(f"{name!r} has no effect: {ELSEWHERE[name]}")
        elif type(known[name]) is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _refused(f"{name!r} is {value!r}, and not a number")
        elif name not in LOOKS:  # refused, since a library may drop the argument
            raise _refused(f"{name!r} has no effect that could be checked; leave it out")
    if "run_name" in asked and asked.get("report_to") in (None, "none", [], ["none"]):
        raise _refused("'run_name' has no effect: nothing is reported; name a tracker in report_to, or leave it out")


def check_in_force(trainer: Trainer, asked: Mapping[str, object]) -> None:
    """Raise `UserError` for the first argument or setting that is not in force in a prepared trainer."""
    for name, value in asked.items():
        if name in LOOKS and value is not None and not LOOKS[name](trainer, value):  # None: nothing is asked for
            raise _refused(f"{name}: {value!r} is not in force here, where training is {_surroundings(trainer)}")
    for setting, wanted, present in _settings(trainer):
        if wanted != present:
            raise UserError(f"{setting} {wanted!r} was asked for, and {present!r} is in force")


def _settings(trainer: Trainer) -> list[tuple[str, object, object]]:
    """(name, value asked for, value in force) of the step's own settings that a library or a launcher can override."""
    args = trainer.args
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside of accelerate's wrapper
    wanted = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[0].__name__
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    settings = [
        ("optim", wanted, type(optimizer).__name__),
        ("weight_decay", args.weight_decay, max(g.get("weight_decay", 0.0) for g in optimizer.param_groups)),
        ("gradient_checkpointing", args.activation_checkpointing, checkpointing),
        ("mixed precision", precision, trainer.accelerator.mixed_precision),
        ("per_device_train_batch_size", args.per_device_train_batch_size, trainer._train_batch_size),
    ]
    for name in ("FSDP", "DEEPSPEED"):  # set by a launcher, or by transformers where it was asked
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            kind = str(trainer.accelerator.distributed_type)
            settings.append(("sharding by", name, name if kind.endswith(name) else kind))
    return settings


def _surroundings(trainer: Trainer) -> str:
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    return f"{trainer.accelerator.num_processes} process(es), {kind}, on {trainer.args.device.type}"


def _refused(message: str) -> UserError:
    return UserError(f"training_arguments: {message}")
