"""LoRA (Hu et al. 2021) by PEFT on any base; over 4-bit weights this is QLoRA (Dettmers et al. 2023).

Trained by transformers' `Trainer` on packed rows: several examples to a row, each attending only to itself, loss
on completions only where the data has prompts. Adapter weights are float32, products in the model's dtype.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmq import processes, terminal
from llmq.artifact import Artifact
from llmq.errors import UserError, first_line
from llmq.text.family import LanguageModel
from llmq.text.tuning import OPTIMIZER_BYTES, Tuning
from llmq.types import Context, Loaded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llmq.sketch import Sketch, Work

FOR_PEFT = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "use_qalora", "init_lora_weights"}
"""Settings that go to PEFT's `LoraConfig` as they are."""


class Lora(Tuning):
    requires: ClassVar[Mapping[str, bool]] = {"adapter": False}
    leaves: ClassVar[Mapping[str, bool | str]] = {"adapter": True}

    r: PositiveInt = 16
    lora_alpha: PositiveFloat = 32
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="or the last parts of their names: q_proj, mlp.up_proj"
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="trained whole and saved with the adapter, by the last parts of their names"
    )
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024)")
    use_qalora: bool = Field(
        False, description="A pools the inputs of a group of GPTQ's grid (Xu et al. 2024); such adapters merge into it"
    )
    qalora_group_size: PositiveInt | None = Field(
        None, description="inputs that use_qalora pools; the grid's group_size if unset"
    )
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True

    def check(self) -> None:
        super().check()
        if not self.use_qalora:
            self.refuse_unread(("qalora_group_size",), "without use_qalora: true")
        unfit = {
            "use_dora": self.use_dora,
            "modules_to_save": self.modules_to_save,
            "init_lora_weights": self.init_lora_weights == "orthogonal",
        }
        if self.use_qalora and (names := [name for name, value in unfit.items() if value]):
            raise UserError(f"use_qalora and {names[0]} exclude each other; leave one out")

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

        from llmq.sketch import Work
        from llmq.text.names import is_end
        from llmq.text.sizing import packing, work
        from llmq.text.sizing.network import as_text

        settings, source = self.with_arguments_folded_in(), as_text(before)
        ends = settings.target_modules
        targets = [p for p in source.linears if ends == "all-linear" or is_end(p.name.removesuffix(".weight"), ends)]
        whole = [p for p in source.parts if is_end(p.name.rpartition(".")[0], settings.modules_to_save)]
        copies = [packing.whole_copy(part) for part in whole]
        adapter = (*packing.adapters(targets, settings.r, settings.use_dora, settings.use_qalora), *copies)
        made = replace(source, parts=(*source.parts, *adapter))
        rows = settings.per_device_train_batch_size
        states = OPTIMIZER_BYTES.get(settings.optim, 8) / 4
        step = work.training(made, rows, settings.max_length, settings.r, states, settings.gradient_checkpointing)
        disk = int(2 * sum(part.opened for part in adapter) * (1 + states))
        return made, settings.trained(made, step).plus(Work(0, {}, work.PROBES * 2, disk))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        return self.with_arguments_folded_in()._apply(artifact, folder, context)

    def _apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        from transformers import set_seed

        from llmq.reopened import REPACKED, Start, meant, reopened
        from llmq.text.reach import reached, sentence, weights_of
        from llmq.text.tokenizer import copy_tokenizer
        from llmq.text.training import save_adapter

        with artifact.open(context.device) as loaded:
            set_seed(self.seed_of(context))  # the adapter begins with random values
            weights = weights_of(loaded.module)  # before PEFT wraps the layers
            model = self._with_adapter(loaded)
            # What is learned is saved under this name; PEFT itself reads the base of `peft_config` until then.
            loaded.module.name_or_path = loaded.module.config._name_or_path = _base_name(artifact, folder)
            reach = reached(model, weights)
            terminal.say(f"  {sentence(reach)}")
            # With several processes none holds the whole model; then it is only seen to open.
            alone = processes.count() == 1
            start = Start(artifact.model, model) if alone else None
            learned = self.learn(loaded, model, folder, context, save_adapter)
            saved = meant(artifact.model, model) if alone else None
            moved = start.moved(model, saved) if start and saved else {}
            del model, start  # or the trained model would stay beside the reopened one
        if processes.is_first():
            copy_tokenizer(artifact.weights, folder)  # an adapter is shared without its base
        adapted = artifact.then(self, adapter=folder, notes={"adapter": reach, **learned, **moved})
        return reopened(saved, adapted, context.device, REPACKED if artifact.packed else 0.0) if saved else adapted

    def _with_adapter(self, loaded: Loaded[LanguageModel]) -> "PeftModel":
        from peft import LoraConfig, get_peft_model

        from llmq.text.bnb_layers import keep_unpacked, stored_as
        from llmq.text.pooled import check_pools, group_of, let_pool
        from llmq.text.reach import check_ends, check_floats, expert_stacks, gates

        module = loaded.module
        keep_unpacked(module)
        if self.training_arguments.get("fsdp") or processes.sharding() == "fsdp":
            stored_as(module.dtype, module)
        all_linear = self.target_modules == "all-linear"
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        stacks = expert_stacks(module) if all_linear else []
        if stacks:
            self._check_stacks(module)
        pooled = {}
        if self.use_qalora:
            pooled["qalora_group_size"] = group_of(loaded.artifact.weights, self.qalora_group_size)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            target_parameters=stacks or None,
            exclude_modules=(gates(module) if all_linear else []) or None,
            modules_to_save=list(self.modules_to_save) or None,
            **self.model_dump(include=FOR_PEFT),
            **pooled,
        )
        if self.use_qalora:
            let_pool(config)
        names = [name for name, _ in module.named_modules()]
        check_ends("target_modules", () if isinstance(targets, str) else targets, names)
        check_ends("modules_to_save", self.modules_to_save, names)
        check_floats("modules_to_save", self.modules_to_save, module)
        try:
            model = get_peft_model(module, config)
        except ValueError as error:
            raise UserError(f"target_modules {targets!r}: {first_line(error)}") from None
        if self.use_qalora:
            check_pools(model)
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


def _base_name(base: Artifact, folder: Path) -> str:
    """The name of the base in an adapter in `folder`: the word of the recipe, or the path from `folder` to the stage.

    The name is the same in every folder that the recipe runs in. 4-bit weights keep the hub id of the float weights.
    """
    from llmq.files import portable_path
    from llmq.text.formats import is_hub_id

    name, place = str(getattr(base.model, "weights", "")), portable_path(base.weights, folder)
    of_hub = set(base.history) <= {"quantize.bnb"} and is_hub_id(name)
    return name if of_hub or Path(place).is_absolute() else place
