"""The folder of a language model for OpenVINO: the graph, tokenizers as graphs, and the files of transformers beside.

OpenVINO GenAI and OpenVINO Model Server open such a folder as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmq.environment import library_version
from llmq.errors import LlmqError, UserError
from llmq.files import write_json
from llmq.guarded.files import read_json_object
from llmq.matrix.packed_linear import PackedLinear
from llmq.openvino_runtime import LANGUAGE_GRAPH, PRECISIONS, core, last_line, openvino, quietly, write_graph
from llmq.text.bnb_layers import dequantized
from llmq.text.formats import KEYS, quantization
from llmq.text.graph import graph_of, takes_positions, works
from llmq.text.graph.module import GraphModel
from llmq.text.graph.pages import PLACE
from llmq.text.graph.weights import compress, is_exact
from llmq.text.linear_view import Experts, is_fused
from llmq.text.opening import load_causal_lm, without_weights
from llmq.text.tokenizer import copy_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from openvino import Model as Graph
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmq.artifact import Artifact

PARITY = 1e-3
"""The largest error of the logits that passes, as a share of the largest logit."""
COMPARED = 2048
"""The longest sliding window beyond which logits are compared."""
TOKENIZER, DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
SAMPLES = ("The quick brown fox, 12,345 times:\n\tdef f(x): return x", "Ünïcödé – 你好, мир 🙂", " two  spaces ", "a")
"""Texts that both tokenizers must encode alike."""


def check_network(folder: Path) -> None:
    """Raise `UserError` for a network with experts: which of them a token takes cannot be traced."""
    network = without_weights(folder)
    if any(is_fused(layer) or isinstance(layer, Experts) for layer in network.modules()):
        raise UserError(f"{network.config.model_type!r} has experts, and no graph of OpenVINO picks them; {works()}")


def write_stage(artifact: Artifact, folder: Path, precision: str) -> dict[str, object]:
    """Write the folder of a stage in torch to `folder`, compare both, and return the notes.

    Raises `UserError` for an architecture that fails, and `LlmqError` for logits that differ; then nothing is left.
    """
    check_network(artifact.weights)
    module = load_causal_lm(artifact.weights, "float32", "cpu")
    told = quantization(artifact.weights) or {}
    module = dequantized(module) if told.get("quant_method") == "bitsandbytes" else module
    lost = list(_unpack_odd(module))
    graph = graph_of(module)
    compress(graph)
    for name, value in PRECISIONS[precision].items():
        graph.set_rt_info(value, ["runtime_options", name])
    try:
        write_graph(graph, folder / LANGUAGE_GRAPH)
        _write_beside(artifact.weights, folder, module)
        notes = _compared(module, graph, folder, precision)
    except (LlmqError, OSError):
        for file in folder.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        raise
    return {**_notes(module, told, lost), "precision": precision, **notes}


def _unpack_odd(module: PreTrainedModel) -> Iterator[str]:
    """Turn packed layers that a graph cannot hold as they are into float32 layers; their names."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, PackedLinear) and not is_exact(layer.quantized()):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.weight = torch.nn.Parameter(layer.weight.contiguous(), requires_grad=False)
            dense.bias = layer.bias
            module.set_submodule(name, dense)
            yield name


def _notes(module: PreTrainedModel, told: dict[str, object], lost: list[str]) -> dict[str, object]:
    """The facts of an export, with a finding where weights were packed and are no longer."""
    packed = [layer for layer in module.modules() if isinstance(layer, PackedLinear)]
    notes: dict[str, object] = {
        "format": "OpenVINO IR",
        "openvino": library_version("openvino"),
        "packed_layers": len(packed),
    }
    config, text = module.config, module.config.get_text_config()
    if beside := [name for name in config.sub_configs if getattr(config, name) is not text]:
        notes["left_out"] = f"{', '.join(beside)} of {config.model_type}: the graph holds the language model alone"
    if any(layer.bits < 4 for layer in packed):
        notes["stored_bits"] = "codes of 2 and 3 bits take 4 in the graph"
    if told.get("quant_method") == "bitsandbytes":
        notes["finding"] = "the weights of bitsandbytes became float16: no graph of OpenVINO holds their codes"
    elif lost:
        notes["finding"] = f"{len(lost)} packed layers became float16, {lost[0]} first: their groups differ in size"
    return notes


