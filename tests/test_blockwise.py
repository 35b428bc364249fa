"""The walk through a model block by block, and the steps that take it, against plain transformers."""

import json

import pytest
import torch
from helpers import apply, base_of, logits_of, reshaped, some_ids
from safetensors import safe_open

from llmq.layers import LayerChange
from llmq.matrix.gptq_format import TENSORS, from_tensors
from llmq.matrix.gram import TILE, Gram
from llmq.text import blockwise
from llmq.text.blockwise import rewrite
from llmq.text.grids import Gptq
from llmq.text.skeleton import Skeleton

WINDOWS = some_ids(5, 48).tolist()
FEW = {"samples": 3, "length": 40}
STEPS = {
    "quantize.rtn": {"bits": 4, "group_size": 32},
    "quantize.gptq": {**FEW, "bits": 3, "group_size": 32, "sym": False},
    "prune.magnitude": {},
    "prune.wanda": {**FEW, "pattern": "2:4"},
    "prune.sparsegpt": {**FEW, "sparsity": 0.3},
    "prune.alps": {**FEW, "sparsity": 0.3},
    "prune.layers": {**FEW, "drop": 1},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two windows a batch, so that several passes go in lockstep."""
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", 100)


class Scaling(LayerChange):
    """A change that scales each weight by `factor`, and notes what it was asked."""

    def __init__(self, factor=1.0, gathers="hessian", head=False, killed_at=None):
        super().__init__({})
        self.factor, self.gathers, self.head, self.killed_at = factor, gathers, head, killed_at
        self.calls = []

    def wants(self, layer):
        return self.head or "layers" in layer

    def change(self, layers, gathered):
        if self.killed_at and any(layer.endswith(self.killed_at) for layer in layers):
            raise KeyboardInterrupt
        self.calls.append((list(layers), None if gathered is None else gathered.clone()))
        return {layer: {"weight": weight * self.factor} for layer, weight in layers.items()}


def rewritten(source, folder, method, windows=WINDOWS, sequential=True, dtype="float32"):
    folder.mkdir(exist_ok=True)
    rewrite(Skeleton(source, dtype), folder, method, windows, sequential)
    return method


def stored(folder):
    """Every tensor in a folder's safetensors files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def dense(folder, dtype="float32"):
    """The model in plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def gram(module, layers):
    """`X^T X` of the inputs of some layers over all windows, by a plain forward pass."""
    sums = dict.fromkeys(layers, 0)

    def add(name, inputs):
        flat = inputs.flatten(0, -2).double()
        sums[name] += flat.t() @ flat

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in layers
    ]
    logits_of(module, torch.tensor(WINDOWS))
    for hook in hooks:
        hook.remove()
    return sums


def scale(module, layers, factor):
    for layer in layers:
        module.get_submodule(layer).weight.data *= factor


def block_of(layers):
    return layers[0].partition(".self_attn")[0].partition(".mlp")[0]


@pytest.mark.parametrize(
    ("gathers", "sequential", "head"),
    [(None, True, True), ("squares", True, False), ("hessian", True, True), ("hessian", False, False)],
)
def test_doing_nothing_writes_the_same_bytes(gathers, sequential, head, tiny_llama, tmp_path):
    rewritten(tiny_llama, tmp_path / "out", Scaling(1, gathers, head), sequential=sequential, dtype="bfloat16")
    before, after = stored(tiny_llama), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"num_hidden_layers": 1}])
def test_tied_weights_and_biases_are_kept_as_they_were(changes, tiny_llama, tmp_path):
    source = reshaped(tiny_llama, tmp_path / "model", **changes)
    rewritten(source, tmp_path / "out", Scaling(), dtype="bfloat16")
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_that_share_their_input_are_changed_together_in_the_order_they_are_reached(
    sequential, tiny_llama, tmp_path
):
    method = rewritten(tiny_llama, tmp_path / "out", Scaling(head=True), sequential=sequential)
    together = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]
    together += ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
    expected = [[f"model.layers.{i}.{layer}" for layer in group] for i in range(2) for group in together]
    assert [layers for layers, _ in method.calls] == [*expected, ["lm_head"]]


def test_a_layer_that_is_not_wanted_is_left_out_of_its_group(tiny_llama, tmp_path):
    method = Scaling(2.0)
    method.wants = lambda layer: layer.endswith(("k_proj", "layers.1.mlp.down_proj"))
    rewritten(tiny_llama, tmp_path / "out", method)
    wanted = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)] + ["model.layers.1.mlp.down_proj"]
    assert [layers for layers, _ in method.calls] == [[layer] for layer in wanted]
    before, after = stored(tiny_llama), stored(tmp_path / "out")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.float() * (2 if name.removesuffix(".weight") in wanted else 1)), name


def test_in_sequence_a_layer_sees_what_became_of_all_before_it(tiny_llama, tmp_path):
    method = rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, head=True))
    module = dense(tiny_llama)
    for layers, hessian in method.calls:
        for expected in gram(module, layers).values():
            torch.testing.assert_close(hessian.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
        scale(module, layers, 0.5)


def test_not_in_sequence_it_sees_its_own_block_unchanged(tiny_llama, tmp_path):
    method = rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, head=True), sequential=False)
    module, calls = dense(tiny_llama), method.calls
    for block in dict.fromkeys(block_of(layers) for layers, _ in calls):
        own = [(layers, hessian) for layers, hessian in calls if block_of(layers) == block]
        sums = gram(module, [layer for layers, _ in own for layer in layers])
        for layers, hessian in own:
            for layer in layers:
                expected = sums[layer]
                torch.testing.assert_close(hessian.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
            scale(module, layers, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 4 * TILE + 70])
def test_the_gram_matrix_is_whole_however_many_tiles_it_is_made_of(width, dtype):
    batches = torch.randn(3, 2, 17, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    gathered = {what: Gram(what) for what in ("hessian", "squares")}
    for batch in batches:
        for sums in gathered.values():
            sums.add(batch)
    flat = batches.reshape(-1, width).double()
    exact = flat.t() @ flat
    torch.testing.assert_close(gathered["hessian"].total().double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gathered["squares"].total().double(), exact.diagonal(), rtol=1e-5, atol=1e-4)


def test_squares_are_the_diagonal_of_the_hessian(tiny_llama, tmp_path):
    whole = rewritten(tiny_llama, tmp_path / "a", Scaling(0.5))
    squares = rewritten(tiny_llama, tmp_path / "b", Scaling(0.5, "squares"))
    for (layers, hessian), (same, diagonal) in zip(whole.calls, squares.calls, strict=True):
        assert layers == same
        torch.testing.assert_close(hessian.diagonal(), diagonal)
        assert torch.equal(hessian, hessian.t())


def test_the_number_of_windows_in_a_batch_changes_nothing(tiny_llama, tmp_path, monkeypatch):
    by_two = rewritten(tiny_llama, tmp_path / "a", Scaling(0.5))
    monkeypatch.setattr(blockwise, "BATCH_TOKENS", 2048)
    at_once = rewritten(tiny_llama, tmp_path / "b", Scaling(0.5))
    for (_, mine), (_, its) in zip(by_two.calls, at_once.calls, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4 * float(its.max()))


def test_one_block_is_in_memory_at_a_time(tiny_llama, tmp_path):
    source, seen = Skeleton(reshaped(tiny_llama, tmp_path / "model", num_hidden_layers=4), "float32"), []

    class Looking(Scaling):
        def change(self, layers, gathered):
            seen.append([b for b in source.blocks if any(not p.is_meta for p in parameters(b))])
            return super().change(layers, gathered)

    def parameters(block):
        return source.module.get_submodule(block).parameters()

    (tmp_path / "out").mkdir()
    rewrite(source, tmp_path / "out", Looking(0.5), WINDOWS)
    assert seen == [[block] for block in source.blocks for _ in range(4)]
    assert all(p.is_meta for block in source.blocks for p in parameters(block))


@pytest.mark.parametrize(
    "killed_at", ["layers.0.mlp.up_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head"]
)
@pytest.mark.parametrize(("gathers", "sequential"), [("hessian", True), ("hessian", False), (None, True)])
def test_a_killed_walk_goes_on_to_the_same_bytes(killed_at, sequential, gathers, tiny_llama, tmp_path):
    whole = rewritten(tiny_llama, tmp_path / "whole", Scaling(0.5, gathers, True), sequential=sequential)
    with pytest.raises(KeyboardInterrupt):
        rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, gathers, True, killed_at), sequential=sequential)
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(finished) == {"0": 0, "1": 1}.get(killed_at.removeprefix("layers.")[0], 2)
    rest = rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, gathers, True), sequential=sequential)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    for (layers, mine), (same, its) in zip(rest.calls, whole.calls[-len(rest.calls) :], strict=True):
        assert layers == same
        assert mine is its or torch.equal(mine, its)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


def test_after_the_last_file_there_is_nothing_left_to_change(tiny_llama, tmp_path):
    rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, head=True))
    assert not rewritten(tiny_llama, tmp_path / "out", Scaling(0.5, head=True)).calls


def assert_same_files(one, other):
    names = sorted(file.name for file in one.iterdir() if file.name != "artifact.json")
    assert names == sorted(file.name for file in other.iterdir() if file.name != "artifact.json")
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def restored(module, folder, bits):
    """A dense model with what the files of a folder stand for put into its layers."""
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text())
    stored_as = config.get("quantization_config", {}).get("checkpoint_format", "gptq")
    for name, layer in module.named_modules():
        if f"{name}.qweight" in tensors:
            packed = from_tensors({part: tensors[f"{name}.{part}"] for part in TENSORS}, bits, stored_as)
            layer.weight.data = packed.weight().to(layer.weight.dtype)
        elif f"{name}.weight" in tensors:
            layer.weight.data = tensors[f"{name}.weight"].to(layer.weight.dtype)
    return module


@pytest.fixture(scope="module")
def base_logits(tiny_llama):
    return logits_of(dense(tiny_llama), some_ids())


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        *(("quantize.rtn", {"bits": bits, "group_size": 32, "sym": bits != 3}) for bits in (2, 3, 8)),
        *(("quantize.gptq", {**FEW, "bits": bits, "sym": False}) for bits in (2, 3, 8)),
        ("quantize.gptq", {**FEW, "group_size": -1}),
        ("quantize.gptq", {**FEW, "group_size": 32, "static_groups": False}),
        ("quantize.gptq", {**FEW, "desc_act": False, "true_sequential": False, "mse": False}),
        ("quantize.gptq", {**FEW, "modules": {"lm_head": {}, r"layers\.0\.": "skip"}}),
        ("prune.magnitude", {"pattern": "2:4"}),
        ("prune.wanda", FEW),
        ("prune.sparsegpt", {**FEW, "pattern": "1:4"}),
        ("prune.alps", {**FEW, "pattern": "1:4"}),
    ],
    ids=str,
)
def test_a_written_stage_opens_to_what_its_files_stand_for(
    word, settings, base_logits, tiny_llama, tiny_jsonl, tmp_path
):
    """In float32, and in bfloat16 where weights are packed for the fast product."""
    data = {"data": str(tiny_jsonl)} if "samples" in settings else {}
    stage, ids = apply(word, base_of(tiny_llama), tmp_path / "s", **settings, **data), some_ids()
    expected = logits_of(restored(dense(tiny_llama), stage.weights, settings.get("bits", 4)), ids)
    assert not torch.equal(expected, base_logits), f"{word} changed nothing"
    names = stored(stage.weights).keys()
    assert not {name.replace("qweight", "weight") for name in names if "qweight" in name} & names, "held twice"
    for dtype, tolerance in ("float32", 1e-5), ("bfloat16", 0.01):
        loaded = stage.model.model_copy(update={"dtype": dtype}).open(stage, "cpu")
        off = (logits_of(loaded.module, ids) - expected).norm() / expected.norm()
        assert off < tolerance, dtype


@pytest.mark.parametrize("word", STEPS)
def test_the_same_seed_writes_the_same_bytes(word, tiny_llama, tiny_jsonl, tmp_path):
    data = {"data": str(tiny_jsonl)} if "samples" in STEPS[word] else {}
    for name in "ab":
        apply(word, base_of(tiny_llama), tmp_path / name, **STEPS[word], **data)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_a_killed_gptq_goes_on_to_the_same_bytes(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    settings = {**STEPS["quantize.gptq"], "data": str(tiny_jsonl)}
    apply("quantize.gptq", base_of(tiny_llama), tmp_path / "whole", **settings)
    change = Gptq.change

    def killed(self, layers, gathered):
        if "model.layers.1.mlp.up_proj" in layers:
            raise KeyboardInterrupt
        return change(self, layers, gathered)

    monkeypatch.setattr(Gptq, "change", killed)
    with pytest.raises(KeyboardInterrupt):
        apply("quantize.gptq", base_of(tiny_llama), tmp_path / "out", **settings)
    monkeypatch.setattr(Gptq, "change", change)
    apply("quantize.gptq", base_of(tiny_llama), tmp_path / "out", **settings)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_was_pruned_stays_zero_when_it_is_quantized(bits, sym, tiny_llama, tiny_jsonl, tmp_path):
    pruned = apply("prune.magnitude", base_of(tiny_llama), tmp_path / "p", pattern="2:4")
    packed = apply("quantize.gptq", pruned, tmp_path / "q", **FEW, data=str(tiny_jsonl), bits=bits, sym=sym)
    before, after = stored(pruned.weights), restored(dense(tiny_llama), packed.weights, bits).state_dict()
    layers = [name for name in before if "proj" in name]
    assert len(layers) == 14
    for name in layers:
        assert (after[name][before[name] == 0] == 0).all(), name


def test_one_window_of_one_token_will_do(tiny_llama, tiny_jsonl, tmp_path):
    stage = apply("quantize.gptq", base_of(tiny_llama), tmp_path / "q", data=str(tiny_jsonl), samples=1, length=1)
    assert stage.notes["calibration"]["tokens"] == 1
    assert torch.isfinite(logits_of(stage.model.open(stage, "cpu").module, some_ids())).all()
