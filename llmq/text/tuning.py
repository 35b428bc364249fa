"""The settings of a training of a language model by transformers' `Trainer`, its rows of examples, and its teacher."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from llmq import processes, terminal
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.plugin import DataWord
from llmq.text.family import LanguageModel
from llmq.types import Context, Loaded, Needs, Split, Step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmq.sketch import Work
    from llmq.text.examples import Packed, Tokens
    from llmq.text.rows import Row
    from llmq.text.sizing.network import TextSketch
    from llmq.text.teaching import Teacher
    from llmq.text.training import PackedTrainer

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
]  # fmt: skip
FOR_TRAINER = {
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "optim",
}  # fmt: skip
"""Settings that go to transformers' `TrainingArguments` as they are."""

OPTIMIZER_BYTES = {
    "sgd": 0, "adafactor": 0.1, "adagrad": 4, "rmsprop": 4, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "lion_32bit": 4,
    "lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3, "paged_adamw_8bit": 2, "paged_lion_32bit": 4,
    "paged_lion_8bit": 1, "paged_ademamix_32bit": 12, "paged_ademamix_8bit": 3,
}  # fmt: skip
"""The bytes that an optimizer keeps for each weight that is trained, where these are not the two moments of Adam."""
CARDS = ("nvidia[0-9]*", "kfd", "dxg")
"""The files of `/dev` that tell of a card: of NVIDIA, of AMD, of either under WSL2."""
LOST = {
    "truncated": "lose their end, and the end mark with it: they are longer than",
    "prompt_too_long": "are left out: no token to learn stands within",
}
"""What becomes of rows that are too long, by their count."""
ENOUGH = 20_000
"""The most rows that a training by `max_steps` reads, and a tenth as many held out, unless the steps see more."""


