"""What was asked of transformers' `Trainer`, held against what is in force once it is ready to begin.

Libraries leave out what they cannot do here without a word: `fsdp` on processors trains plain data parallelism,
`optim_args` of most optimizers are read by nobody. So each argument that a recipe may set has a look at the prepared
trainer beside it, and an argument without one is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from llmq.errors import UserError, did_you_mean

Look = Callable[[Any, Any], bool]
"""(prepared trainer, what was asked) -> whether it is in force."""

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
"""Arguments that are decided elsewhere, and where."""


def _distributed(kind: str) -> Look:
    return lambda trainer, asked: not asked or str(trainer.accelerator.distributed_type).endswith(kind)


def _ddp(attribute: str) -> Look:
    def look(trainer: Any, asked: Any) -> bool:
        from torch.nn.parallel import DistributedDataParallel

        wrapped = trainer.model_wrapped
        return isinstance(wrapped, DistributedDataParallel) and bool(getattr(wrapped, attribute) == asked)

    return look


def _loader(attribute: str) -> Look:
    return lambda trainer, asked: bool(getattr(trainer.callback_handler.train_dataloader, attribute) == asked)


def _drops_last(trainer: Any, asked: Any) -> bool:
    loader = trainer.callback_handler.train_dataloader
    return bool(getattr(loader.batch_sampler, "drop_last", loader.drop_last) == asked)


def _betas(place: int) -> Look:
    return lambda trainer, asked: [*_defaults(trainer).get("betas", ()), None, None][place] == asked


def _default(name: str) -> Look:
    return lambda trainer, asked: _defaults(trainer).get(name) == asked


def _defaults(trainer: Any) -> Mapping[str, Any]:
    defaults: Mapping[str, Any] = trainer.optimizer.defaults
    return defaults


def _optim_args(trainer: Any, asked: str) -> bool:
    pairs = (part.partition("=") for part in asked.replace(" ", "").split(","))
    return all(str(_defaults(trainer).get(key)) == value for key, _, value in pairs)


def _scheduler(trainer: Any, asked: Mapping[str, Any]) -> bool:
    lambdas = getattr(trainer.lr_scheduler, "lr_lambdas", [])
    return bool(lambdas) and all(getattr(lambdas[0], "keywords", {}).get(k) == v for k, v in asked.items())


def _backend(trainer: Any, asked: str) -> bool:
    import torch

    return torch.distributed.is_initialized() and bool(torch.distributed.get_backend() == asked)


def _tf32(trainer: Any, asked: bool) -> bool:
    import torch

    return bool(trainer.args.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 == asked)


def _deterministic(trainer: Any, asked: bool) -> bool:
    import torch

    return bool(torch.are_deterministic_algorithms_enabled() == asked)


def _reports(trainer: Any, asked: Any) -> bool:
    names = [asked] if isinstance(asked, str) else asked
    present = [type(c).__name__.lower() for c in trainer.callback_handler.callbacks]
    return all(name == "none" or any(name.replace("_", "") in p for p in present) for name in names)


def _always(trainer: Any, asked: Any) -> bool:
    """Of what the trainer itself does at every log, evaluation or checkpoint."""
    return True


LOOKS: dict[str, Look] = {
    "fsdp": _distributed("FSDP"),
    "fsdp_config": _distributed("FSDP"),
    "deepspeed": _distributed("DEEPSPEED"),
    "ddp_find_unused_parameters": _ddp("find_unused_parameters"),
    "ddp_broadcast_buffers": _ddp("broadcast_buffers"),
    "ddp_static_graph": _ddp("static_graph"),
    "ddp_backend": _backend,
    "neftune_noise_alpha": lambda trainer, asked: hasattr(trainer, "neftune_hook_handle"),
    "lr_scheduler_kwargs": _scheduler,
    "optim_args": _optim_args,
    "adam_beta1": _betas(0),
    "adam_beta2": _betas(1),
    "adam_epsilon": _default("eps"),
    "torch_empty_cache_steps": lambda trainer, asked: trainer.args.device.type != "cpu",
    "tf32": _tf32,
    "full_determinism": _deterministic,
    "data_seed": lambda trainer, asked: trainer.accelerator.dataloader_config.data_seed == asked,
    "dataloader_num_workers": _loader("num_workers"),
    "dataloader_prefetch_factor": _loader("prefetch_factor"),
    "dataloader_persistent_workers": _loader("persistent_workers"),
    "dataloader_pin_memory": _loader("pin_memory"),
    "dataloader_drop_last": _drops_last,
    "load_best_model_at_end": lambda trainer, asked: not asked or bool(trainer.eval_dataset),
    "report_to": _reports,
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_first_step", "eval_delay", "eval_on_start"), _always
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "save_strategy", "save_total_limit", "run_name"), _always),
}


def check_names(asked: Mapping[str, Any], fields: Mapping[str, Any], set_fields: frozenset[str]) -> None:
    """Raise `UserError` for an argument that nobody knows, that is decided elsewhere, or that a field contradicts.

    `fields` are the step's own settings by name, `set_fields` those that the recipe wrote.
    """
    from dataclasses import fields as fields_of

    from transformers import TrainingArguments

    known = {f.name for f in fields_of(TrainingArguments)}
    for name, value in asked.items():
        if name in fields:
            if name in set_fields and fields[name] != value:
                raise _refused(f"{name!r} is {value!r}, and {name} of adapt.lora is {fields[name]!r}; set one of them")
        elif name not in known:
            raise _refused(f"transformers has no {name!r}{did_you_mean(name, known)}")
        elif name in ELSEWHERE:
            raise _refused(f"{name!r} has no effect: {ELSEWHERE[name]}")
        elif name not in LOOKS:
            raise _refused(f"{name!r} has no effect that could be checked; leave it out")


def check_in_force(trainer: Any, asked: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first thing that was asked of a prepared trainer and is not in force."""
    for name, value in asked.items():
        if name in LOOKS and value is not None and not LOOKS[name](trainer, value):
            raise _refused(f"{name}: {value!r} is not in force here, where training is {_surroundings(trainer)}")
    for what, wanted, found in _settings(trainer):
        if wanted != found:
            raise UserError(f"{what} {wanted!r} was asked for, and {found!r} is in force")


def _settings(trainer: Any) -> list[tuple[str, Any, Any]]:
    """(name, asked, found) of the step's own settings that a library or a launcher can put aside."""
    import os

    args = trainer.args
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    wanted = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[0].__name__
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    found = [
        ("optim", wanted, type(optimizer).__name__),
        ("weight_decay", args.weight_decay, max(g.get("weight_decay", 0.0) for g in optimizer.param_groups)),
        ("gradient_checkpointing", args.activation_checkpointing, checkpointing),
        ("mixed precision", precision, trainer.accelerator.mixed_precision),
        ("per_device_train_batch_size", args.per_device_train_batch_size, trainer._train_batch_size),
    ]
    for name in ("FSDP", "DEEPSPEED"):  # set by a launcher, or by transformers where it was asked
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            kind = str(trainer.accelerator.distributed_type)
            found.append(("sharding by", name, name if kind.endswith(name) else kind))
    return found


def _surroundings(trainer: Any) -> str:
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    return f"{trainer.accelerator.num_processes} process(es), {kind}, on {trainer.args.device.type}"


def _refused(message: str) -> UserError:
    return UserError(f"training_arguments: {message}")
