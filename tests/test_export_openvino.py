"""A language model as a graph of OpenVINO: the same logits, tokens and perplexity as torch, in folders of GenAI."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import apply, base_of, logits_of, some_ids
from tiny_text_models import ARCHITECTURES, build

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.matrix.grid import Quantized
from llmq.text.graph import PROVEN
from llmq.text.graph import stage as graph_stage
from llmq.text.graph.weights import in_float16

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "asymmetric": {"bits": 4, "group_size": 32, "sym": False},
    "3 bits": {"bits": 3, "group_size": 32, "sym": False},
    "8 bits, one group": {"bits": 8, "group_size": -1},
    "with the head": {"bits": 4, "group_size": 32, "sym": False, "modules": {"lm_head": {"bits": 8, "group_size": 64}}},
}


@pytest.fixture(scope="module", autouse=True)
def _tokenizers_are_converted_once() -> Iterator[None]:
    """The same tokenizer gives the same graphs."""
    stock, kept = graph_stage.write_tokenizers, dict[str, Path]()

    def once(tokenizer: Any, folder: Path) -> None:
        key = tokenizer.backend_tokenizer.to_str()
        if key not in kept:
            stock(tokenizer, folder)
            kept[key] = folder
        elif not (folder / graph_stage.TOKENIZER).exists():
            for file in kept[key].glob("openvino_*tokenizer.*"):
                shutil.copy(file, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_stage, "write_tokenizers", once)
        yield


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A Llama of 4 bits."""
    return apply("quantize.rtn", base_of(tiny_llama), tmp_path_factory.mktemp("packed"), **GRIDS["4 bits"])