class Tuning(Step[LanguageModel]):
    suits: ClassVar[frozenset[str]] = frozenset({"causal-lm"})
    uses: ClassVar[Literal["training", "calibration", "comparison"]] = "training"
    in_every_process: ClassVar[bool] = True

    data: DataWord
    teacher: Literal["base"] | None = Field(
        None, description="base: learn also the answers of the untouched base to the same tokens (distillation)"
    )
    alpha: float = Field(0.5, gt=0, le=1, description="the teacher's share of the loss; the rest is the data's")
    temperature: PositiveFloat = Field(1.0, description="of the two distributions where a teacher answers")

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
        if not self.teacher:
            self.refuse_unread(("alpha", "temperature"), "without teacher: base")
        if not self.held_out_rows:
            self.refuse_unread(("eval_steps",), "with held_out_rows: 0")
        steps = self.training_arguments.get("max_steps", self.max_steps)
        if steps and "num_train_epochs" in {*self.model_fields_set, *self.training_arguments}:
            raise UserError(f"num_train_epochs has no effect with max_steps {steps}; keep one")
        said = {"eval_steps": self.eval_steps, "save_steps": self.save_steps, **self.training_arguments}
        if said.get("load_best_model_at_end") and said["eval_steps"] != said["save_steps"]:
            raise UserError(
                f"load_best_model_at_end: a held-out loss needs a checkpoint; eval_steps is {said['eval_steps']} and "
                f"save_steps {said['save_steps']}; set both alike, or neither"
            )
        if self.lr_scheduler_type == "constant" and "warmup_ratio" in self.model_fields_set and self.warmup_ratio:
            raise UserError("lr_scheduler_type 'constant' has no warm-up; 'constant_with_warmup' has")
        if "paged" in self.optim and not any(any(Path("/dev").glob(name)) for name in CARDS):
            cure = "adamw_8bit" if self.optim.endswith("8bit") else "adamw_torch"
            raise UserError(
                f"optim {self.optim!r} pages to an accelerator's memory and there is none; {cure!r} runs here"
            )

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
        return Needs("max_length", self.with_arguments_folded_in().max_length, end_mark=True)

    def check_base(self, base: Artifact) -> None:
        from llmq.text.windows import check_rows

        check_rows(base, self.data, "train", self.with_arguments_folded_in().max_length)

    def with_arguments_folded_in(self) -> Self:
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

    def seed_of(self, context: Context) -> int:
        """The seed of the step, which is that of the run if unset."""
        return context.seed if self.seed is None else self.seed

    def learn(
        self,
        loaded: Loaded[LanguageModel],
        model: "PeftModel | PreTrainedModel",
        folder: Path,
        context: Context,
        save: "Callable[[PackedTrainer], None]",
    ) -> dict[str, object]:
        """Train a model from the last whole checkpoint in `folder` if there is one, and save it; return the notes."""
        from peft.helpers import disable_input_dtype_casting

        from llmq.text.fast_path import choose
        from llmq.text.tokens import unused
        from llmq.text.training import train

        if self.gradient_checkpointing and not loaded.module.supports_gradient_checkpointing:
            raise UserError(f"{type(loaded.module).__name__} has no gradient checkpointing; set it to false")
        # With a cache transformers does not look for examples that begin within a row, and lets them see one another.
        loaded.module.config.use_cache = False
        split, seed = self.data.read(), self.seed_of(context)
        way = choose(model, self.packing, self.per_device_train_batch_size, _autocast(loaded))
        rows, held_out, counts = self._rows(loaded, split, way.packing, seed)
        if way.packing or self.per_device_train_batch_size > 1:
            self._check_lengths(loaded, rows)
        arguments = self._arguments(len(rows), bool(held_out), loaded, seed)
        pad, asked = loaded.processor.pad_token_id or 0, self.training_arguments
        # PEFT widens the input of each adapter and autocast rounds it back, to the same bits in a copy of its own; its
        # variants (DoRA, QALoRA) compute with what is widened.
        plain = not any(getattr(layer, "lora_variant", None) for layer in model.modules())
        once = disable_input_dtype_casting(model, plain and bool(_half(loaded)))
        with self._teacher_of(loaded.artifact, context) as teacher, once:
            history = train(model, way.fast, teacher, rows, held_out, pad, folder, arguments, asked, save)
        told = {"word": self.data.word, "shape": split.shape, "sha256": split.sha256, **split.counts}
        unpacked = {"one_example_a_row": f"packed, {way.why_unpacked}"} if way.why_unpacked else {}
        about = {"seed": seed, "packing": way.packing, "fast_path": way.why_slow or "used", **unpacked}
        if self.teacher:
            about |= {"teacher": "0-base", "alpha": self.alpha, "temperature": self.temperature}
        return {
            "data": told | unused(split, loaded.processor),
            "tokens": counts,
            "training": {**history, **about},
        }

    @contextmanager
    def _teacher_of(self, artifact: Artifact[LanguageModel], context: Context) -> "Iterator[Teacher | None]":
        if not self.teacher:
            yield None
            return
        from llmq.text.teaching import Teacher

        with artifact.model.base(context).open(context.device) as loaded:
            yield Teacher(loaded.module, self.alpha, self.temperature)

    def trained(self, source: "TextSketch", step: "Work") -> "Work":
        """The work of all steps, each of which takes `step`, of the held-out losses between them, and of a teacher."""
        from dataclasses import replace

        from llmq.sketch import Work, times
        from llmq.text.sizing import work

        rows, length = self.per_device_train_batch_size, self.max_length
        steps = self.max_steps or 0
        batches = steps * self.gradient_accumulation_steps
        looks = steps // (self.eval_steps or max(1, steps // 4)) * self.held_out_rows / rows
        done = times(step, batches).plus(work.opening(source))
        done = done.plus(times(replace(work.forward(source, rows, length), memory=0), looks))
        if self.teacher:
            answer = work.answers(source.untouched, rows, length)
            done = done.plus(times(replace(answer, memory=0), batches + looks))
            done = replace(
                done.plus(replace(work.opening(source.untouched), memory=0)), memory=done.memory + answer.memory
            )
        unknown = "" if self.max_steps else "the steps of an epoch are known when the data is read; set max_steps"
        return done.plus(Work(unknown=unknown))

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
        for name, what in LOST.items():
            if counts[name]:
                terminal.say(f"  {counts[name]} of {counts['rows']} rows {what} max_length {self.max_length}")
        if not rows:
            raise UserError(
                f"no example of {self.data.word} leaves a token to learn within max_length {self.max_length}; raise it"
            )
        counts |= {"packed_rows": len(rows), "tokens": sum(map(len, rows.examples))}
        return rows, held_out[: self.held_out_rows], {"train": counts, "held_out": held_out_counts}

    def _check_lengths(self, loaded: Loaded[LanguageModel], rows: "Packed") -> None:
        """Raise `UserError` for examples of a batch whose positions the longest of them would turn otherwise."""
        from llmq.text.attention import border, crosses

        end = border(loaded.module)
        if end and crosses(loaded.module, *map(len, rows.examples)):
            raise UserError(
                f"{type(loaded.module).__name__} turns positions otherwise where a text of a batch has more than {end} "
                f"tokens, and the data has shorter ones as well; set max_length: {end}, or packing: false and "
                "per_device_train_batch_size: 1"
            )

    def _drawn(self, rows: int, enough: int, seed: int) -> Sequence[int]:
        """The numbers of the rows to read, in order: all, or where few steps need fewer, some at random."""
        if self.max_steps is None or rows <= enough:
            return range(rows)
        terminal.say(f"  {enough} of {rows} rows are drawn at random, more than {self.max_steps} steps see")
        return sorted(random.Random(seed).sample(range(rows), enough))

    @property
    def _per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()

    def _steps_of(self, rows: int) -> int:
        """The steps of `num_train_epochs`. As in `Trainer`, the last step of an epoch takes the rows that are left."""
        at_once = self.per_device_train_batch_size * processes.count()
        whole = floor if self.training_arguments.get("dataloader_drop_last") else ceil
        an_epoch = max(1, ceil(whole(rows / at_once) / self.gradient_accumulation_steps))
        return ceil(round(self.num_train_epochs * an_epoch, 6))  # 0.1 * 30 is a little more than 3

    def _arguments(self, rows: int, evaluates: bool, loaded: Loaded[LanguageModel], seed: int) -> dict[str, object]:
        from llmq.text.training import schedule

        steps = self.max_steps or self._steps_of(rows)
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