def _write_beside(source: Path, folder: Path, module: PreTrainedModel) -> None:
    """Write the tokenizers as graphs, and the files that transformers reads."""
    copy_tokenizer(source, folder)
    for file in folder.glob("*.py"):  # the graph needs no code
        file.unlink()
    config = read_json_object(source / "config.json")
    for place in (config, config.get("text_config")):
        for key in KEYS:
            if isinstance(place, dict):
                place.pop(key, None)
    write_json(folder / "config.json", config)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    else:
        module.generation_config.save_pretrained(folder)  # GenAI looks there for the token that ends a text
    write_tokenizers(load_tokenizer(source), folder)


def write_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as two graphs. Raises `LlmqError` if they encode a sample otherwise than the tokenizer does."""
    openvino()  # first: it keeps the libraries from reporting home
    import openvino_tokenizers

    try:
        with quietly():
            encoder, decoder = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True)
            run = core().compile_model(encoder, "CPU")
    except Exception as error:  # noqa: BLE001 - the converter raises of any kind
        raise LlmqError(
            f"the tokenizer {type(tokenizer).__name__} cannot be converted for OpenVINO: {last_line(error)}"
        ) from None
    for text in SAMPLES:
        made, meant = run([text])["input_ids"][0].tolist(), list(tokenizer(text)["input_ids"])
        if made != meant:
            raise LlmqError(
                f"the tokenizer {type(tokenizer).__name__} was converted wrongly: {text!r} has tokens "
                f"{made[:8]} there and {meant[:8]} here"
            )
    write_graph(encoder, folder / TOKENIZER)
    write_graph(decoder, folder / DETOKENIZER)


def _compared(module: PreTrainedModel, graph: Graph, folder: Path, precision: str) -> dict[str, object]:
    """The largest error of the logits from the folder. Raises `LlmqError` above `PARITY` with exact arithmetic.

    A graph that is wrong with its keys and values in pages is marked, so that it runs with its own state.
    """
    file = folder / LANGUAGE_GRAPH
    notes: dict[str, object] = {}
    window = _window(module)
    run = GraphModel(file, module.config, "f32")
    exact = largest_error(module, run)
    if run.in_pages and window > COMPARED:
        notes["attention"] = f"not in pages, which were not compared beyond the window of {window} tokens"
    elif run.in_pages and not exact <= PARITY:
        notes["finding"] = (
            "OpenVINO GenAI keeps keys and values in pages, where the logits of this graph are off by "
            f"{exact:.1e} of the largest (window: {window or 'all'} tokens)"
        )
    if notes:
        graph.set_rt_info("stateful", PLACE)
        write_graph(graph, file)
        exact = largest_error(module, GraphModel(file, module.config, "f32"))
    if not exact <= PARITY:  # so that NaN fails, too
        raise LlmqError(
            f"{module.config.model_type!r} was exported wrongly: the logits of the graph are off by {exact:.1e} of the "
            f"largest, more than {PARITY:g}; {works()}"
        )
    notes["logits_off_by"] = float(f"{exact:.2g}")
    if precision != "f32":
        fast = largest_error(module, GraphModel(folder / LANGUAGE_GRAPH, module.config, precision))
        notes["logits_off_by_at_this_precision"] = float(f"{fast:.2g}")
    return notes


def _window(module: PreTrainedModel) -> int:
    """The most tokens that the layers with a sliding window see; 0 without such layers."""
    config = module.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(getattr(config, "sliding_window", None) or 0) if slides else 0


def largest_error(module: PreTrainedModel, graph: GraphModel) -> float:
    """The largest difference of the logits of two rows, one of them padded on the left, as a share of the largest.

    The graph is given the tokens in three parts, and must go on from the keys and values of the parts before. Rows are
    longer than a sliding window that is short enough to be compared.
    """
    vocabulary = module.config.get_text_config().vocab_size
    window = _window(module)
    length = 24 + (window if window <= COMPARED else 0)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    placed = {"position_ids": positions} if takes_positions(module) else {}
    with torch.inference_mode():
        meant = module(input_ids=ids, attention_mask=mask, use_cache=False, **placed).logits.float()
        states, made = None, []
        for begin, end in ((0, length - 7), (length - 7, length - 6), (length - 6, length)):
            out = graph(ids[:, begin:end], mask[:, :end], positions[:, begin:end], states, use_cache=True)
            states = out.past_key_values
            made.append(out.logits)
    seen = mask.bool()
    return float((torch.cat(made, 1) - meant)[seen].abs().max() / meant[seen].abs().max())
