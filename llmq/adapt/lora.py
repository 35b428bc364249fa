"""LoRA (Hu et al. 2021) by PEFT on any base; over 4-bit weights this is QLoRA (Dettmers et al. 2023).

Trained by transformers' `Trainer` on packed rows: several examples to a row, each attending only to itself, loss
on completions only where the data has prompts. Adapter weights are float32, products in the model's dtype.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from llmq import processes, terminal
from llmq.artifact import Artifact
from llmq.errors import UserError, first_line
from llmq.plugin import DataWord
from llmq.text.family import LanguageModel
from llmq.types import Context, Loaded, Needs, Split, Step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmq.sketch import Sketch, Work
    from llmq.text.examples import Packed, Tokens
    from llmq.text.rows import Row

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
]  # fmt: skip
FOR_PEFT = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"}
FOR_TRAINER = {
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optim",
}  # fmt: skip
"""Settings that go to PEFT's `LoraConfig` and to transformers' `TrainingArguments` as they are."""


OPTIMIZER_BYTES = {
    "sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "lion_32bit": 4,
    "lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3, "paged_adamw_8bit": 2, "paged_lion_32bit": 4,
    "paged_lion_8bit": 1, "paged_ademamix_32bit": 12, "paged_ademamix_8bit": 3,
}  # fmt: skip
"""The bytes that an optimizer keeps for each weight that is trained, where these are not the two moments of Adam."""
ENOUGH = 20_000
"""The most rows that a training by `max_steps` reads, and a tenth as many held out, unless the steps see more."""


class Lora(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "training"
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"adapter": True}
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

    max_steps: PositiveInt | None = Field(
        None, description="instead of num_train_epochs; of more than 20,000 rows as many are drawn as they can see"
    )
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
    training_arguments: dict[str, object] = Field({}, description="more of transformers' TrainingArguments: fsdp, …")

    def check(self) -> None:
        super().check()
        if self.lr_scheduler_type == "constant" and "warmup_ratio" in self.model_fields_set and self.warmup_ratio:
            raise UserError("lr_scheduler_type 'constant' has no warm-up; 'constant_with_warmup' has")
        if "paged" in self.optim and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
            cure = "adamw_8bit" if self.optim.endswith("8bit") else "adamw_torch"
            raise UserError(
                f"optim {self.optim!r} pages to an accelerator's memory and there is none; {cure!r} runs here"
            )

    def space(self, artifact: Artifact[LanguageModel]) -> int:
        """The bytes of the adapter in float32, and of its weights with two moments in each of two checkpoints."""
        from llmq.guarded.weights import header, safetensors_of

        shapes = [entry.shape for file in safetensors_of(artifact.weights) for entry in header(file).values()]
        # A matrix of n weights has at least 2 sqrt(n) rows and columns, however it is packed; few have 1.5 times that.
        adapter = sum(4 * self.r * 3 * prod(shape) ** 0.5 for shape in shapes if len(shape) > 1)
        return int(adapter * (1 + 2 * 3))

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The adapter beside the base; the steps of the training, and the held-out losses between them."""
        from dataclasses import replace

        from llmq.sketch import Work, times
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        its, source = self._with_arguments_folded_in(), as_text(before)
        ends = its.target_modules
        targets = [
            p for p in source.linears if ends == "all-linear" or p.name.removesuffix(".weight").endswith(tuple(ends))
        ]
        whole = [p for p in source.parts if any(word in p.name for word in its.modules_to_save)]
        copies = [packing.whole_copy(part) for part in whole]
        adapter = (*packing.adapters(targets, its.r, its.use_dora), *copies)
        made = replace(source, parts=(*source.parts, *adapter))
        rows, accumulated = its.per_device_train_batch_size, its.gradient_accumulation_steps
        states = OPTIMIZER_BYTES.get(its.optim, 8) / 4
        step = work.training(made, rows, its.max_length, its.r, states, its.gradient_checkpointing)
        done = times(step, (its.max_steps or 0) * accumulated).plus(work.opening(source))
        steps = its.max_steps or 0
        looks = steps // (its.eval_steps or max(1, steps // 4)) * its.held_out_rows / rows
        done = done.plus(times(replace(work.forward(made, rows, its.max_length), memory=0), looks))
        learned = sum(part.opened for part in adapter)
        disk = int(2 * learned * (1 + states))
        unknown = "" if its.max_steps else "the steps of an epoch are known when the data is read; set max_steps"
        return made, done.plus(Work(0, {}, work.PROBES * 2, disk, unknown))

    def smaller(self) -> "Iterator[Mapping[str, object]]":
        """Fewer rows at once with as many a step, activations computed again, shorter rows."""
        from llmq.sketch import changes

        rows, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        fewer: list[dict[str, object]] = [
            {"per_device_train_batch_size": rows // n, "gradient_accumulation_steps": steps * n}
            for n in (2, 4, 8, 16, 32)
            if rows >= n
        ]
        shorter = [{"max_length": self.max_length // n} for n in (2, 4) if self.max_length // n >= 64]
        return changes(*fewer, {"gradient_checkpointing": True}, *shorter)

    def needs(self) -> Needs:
        return Needs("max_length", self._with_arguments_folded_in().max_length, end_mark=True)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.data, "train", self._with_arguments_folded_in().max_length)

    def _with_arguments_folded_in(self) -> "Lora":
        """This step, with `training_arguments` that are settings of the step as its settings."""
        from llmq.text.in_force import check_names

        fields = {name: getattr(self, name) for name in type(self).model_fields}
        check_names(self.training_arguments, fields, frozenset(self.model_fields_set))
        own = {k: v for k, v in self.training_arguments.items() if k in fields}
        rest = {k: v for k, v in self.training_arguments.items() if k not in fields}
        try:
            return type(self).model_validate({**fields, **own, "training_arguments": rest})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"training_arguments: {first['loc'][0]}: {first['msg']}") from None

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        return self._with_arguments_folded_in()._apply(artifact, folder, context)

    def _apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        from transformers import set_seed

        from llmq.reopened import REPACKED, Start, meant, reopened
        from llmq.text.fast_path import choose
        from llmq.text.reach import reached, sentence, weights_of
        from llmq.text.tokenizer import copy_tokenizer
        from llmq.text.tokens import unused
        from llmq.text.training import train

        split = self.data.read()
        seed = context.seed if self.seed is None else self.seed
        with artifact.open(context.device) as loaded:
            set_seed(seed)  # the adapter begins with random values
            weights = weights_of(loaded.module)  # before PEFT wraps the layers
            model = self._with_adapter(loaded)
            # What is learned is saved under this name; PEFT itself reads the base of `peft_config` until then.
            loaded.module.name_or_path = loaded.module.config._name_or_path = _base_name(artifact, folder)
            reach = reached(model, weights)
            terminal.say(f"  {sentence(reach)}")
            way = choose(model, self.packing, self.per_device_train_batch_size, _autocast(loaded))
            rows, held_out, counts = self._rows(loaded, split, way.packing, seed)
            arguments = self._arguments(len(rows), bool(held_out), loaded, seed)
            pad, asked = loaded.processor.pad_token_id or 0, self.training_arguments
            # With several processes none holds the whole model; then it is only seen to open.
            alone = processes.count() == 1
            start = Start(artifact.model, model) if alone else None
            history = train(model, way.fast, rows, held_out, pad, folder, arguments, asked)
            saved = meant(artifact.model, model) if alone else None
            moved = start.moved(model, saved) if start and saved else {}
        if processes.is_first():
            copy_tokenizer(artifact.weights, folder)  # an adapter is shared without its base
        told = {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts}
        unpacked = {"one_example_a_row": f"packed, {way.why_unpacked}"} if way.why_unpacked else {}
        about = {"seed": seed, "packing": way.packing, "fast_path": way.why_slow or "used", **unpacked}
        notes = {
            "data": told | unused(split, loaded.processor),
            "adapter": reach,
            "tokens": counts,
            "training": {**history, **about},
            **moved,
        }
        adapted = artifact.then(self, adapter=folder, notes=notes)
        return reopened(saved, adapted, context.device, REPACKED if artifact.packed else 0.0) if saved else adapted

    def _rows(
        self, loaded: Loaded[LanguageModel], split: Split, packing: bool, seed: int
    ) -> "tuple[Packed, list[list[Tokens]], dict[str, dict[str, int]]]":
        """The rows to train on, the held-out rows, and for either part the counts of rows used and left out."""
        from llmq.text.examples import alone, pack
        from llmq.text.tokenizer import end_marks
        from llmq.text.tokens import encode_all, kept

        ends = end_marks(loaded.artifact.weights)

        def rows_of(part: "Sequence[Row]", enough: int, seen: int) -> "tuple[Packed, dict[str, int]]":
            # An example has two tokens or more, so that no more of them fit into the rows that are seen.
            drawn = self._drawn(len(part), max(enough, seen * (self.max_length // 2 if packing else 1)), seed)
            encoded, counts = encode_all((part[i] for i in drawn), loaded.processor, self.max_length, ends)
            examples = kept(e for e in encoded if any(e.said[1:]))  # a loss over no token is no number
            left_out = {"not_drawn": len(part) - len(drawn)} if len(drawn) < len(part) else {}
            rows = pack(examples, self.max_length) if packing else alone(examples)
            return rows, {**counts, "nothing_to_learn": len(encoded) - len(examples), **left_out}

        rows, counts = rows_of(split.train, ENOUGH, (self.max_steps or 0) * self._per_step)
        held_out, held_out_counts = rows_of(split.held_out, ENOUGH // 10, self.held_out_rows)
        if not rows:
            raise UserError(
                f"no example of {self.data.word} leaves a token to learn within max_length {self.max_length}; raise it"
            )
        counts |= {"packed_rows": len(rows), "tokens": sum(map(len, rows.examples))}
        return rows, held_out[: self.held_out_rows], {"train": counts, "held_out": held_out_counts}

    def _drawn(self, rows: int, enough: int, seed: int) -> Sequence[int]:
        """The numbers of the rows to read, in order: all, or where few steps need fewer, some at random."""
        if self.max_steps is None or rows <= enough:
            return range(rows)
        terminal.say(f"  {enough} of {rows} rows are drawn at random, more than {self.max_steps} steps see")
        return sorted(random.Random(seed).sample(range(rows), enough))

    def _with_adapter(self, loaded: Loaded[LanguageModel]) -> "PeftModel":
        from peft import LoraConfig, get_peft_model

        from llmq.text.bnb_layers import keep_unpacked
        from llmq.text.reach import expert_stacks, gates

        module = loaded.module
        if self.gradient_checkpointing and not module.supports_gradient_checkpointing:
            raise UserError(f"{type(module).__name__} has no gradient checkpointing; set it to false")
        keep_unpacked(module)
        # With a cache transformers does not look for examples that begin within a row, and lets them see one another.
        module.config.use_cache = False
        all_linear = self.target_modules == "all-linear"
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        stacks = expert_stacks(module) if all_linear else []
        if stacks:
            self._check_stacks(module)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            target_parameters=stacks or None,
            exclude_modules=(gates(module) if all_linear else []) or None,
            modules_to_save=list(self.modules_to_save) or None,
            **self.model_dump(include=FOR_PEFT),
        )
        try:
            model = get_peft_model(module, config)
        except ValueError as error:
            raise UserError(f"target_modules {targets!r}: {first_line(error)}") from None
        return model

    def _check_stacks(self, module: "PreTrainedModel") -> None:
        """Raise `UserError` for a setting that PEFT does not support on experts in one tensor."""
        orthogonal = self.init_lora_weights == "orthogonal"
        unfit = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "init_lora_weights": orthogonal}
        if names := [name for name, value in unfit.items() if value]:
            raise UserError(
                f"{names[0]} {getattr(self, names[0])!r}: the experts of {type(module).__name__} are one tensor a "
                "block, which PEFT trains without it; leave it out, or name target_modules without the experts, such "
                "as [q_proj, v_proj]"
            )

    @property
    def _per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()

    def _arguments(self, rows: int, evaluates: bool, loaded: Loaded[LanguageModel], seed: int) -> dict[str, object]:
        from llmq.text.training import schedule

        steps = self.max_steps or max(1, round(self.num_train_epochs * rows / self._per_step))
        on_cpu = loaded.device == "cpu"
        return {
            **self.model_dump(include=FOR_TRAINER),
            **schedule(steps, self.warmup_ratio, self.eval_steps, self.save_steps),
            "per_device_eval_batch_size": self.per_device_train_batch_size,
            "activation_checkpointing": self.gradient_checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "eval_strategy": "steps" if evaluates else "no",
            "seed": seed,
            "use_cpu": on_cpu,
            "bf16": _half(loaded) == "bfloat16",
            "fp16": _half(loaded) == "float16",
            "dataloader_pin_memory": not on_cpu,
            **self.training_arguments,
        }


def _half(loaded: Loaded[LanguageModel]) -> str:
    """The 16-bit dtype of the products while training; empty for the weights' own."""
    dtype = loaded.artifact.model.dtype
    return "" if dtype == "float32" or (dtype == "float16" and loaded.device == "cpu") else dtype


def _autocast(loaded: Loaded[LanguageModel]) -> AbstractContextManager[object]:
    """The context in which products have the precision that `Trainer` gives them."""
    import torch

    half = _half(loaded)
    return torch.autocast(loaded.device.split(":")[0], getattr(torch, half)) if half else nullcontext()


def _base_name(base: Artifact, folder: Path) -> str:
    """The name of the base in an adapter in `folder`: the word of the recipe, or the path from `folder` to the stage.

    The name is the same in every folder that the recipe runs in. 4-bit weights keep the hub id of the float weights.
    """
    from llmq.files import portable_path
    from llmq.text.formats import is_hub_id

    name, place = str(getattr(base.model, "weights", "")), portable_path(base.weights, folder)
    of_hub = set(base.history) <= {"quantize.bnb"} and is_hub_id(name)
    return name if of_hub or Path(place).is_absolute() else place
