"""Trains all weights of a float language model, alone or taught by the untouched base (distillation).

Rows, loss, resume and determinism are those of `adapt.lora`. Weights, gradients and moments are float32, products in
the model's dtype, in which the trained weights are saved. It is a word of its own because it leaves no adapter: a
stage that learned whole weights is packed or exported as it is. Weights that pruning set to zero get no gradient.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PositiveFloat

from llmq import processes, terminal
from llmq.artifact import Artifact
from llmq.checkpoints import KEPT
from llmq.errors import UserError
from llmq.sparsity import was_pruned
from llmq.text.family import LanguageModel
from llmq.text.tuning import OPTIMIZER_BYTES, Tuning
from llmq.types import Context

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmq.sketch import Sketch, Work
    from llmq.text.training import PackedTrainer

SHARDED = ("fsdp", "deepspeed")
"""Arguments that share weights out among processes, where none could save them whole."""


class Full(Tuning):
    requires: ClassVar[Mapping[str, bool]] = {"packed": False, "adapter": False}

    learning_rate: PositiveFloat = 5e-5
    keep_sparsity: bool | None = Field(
        None, description="weights that are zero stay zero; if unset, where single weights were pruned before"
    )

    def check(self) -> None:
        super().check()
        if shared := [name for name in SHARDED if self.training_arguments.get(name)]:
            raise UserError(f"training_arguments: {shared[0]} shares weights out; adapt.lora trains so, adapt.full not")
        if engine := processes.sharding():
            raise UserError(f"accelerate's {engine} shares weights out; adapt.lora trains so, adapt.full not")

    def space(self, artifact: Artifact[LanguageModel]) -> int:
        """The bytes of the weights, and in float32 of weights and two moments in each checkpoint."""
        from llmq.guarded.weights import header, safetensors_of

        shapes = [entry.shape for file in safetensors_of(artifact.weights) for entry in header(file).values()]
        return super().space(artifact) + sum(map(prod, shapes)) * 4 * 3 * (KEPT + 1)

    def foresee(self, before: "Sketch") -> "tuple[Sketch, Work]":
        """The same tensors, trained: weights, gradients, the optimizer's numbers and activations are there at once."""
        from llmq.sketch import Work
        from llmq.text.sizing import work
        from llmq.text.sizing.network import as_text

        settings, source = self.with_arguments_folded_in(), as_text(before)
        states = OPTIMIZER_BYTES.get(settings.optim, 8) / 4
        rows, length = settings.per_device_train_batch_size, settings.max_length
        step = work.training_whole(source, rows, length, states, settings.gradient_checkpointing)
        disk = int((KEPT + 1) * 4 * source.parameters * (1 + states))
        return before, settings.trained(source, step).plus(Work(0, {}, work.PROBES * 2, disk))

    def apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        return self.with_arguments_folded_in()._apply(artifact, folder, context)

    def _apply(self, artifact: Artifact[LanguageModel], folder: Path, context: Context) -> Artifact:
        import torch
        from transformers import set_seed

        from llmq.reopened import Start, meant, reopened
        from llmq.text.names import save
        from llmq.text.opening import as_opened_in
        from llmq.text.tokenizer import copy_tokenizer

        with artifact.open(context.device) as loaded:
            set_seed(self.seed_of(context))
            module: PreTrainedModel = loaded.module.requires_grad_(True)
            start = Start(artifact.model, module)  # before the weights are widened
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
            zeros = self._held_at_zero(artifact, module)
            uses_cache = module.config.use_cache

            def keep(trainer: "PackedTrainer") -> None:
                trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
                trained = loaded.module
                trained.config.use_cache = uses_cache
                as_opened_in(getattr(torch, artifact.model.dtype), trained)
                _fill(trained, zeros)
                if processes.is_first():
                    save(trained, folder)
                    copy_tokenizer(artifact.weights, folder)

            learned = self.learn(loaded, module, folder, context, keep)
            saved = meant(artifact.model, module)
            moved = start.moved(module, saved)
            del module, start  # or the trained model would stay beside the reopened one
        held = {"held_at_zero": sum(int(places.sum()) for places in zeros.values())} if zeros else {}
        trained = artifact.then(self, weights=folder, notes={**learned, **held, **moved})
        return reopened(saved, trained, context.device) if processes.is_first() else trained

    def _held_at_zero(self, artifact: Artifact[LanguageModel], module: "PreTrainedModel") -> "dict[str, Tensor]":
        """The places of the zeros in each matrix that are to stay, by name, without a gradient from now on.

        An optimizer with moments in 8 bits moves weights of no gradient as well, so a forward pass sets them back.
        """
        if not (was_pruned(artifact.history) if self.keep_sparsity is None else self.keep_sparsity):
            return {}
        matrices = {name: p for name, p in module.named_parameters() if p.ndim > 1}
        zeros = {name: places for name, p in matrices.items() if (places := p.detach() == 0).any()}
        for name, places in zeros.items():
            matrices[name].register_hook(lambda gradient, places=places: gradient.masked_fill(places, 0))
        module.register_forward_pre_hook(lambda *_: _fill(module, zeros))
        terminal.say(f"  the zeros of {len(zeros)} matrices stay zero")
        return zeros


def _fill(module: "PreTrainedModel", zeros: "Mapping[str, Tensor]") -> None:
    for name, places in zeros.items():
        module.get_parameter(name).data.masked_fill_(places, 0)