@pytest.fixture(scope="module")
def exported(packed: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same as a graph."""
    return apply("export.openvino", packed, tmp_path_factory.mktemp("exported"))


def in_float32(artifact: Artifact) -> Artifact:
    """The same weights, computed in float32 by torch."""
    return base_of(artifact.weights, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", PROVEN)
def test_the_logits_of_an_architecture_are_those_of_torch(architecture: str, tiny_llama: Path, tmp_path: Path):
    base = base_of(build(architecture, tmp_path / "model", tiny_llama), "float32")
    stage = apply("export.openvino", base, tmp_path / "graph")
    assert stage.notes["logits_off_by"] < 1e-5
    ids = some_ids(2, 90)  # beyond every sliding window
    with base.open("cpu") as torch_, stage.open("cpu") as graph:
        in_float16(torch_.module)  # as they are in the graph
        meant, made = logits_of(torch_.module, ids), logits_of(graph.module, ids)
    assert float((meant - made).abs().max() / meant.abs().max()) < 1e-5


def test_a_graph_is_packed_and_says_how_far_it_is_from_torch(packed: Artifact, exported: Artifact):
    assert exported.packed
    assert exported.notes["packed_layers"] == packed.notes["quantized_layers"]
    assert exported.notes["logits_off_by"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_packed_layers_keep_their_codes(grid: str, tiny_llama: Path, tmp_path: Path):
    stage = apply("quantize.rtn", base_of(tiny_llama), tmp_path / "packed", **GRIDS[grid])
    graph = apply("export.openvino", stage, tmp_path / "graph")
    assert graph.packed
    if grid == "with the head":
        told = "4 bits in groups of 32, 8 bits in groups of 64"
        assert (stage.stored, graph.stored) == (f"{told} and bfloat16", f"{told} and float16")
    assert graph.notes["packed_layers"] == stage.notes["quantized_layers"]
    assert "finding" not in graph.notes
    assert graph.notes["logits_off_by"] < 1e-5


@pytest.mark.slow
def test_a_window_that_pages_lose_is_found_and_the_graph_keeps_its_own_state(tiny_llama: Path, tmp_path: Path):
    stages = {}
    for architecture in ("llama", "mistral", "gemma3_text"):
        base = base_of(build(architecture, tmp_path / architecture, tiny_llama), "float32")
        stages[architecture] = apply("export.openvino", base, tmp_path / f"{architecture}-graph")
    assert {"finding", "attention"}.isdisjoint(stages["llama"].notes)
    assert "beyond the window of 4096 tokens" in stages["mistral"].notes["attention"]
    assert "OpenVINO GenAI keeps keys and values in pages" in stages["gemma3_text"].notes["finding"]
    for architecture, in_pages in (("llama", True), ("mistral", False), ("gemma3_text", False)):
        with stages[architecture].open("cpu") as loaded:
            assert loaded.module.in_pages is in_pages


def test_in_pages_a_text_in_parts_has_the_same_logits_to_the_bit(exported: Artifact):
    ids = some_ids(3, 75)
    with exported.open("cpu") as loaded:
        whole = logits_of(loaded.module, ids)
        states, parts = None, []
        for begin, end in ((0, 1), (1, 40), (40, 75)):
            made = loaded.module(ids[:, begin:end], past_key_values=states, use_cache=True)
            states = made.past_key_values
            parts.append(made.logits)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(logits_of(loaded.module, ids[1:2]), whole[1:2])


@pytest.mark.parametrize("uneven", [False, True])
def test_codes_out_of_order_are_put_in_order_or_become_floats(uneven: bool):
    from llmq.openvino_runtime import core, openvino
    from llmq.text.graph.weights import is_exact, product

    torch.manual_seed(0)
    groups = torch.randperm(64) % 4
    groups[groups.argmax()] -= int(uneven)
    made = Quantized(
        torch.randint(16, (64, 8), dtype=torch.uint8), torch.rand(4, 8), torch.randint(16, (4, 8)), groups.int(), 4
    )
    assert is_exact(made) is not uneven
    if not uneven:
        op = openvino().opset13
        given = op.parameter([-1, 64])
        graph = openvino().Model([product(given, made, torch.ones(8))], [given])
        x = torch.randn(3, 64)
        told = torch.from_numpy(core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0])
        wanted = Quantized(made.codes, made.scales.half(), made.zeros, made.g_idx, 4)
        assert torch.allclose(told, x @ wanted.weight().t() + 1, atol=1e-4)


def test_it_answers_like_torch_in_batches_with_padding_and_beams(packed: Artifact, exported: Artifact):
    ids = some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with in_float32(packed).open("cpu") as one, exported.open("cpu") as other:
        for more in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}):
            meant, made = (m.module.generate(ids, **settings, **more) for m in (one, other))
            assert torch.equal(meant, made)
        last = other.module(ids, logits_to_keep=1).logits
        assert last.shape[1] == 1
        assert torch.allclose(last, logits_of(other.module, ids)[:, -1:], atol=1e-5)


def test_states_are_cut_back_and_belong_to_one_text(exported: Artifact):
    first, second = some_ids(2, 12)[:, None]
    with exported.open("cpu") as loaded:
        states = loaded.module(first[:, :8], use_cache=True).past_key_values
        loaded.module(second, use_cache=True)  # another text, which has states of its own
        once = loaded.module(first[:, 8:], past_key_values=states).logits
        states.crop(-4)
        again = loaded.module(first[:, 8:], past_key_values=states).logits
        assert torch.equal(once, again)
        assert torch.allclose(once, logits_of(loaded.module, first)[:, 8:], atol=1e-5)


@pytest.fixture(params=["in pages", "in states"])
def graph(request, exported: Artifact, monkeypatch) -> Iterator[Any]:
    """The exported graph, its keys and values held in each of both ways."""
    if request.param == "in states":
        monkeypatch.setattr("llmq.text.graph.module.to_pages", lambda *_: False)
    with exported.open("cpu") as loaded:
        assert loaded.module.in_pages is (request.param == "in pages")
        yield loaded.module


def test_a_batch_that_begins_with_padding_alone_goes_on_like_torch(packed: Artifact, graph: Any):
    ids, mask = some_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[:, :4] = 0
    states = graph(ids[:, :4], mask[:, :4], use_cache=True).past_key_values
    assert states.get_seq_length() == 4
    made = graph(ids[:, 4:], mask, past_key_values=states).logits
    with in_float32(packed).open("cpu") as loaded, torch.inference_mode():
        meant = loaded.module(ids[:, 4:]).logits
    assert torch.allclose(made, meant, atol=1e-4)


def test_a_later_mask_that_hides_what_was_read_is_heeded_or_refused(graph: Any):
    ids, mask = some_ids(1, 9), torch.ones(1, 9, dtype=torch.long)
    states = graph(ids[:, :6], use_cache=True).past_key_values
    mask[:, :3] = 0
    places = torch.arange(6, 9)[None]
    if graph.in_pages:
        with pytest.raises(LlmqError, match=r"mask of 6 earlier tokens .* begin the text anew"):
            graph(ids[:, 6:], mask, places, states)
    else:
        shown = graph(ids, torch.ones_like(mask)).logits[:, 6:]
        assert (graph(ids[:, 6:], mask, places, states).logits - shown).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 3])
def test_other_rows_than_those_of_the_text_before_are_refused(rows: int, graph: Any):
    ids = some_ids(3, 9)
    states = graph(ids[:2, :6], use_cache=True).past_key_values
    with pytest.raises(LlmqError, match=rf"{rows} rows .* 2 "):
        graph(ids[:rows, 6:], past_key_values=states)
    states.reorder_cache(torch.tensor([0, 1, 1])[:rows])
    made = graph(ids[:rows, 6:], past_key_values=states).logits
    before = torch.cat([ids[:2, :6], ids[1:2, :6]])[:rows]
    assert torch.allclose(made, graph(torch.cat([before, ids[:rows, 6:]], 1)).logits[:, 6:], atol=1e-5)


@pytest.mark.slow
def test_perplexity_and_size_are_those_of_the_dequantized_weights(packed: Artifact, exported: Artifact):
    task: Any = plugin.build({"perplexity": {"limit": 2, "window": 128}}, "tasks")
    size: Any = plugin.build({"size": {}}, "tasks")
    figures = []
    for artifact in (in_float32(packed), exported):
        with artifact.open("cpu") as loaded:
            counted = {m.metric: m.value for m in size.score(loaded)}
            figures.append((next(iter(task.score(loaded))).value, counted["bytes_in_memory"]))
    assert figures[1][0] == pytest.approx(figures[0][0], rel=1e-3)
    assert figures[1][1] < figures[0][1]


def test_figures_say_the_precision_and_are_compared(packed: Artifact, exported: Artifact, tmp_path: Path):
    from llmq.artifact import Stage
    from llmq.judge.protocols import unlike
    from llmq.questions import question

    task: Any = plugin.build({"perplexity": {"limit": 1, "window": 64}}, "tasks")
    told = [
        question(Stage(n, a), [task], tmp_path, "cpu", packed).measurements[0]
        for n, a in (("0", packed), ("1", exported))
    ]
    assert told[1].convention.endswith("; openvino at float32")
    assert not unlike(told[1], told[0])


@pytest.mark.slow
def test_genai_writes_the_tokens_that_torch_writes(packed: Artifact, exported: Artifact):
    from llmq.openvino_runtime import openvino

    openvino()
    import openvino_genai

    prompt = "The while statement is used"
    settings = openvino_genai.GenerationConfig(max_new_tokens=32, do_sample=False, apply_chat_template=False)
    pipe = openvino_genai.LLMPipeline(str(exported.weights), "CPU")
    ids = pipe.get_tokenizer().encode(prompt).input_ids
    with in_float32(packed).open("cpu") as loaded:
        given = loaded.processor(prompt, return_tensors="pt")
        assert given["input_ids"].tolist() == ids.data.tolist()
        meant = loaded.module.generate(**given, max_new_tokens=32, do_sample=False, pad_token_id=0)
    made = pipe.generate(ids, settings).tokens[0]
    assert made == meant[0, ids.shape[1] :].tolist()[: len(made)]
    assert len(made) >= 8


@pytest.mark.parametrize("architecture", ["mixtral", pytest.param("mamba", marks=pytest.mark.slow)])
def test_an_architecture_that_fails_is_refused_by_name(architecture: str, tiny_llama: Path, tmp_path: Path):
    base = base_of(build(architecture, tmp_path / "model", tiny_llama), "float32")
    with pytest.raises(UserError, match=f"'{architecture}'.*what works is .*llama.*qwen3"):
        apply("export.openvino", base, tmp_path / "graph")
    assert not list((tmp_path / "graph").iterdir())


def test_positions_that_change_with_the_length_are_refused(tiny_llama: Path, tmp_path: Path):
    from llmq.text.graph import graph_of
    from llmq.text.opening import load_causal_lm

    module = load_causal_lm(tiny_llama, "float32", "cpu")
    module.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="'dynamic'"):
        graph_of(module)


@pytest.mark.slow
def test_a_graph_with_other_logits_is_an_error_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(graph_stage, "largest_error", lambda module, graph: 0.2)
    with pytest.raises(LlmqError, match=r"off by 2.0e-01 of the largest"):
        apply("export.openvino", base_of(tiny_llama), tmp_path / "graph")
    assert not list((tmp_path / "graph").iterdir())


@pytest.mark.slow
def test_nf4_becomes_float16_and_says_so(tiny_llama: Path, tmp_path: Path):
    stage = apply("export.openvino", apply("quantize.bnb", base_of(tiny_llama), tmp_path / "nf4"), tmp_path / "graph")
    assert not stage.packed
    assert "became float16" in stage.notes["finding"]
    assert stage.notes["logits_off_by"] < 1e-5


def test_every_proven_architecture_is_tried():
    assert set(PROVEN) <= set(ARCHITECTURES)
