"""Training the scales of a GPTQ checkpoint against a teacher's logits, codes frozen (EfficientQAT, Chen et al. 2024).

The teacher answers once. Of each token its `TOP` likeliest followers are kept, in memory-mapped files, and the rest as
one: the loss is the KL divergence of the student's distribution over these from the teacher's.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmq.errors import UserError
from llmq.files import BESIDE
from llmq.guarded.weights import safetensors_of
from llmq.matrix.gptq_format import TENSORS, from_tensors
from llmq.matrix.grid import LARGEST, Quantized
from llmq.matrix.packed_linear import PackedLinear
from llmq.terminal import track
from llmq.text.blockwise import write
from llmq.text.formats import quantization
from llmq.text.names import stored
from llmq.text.training import PackedTrainer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

TOP = 64
ANSWER = np.dtype([("token", "<i4"), ("log_probability", "<f4")])
LEAST = 1e-7
"""The least probability of all other tokens together: a logarithm needs one."""


class TunedLinear(nn.Module):
    """A quantized linear layer whose scales are multiplied by `1 + change`, which is trained; codes stay."""

    def __init__(self, made: Quantized, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.bias, self.dtype = bias, dtype
        self.groups = made.g_idx.long()  # (inputs,)
        zeros = made.zeros.to(torch.int16)[self.groups]  # (inputs, outputs)
        self.levels = made.codes.to(torch.int16).sub_(zeros)  # codes less their zeros (inputs, outputs)
        self.levels = self.levels.to(torch.int8) if made.bits < 8 else self.levels
        self.scales = made.scales.float()  # (groups, outputs)
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = _Product.apply(rows, self.change, self)
        return made if self.bias is None else made + self.bias

    def tuned(self) -> Tensor:
        """The scales `(groups, outputs)` as trained, in float32."""
        return self.scales * (1 + self.change.detach())

    def rows(self, scales: Tensor) -> Tensor:
        """The weight `(inputs, outputs)` for these scales, rounded once to the dtype of the products."""
        return (self.levels.float() * scales[self.groups]).to(self.dtype)

    def by_group(self, gradient: Tensor) -> Tensor:
        """The gradient of `change` from that of the weight `(inputs, outputs)`."""
        shares = gradient.float().mul_(self.levels)
        return torch.zeros_like(self.scales).index_add_(0, self.groups, shares).mul_(self.scales)


class _Product(torch.autograd.Function):
    """The product with a weight that is made for the moment, forward and backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, change: Tensor, layer: TunedLinear) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.layer = layer
        return rows @ layer.rows(layer.tuned()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (rows,), layer = ctx.saved_tensors, ctx.layer
        of_rows = gradient @ layer.rows(layer.tuned()).to(rows.dtype).t() if ctx.needs_input_grad[0] else None
        of_weight = rows.flatten(0, -2).t() @ gradient.flatten(0, -2)  # (inputs, outputs)
        return of_rows, layer.by_group(of_weight), None


def quantized(folder: Path, module: PreTrainedModel, weights: Container[str] | None = None) -> dict[str, Quantized]:
    """The quantized matrices of the packed layers of an open model, from the GPTQ folder that holds them.

    Of the layers of these `weights` alone, if they are given.

    Raises `UserError` for a folder of another format.
    """
    settings = quantization(folder) or {}
    if settings.get("quant_method") != "gptq":
        raise UserError(
            f"the scales of GPTQ's format are trained, and {str(folder)!r} is packed by {settings.get('quant_method')}"
        )
    places = stored(folder, module)
    made = {}
    for name, (file, key) in places.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "qweight" and (weights is None or f"{layer}.weight" in weights):
            with safe_open(file, "pt") as opened:
                owner = key.removesuffix("qweight")
                tensors = {part: opened.get_tensor(f"{owner}{part}") for part in TENSORS}
            bits = len(tensors["qweight"]) * 32 // len(tensors["g_idx"])
            made[layer] = from_tensors(tensors, bits, str(settings.get("checkpoint_format", "gptq")))
    return made


def write_with(scales: Mapping[str, Tensor], source: Path, module: PreTrainedModel, folder: Path) -> None:
    """Write the GPTQ folder `source` to `folder` with other scales, by layer; every file is compared once written."""
    places = stored(source, module)
    keys = {places[f"{layer}.scales"][1]: tensor for layer, tensor in scales.items()}
    for file in safetensors_of(source):
        with safe_open(file, "pt") as opened:
            tensors = {key: keys.get(key, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
        write(tensors, folder / file.name)
    for other in source.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and other.name not in BESIDE:
            shutil.copyfile(other, folder / other.name)


class Student(nn.Module):
    """A model whose packed layers are tuned; its parameters, and so its checkpoints, are the changes alone."""

    def __init__(self, module: PreTrainedModel, quantized: Mapping[str, Quantized], temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
        self._model = (module,)  # in a tuple, so no submodule
        self.layers: dict[str, TunedLinear] = {}
        for name, made in quantized.items():
            packed = module.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            self.layers[name] = TunedLinear(made, packed.bias, packed.compute_dtype).to(module.device)
            module.set_submodule(name, self.layers[name])
        self.changes = nn.ParameterDict({name.replace(".", "/"): layer.change for name, layer in self.layers.items()})

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits `(windows, tokens, vocabulary)` in float32, by the temperature."""
        logits: Tensor = self._model[0](input_ids=input_ids, use_cache=False).logits
        return logits.float() / self.temperature

    def moved(self) -> dict[str, object]:
        """The notes on the training: its scales, and the root mean square of their relative changes."""
        changes = torch.cat([layer.change.detach().flatten() for layer in self.layers.values()])
        return {"scales": changes.numel(), "scales_moved_by": float(f"{float(changes.square().mean().sqrt()):.3g}")}

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The scales to be stored, by layer, which this model then computes with: numbers of float16 above 0."""
        stored = {name: layer.tuned().half().clamp(2.0**-24, LARGEST) for name, layer in self.layers.items()}
        for name, scales in stored.items():
            self.layers[name].scales = scales.float()
            self.layers[name].change.zero_()
        return stored


def answers(module: PreTrainedModel, windows: Sequence[Sequence[int]], temperature: float, file: Path) -> None:
    """Write for each token of windows of one length its `TOP` likeliest followers, and their log probabilities."""
    shape = len(windows), len(windows[0]), min(TOP, module.config.get_text_config().vocab_size - 1)
    partial_file = file.with_name(f".{file.name}.partial")
    kept = np.lib.format.open_memmap(partial_file, "w+", ANSWER, shape)
    with torch.inference_mode():
        for i, window in enumerate(track(windows, "teacher")):
            logits = module(input_ids=torch.tensor([window], device=module.device), use_cache=False).logits[0].float()
            best = (logits / temperature).log_softmax(-1).topk(shape[-1])  # (tokens, TOP) each
            kept[i]["token"], kept[i]["log_probability"] = best.indices.cpu().numpy(), best.values.cpu().numpy()
    kept.flush()
    partial_file.replace(file)


class Lessons:
    """Numbers of windows -> a batch: the tokens, and the teacher's answers to them, from a memory-mapped file."""

    def __init__(self, windows: Sequence[Sequence[int]], file: Path):
        self.windows = windows
        self.kept: NDArray[np.float32] = np.load(file, mmap_mode="r")

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        ids = torch.tensor([self.windows[i] for i in numbers])  # (windows, tokens)
        kept = self.kept[list(numbers)]  # (windows, tokens, TOP)
        told = {"wanted": torch.from_numpy(kept["token"].astype(np.int64))}
        told["log_p"] = torch.from_numpy(kept["log_probability"].copy())
        return {"input_ids": ids, "labels": ids, **told, "tokens": torch.tensor(ids.numel())}


def divergence(logits: Tensor, wanted: Tensor, log_p: Tensor) -> Tensor:
    """The mean KL divergence over tokens in nats, over `wanted` tokens and all others as one.

    logits (…, vocabulary) of the student, by the temperature; wanted and log_p (…, TOP) of the teacher.
    """
    log_q = logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True)  # (…, TOP)
    p = log_p.exp()
    rest_p, rest_q = ((1 - each.sum(-1)).clamp_min(LEAST) for each in (p, log_q.exp()))  # (…)
    return ((p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()


class ScaleTrainer(PackedTrainer):
    """The trainer of a `Student`, by the divergence from the teacher's answers."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        if model.training:
            self.tokens_seen += int(inputs["tokens"])
        return divergence(model(inputs["input_ids"]), inputs["wanted"], inputs["log_p"])
