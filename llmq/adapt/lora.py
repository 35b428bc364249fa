"""Low-rank adapters, trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from llmq import processes
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.needs import Needs
from llmq.plugin import DataWord
from llmq.types import Context, Loaded, Step

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
]  # fmt: skip


class Lora(Step):
    """LoRA (Hu et al. 2021) by PEFT on whatever it is given: over 4-bit weights it is QLoRA (Dettmers et al. 2023).

    Trained by transformers' `Trainer` on packed rows: several examples to a row, each attending only to itself, loss
    on completions only where the data has prompts. Adapter weights are float32, products in the model's dtype.
    """

    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "training"
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool]] = {"adapter": True}
    in_every_process: ClassVar[bool] = True

    data: DataWord
    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = Field((), description="trained whole and saved with the adapter")
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024)")
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True

    max_steps: PositiveInt | None = Field(None, description="instead of num_train_epochs")
    num_train_epochs: PositiveFloat = 1.0
    learning_rate: PositiveFloat = 5e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    per_device_train_batch_size: PositiveInt = Field(4, description="rows")
    gradient_accumulation_steps: PositiveInt = 1
    gradient_checkpointing: bool = False
    optim: Optimizer = Field("adamw_torch", description="as transformers names them, 8-bit and paged ones too")
    max_length: int = Field(512, ge=2, description="tokens in a row")
    packing: bool = Field(True, description="several examples to a row; false: one a row, padded")
    eval_steps: PositiveInt | None = Field(None, description="steps between held-out losses; a quarter of all if unset")
    held_out_rows: int = Field(8, ge=0, description="rows for the held-out loss while training; 0: none")
    save_steps: PositiveInt | None = Field(None, description="steps between checkpoints; a quarter of all if unset")
    seed: int | None = Field(None, ge=0, lt=2**32, description="the run's if unset")
    training_arguments: dict[str, Any] = Field({}, description="more of transformers' TrainingArguments: fsdp, …")

    def check(self) -> None:
        """Raise `UserError` for data or an optimizer that cannot be had."""
        super().check()
        if self.lr_scheduler_type == "constant" and "warmup_ratio" in self.model_fields_set and self.warmup_ratio:
            raise UserError("lr_scheduler_type 'constant' has no warm-up; 'constant_with_warmup' has")
        if "paged" in self.optim:
            self._check_paged()

    def space(self, artifact: Artifact) -> int:
        """The adapter in float32, and its weights with two moments in each of two checkpoints."""
        from math import prod

        from llmq.files import safetensors_of
        from llmq.guarded.safetensors_files import header

        tensors = [its.shape for file in safetensors_of(artifact.weights) for its in header(file).values()]
        # A matrix of n weights has at least 2 sqrt(n) rows and columns, however it is packed; few have 1.5 times that.
        adapter = sum(4 * self.r * 3 * prod(shape) ** 0.5 for shape in tensors if len(shape) > 1)
        return int(adapter * (1 + 2 * 3))

    def needs(self) -> Needs:
        """Positions for a row, and an end of what is to be learned."""
        return Needs("max_length", self._with_arguments_folded_in().max_length, end_mark=True)

    def check_base(self, base: Artifact) -> None:
        """Raise `UserError` for training arguments that nobody knows, and for data that leaves no token to learn."""
        from llmq.tasks.windows import check_rows

        check_rows(base, self.data, "train", self._with_arguments_folded_in().max_length)

    def _with_arguments_folded_in(self) -> "Lora":
        """This step, with what `training_arguments` say of its own settings as its settings."""
        from llmq.adapt.in_force import check_names

        fields = {name: getattr(self, name) for name in type(self).model_fields}
        check_names(self.training_arguments, fields, frozenset(self.model_fields_set))
        own = {k: v for k, v in self.training_arguments.items() if k in fields}
        rest = {k: v for k, v in self.training_arguments.items() if k not in fields}
        try:
            return type(self).model_validate({**fields, **own, "training_arguments": rest})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"training_arguments: {first['loc'][0]}: {first['msg']}") from None

    def _check_paged(self) -> None:
        if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
            cure = "adamw_8bit" if self.optim.endswith("8bit") else "adamw_torch"
            raise UserError(
                f"optim {self.optim!r} pages to an accelerator's memory and there is none; {cure!r} runs here"
            )

    def apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        """Train an adapter and write it to `folder` in PEFT's format."""
        return self._with_arguments_folded_in()._apply(artifact, folder, context)

    def _apply(self, artifact: Artifact, folder: Path, context: Context) -> Artifact:
        from transformers import set_seed

        from llmq import terminal
        from llmq.adapt.fast_path import choose
        from llmq.adapt.moved import Start
        from llmq.adapt.reach import reached, sentence, weights_of
        from llmq.adapt.training import train
        from llmq.data.tokens import unused
        from llmq.models.hugging_face import copy_tokenizer
        from llmq.models.reopened import REPACKED, meant, reopened

        split = self.data.read()
        seed = context.seed if self.seed is None else self.seed
        with artifact.open(context.device) as loaded:
            set_seed(seed)
            weights = weights_of(loaded.module)
            model = self._with_adapter(loaded)
            reach = reached(model, weights)
            terminal.say(f"  {sentence(reach)}")
            way = choose(model, self.packing, self.per_device_train_batch_size, _autocast(loaded))
            rows, held_out, counts = self._rows(loaded, split, way.packing)
            arguments = self._arguments(len(rows), bool(held_out), loaded, seed)
            pad, asked = loaded.processor.pad_token_id or 0, self.training_arguments
            # With several processes none holds the whole model; then it is only seen to open.
            alone = processes.count() == 1
            start = Start(artifact.model, model) if alone else None
            history = train(model, way.fast, rows, held_out, pad, folder, arguments, asked)
            what = meant(artifact.model, model) if alone else None
            moved = start.moved(model, what) if start and what else {}
        if processes.is_first():
            copy_tokenizer(artifact.weights, folder)  # an adapter is shared without its base
        about = {"seed": seed, "packing": way.packing, "fast_path": way.why_slow or "used"}
        if way.why_unpacked:
            about["one_example_a_row"] = f"packed, {way.why_unpacked}"
        notes = {
            "data": {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts}
            | unused(split, loaded.processor),
            "adapter": reach,
            "tokens": counts,
            "training": {**history, **about},
            **moved,
        }
        made = artifact.then(self, adapter=folder, notes=notes)
        return reopened(what, made, context.device, REPACKED if artifact.packed else 0.0) if what else made

    def _rows(self, loaded: Loaded, split: Any, packing: bool) -> tuple[list[Any], list[Any], dict[str, Any]]:
        from llmq.adapt.packing import pack
        from llmq.data.tokens import encode_all
        from llmq.models.hugging_face import end_marks

        made = []
        ends = end_marks(loaded.artifact.weights)
        for part in (split.train, split.held_out):
            encoded, counts = encode_all(part, loaded.processor, self.max_length, ends)
            examples = [e for e in encoded if any(e.said[1:])]  # a loss over no token is no number
            counts = {**counts, "nothing_to_learn": len(encoded) - len(examples)}
            made.append((pack(examples, self.max_length) if packing else [[e] for e in examples], counts))
        (rows, counts), (held_out, held_out_counts) = made
        if not rows:
            raise UserError(
                f"no example of {self.data.word} leaves a token to learn within max_length {self.max_length}; raise it"
            )
        tokens = sum(len(e) for row in rows for e in row)
        return (
            rows,
            held_out[: self.held_out_rows],
            {
                "train": {**counts, "packed_rows": len(rows), "tokens": tokens},
                "held_out": held_out_counts,
            },
        )

    def _with_adapter(self, loaded: Loaded) -> Any:
        from peft import LoraConfig, get_peft_model

        from llmq.adapt.reach import expert_stacks, gates
        from llmq.quantize.bnb_layers import keep_unpacked

        if self.gradient_checkpointing and not loaded.module.supports_gradient_checkpointing:
            raise UserError(f"{type(loaded.module).__name__} has no gradient checkpointing; set it to false")
        keep_unpacked(loaded.module)
        # With a cache transformers does not look for examples that begin within a row, and lets them see one another.
        loaded.module.config.use_cache = False
        all_linear = self.target_modules == "all-linear"
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        stacks = expert_stacks(loaded.module) if all_linear else []
        if stacks:
            self._check_stacks(type(loaded.module).__name__)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            target_parameters=stacks or None,
            exclude_modules=(gates(loaded.module) if all_linear else []) or None,
            modules_to_save=list(self.modules_to_save) or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
        )
        try:
            model = get_peft_model(loaded.module, config)
        except ValueError as error:
            raise UserError(f"target_modules {targets!r}: {str(error).splitlines()[0]}") from None
        if name := _hub_id(loaded.artifact):
            model.peft_config["default"].base_model_name_or_path = name
        return model

    def _check_stacks(self, model: str) -> None:
        """Raise `UserError` for what PEFT does not do to experts that are one tensor."""
        orthogonal = self.init_lora_weights == "orthogonal"
        unfit = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "init_lora_weights": orthogonal}
        if names := [name for name, value in unfit.items() if value]:
            raise UserError(
                f"{names[0]} {getattr(self, names[0])!r}: the experts of {model} are one tensor a block, "
                "which PEFT trains without it; leave it out, or name target_modules without the experts, such as "
                "[q_proj, v_proj]"
            )

    def _arguments(self, rows: int, evaluates: bool, loaded: Loaded, seed: int) -> dict[str, Any]:
        from llmq.adapt.checkpoints import KEPT

        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()
        steps = self.max_steps or max(1, round(self.num_train_epochs * rows / per_step))
        quarter = max(1, steps // 4)
        on_cpu = loaded.device == "cpu"
        return {
            "max_steps": steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": round(self.warmup_ratio * steps),
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "per_device_eval_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "activation_checkpointing": self.gradient_checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "optim": self.optim,
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": self.eval_steps or quarter,
            "save_steps": self.save_steps or quarter,
            "save_total_limit": KEPT,
            "logging_steps": max(1, steps // 40),
            "logging_nan_inf_filter": False,
            "seed": seed,
            "use_cpu": on_cpu,
            "bf16": loaded.artifact.model.dtype == "bfloat16",  # type: ignore[attr-defined]
            "fp16": loaded.artifact.model.dtype == "float16" and not on_cpu,  # type: ignore[attr-defined]
            "dataloader_pin_memory": not on_cpu,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "report_to": "none",
            **self.training_arguments,
        }


def _autocast(loaded: Loaded) -> Any:
    """The products' precision while training, as `Trainer` sets it; None for the weights' own."""
    import torch

    dtype = loaded.artifact.model.dtype  # type: ignore[attr-defined]
    kind = loaded.device.split(":")[0]
    if dtype == "float32" or (dtype == "float16" and kind == "cpu"):
        return None
    return torch.autocast(kind, getattr(torch, dtype))


def _hub_id(base: Artifact) -> str | None:
    """The hub id of the weights that an adapter is trained on; None for weights of another place, or changed ones."""
    from llmq.models.hugging_face import is_hub_id

    name = str(getattr(base.model, "weights", ""))
    same_weights = set(base.history) <= {"quantize.bnb"}  # which changes how they are opened, and not what they are
    return name if same_weights and is_hub_id(name) else None
