"""Every architecture under every word: right by an oracle of its own, or refused in one line. Writes `llmq/support`."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support_tables
import torch
from helpers import apply, base_of, logits_of, some_ids
from safetensors import safe_open
from test_experts import dense, stored
from test_gguf import SPECIAL
from tiny_text_models import ARCHITECTURES, build

from llmq import plugin, support
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.types import Exhibit, Measurement

IDS = some_ids()
LAYER = re.compile(r"\.\d+\.\w+")
FEW = {"samples": 4, "length": 32}
LORA = {"r": 4, "max_length": 64, "max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 2}
TEXT = "The while statement is used for repeated execution as long as an expression is true. " * 12


def plain(folder: Path) -> Any:
    """A folder opened by plain transformers, which finds every tensor that it needs."""
    from transformers import AutoModelForCausalLM

    module, said = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"], f"missing: {sorted(said['missing_keys'])[:3]}"
    assert not said["mismatched_keys"], said["mismatched_keys"]
    return module.eval()


def ours(stage: Artifact) -> torch.Tensor:
    """The logits of a stage as llmq opens it."""
    with stage.open("cpu") as loaded:
        return logits_of(loaded.module, IDS)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference over that of `other`."""
    assert one.isfinite().all()
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def block_matrices(folder: Path) -> dict[str, torch.Tensor]:
    """What lies in the repeated blocks with two or three dimensions: linear layers and experts."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    inside = {key: t for key, t in tensors.items() if any(part.isdigit() for part in key.split("."))}
    return {key: t for key, t in inside.items() if t.ndim in (2, 3) and "conv" not in key and "router" not in key}


def bnb(bits: int) -> Callable[..., None]:
    """bitsandbytes: most of what the blocks hold is packed, and plain transformers opens it to the same logits."""

    def check(base: Artifact, folder: Path, logits: torch.Tensor, _: Path) -> None:
        stage = apply("quantize.bnb", base, folder, bits=bits, compute_dtype="float32")
        after = ours(stage)
        elsewhere = plain(stage.weights)
        try:
            assert torch.allclose(after, logits_of(elsewhere, IDS), atol=1e-5)
        except AssertionError as error:
            # With AVX-512 BF16 plain bitsandbytes runs no layer whose rows are not whole multiples of 32.
            if "block_n" not in str(error):
                raise
            whole = plain(stage.weights).dequantize(dtype=torch.float32)
            assert distance(after, logits_of(whole, IDS)) < 0.02
        assert 0 < distance(after, logits) < {4: 0.9, 8: 0.5}[bits]
        total = sum(t.numel() for t in block_matrices(base.weights).values())
        packed = sum(
            t.numel() * (2 if t.dtype == torch.uint8 else 1)
            for key, t in block_matrices(stage.weights).items()
            if t.dtype in (torch.uint8, torch.int8) and key.endswith("weight")
        )
        assert packed / total > 0.5, f"{packed / total:.0%} of the blocks are packed"

    return check


ROUNDED_TO_FLOAT16 = 5e-3
"""The distance of logits that float16 weights may make."""
INITIALIZED_BY_WEIGHT = ("mamba2", "recurrent_gemma")
"""transformers 5.23 asks their packed layers for a float weight while it opens them, unless told to dequantize."""
FUSED = ("gpt_oss", "granitemoehybrid")
"""Architectures whose own files hold all experts in one tensor, where packed ones are stored apart."""


def assembled(tensors: dict[str, torch.Tensor], base: Artifact) -> Any:
    """The base with unpacked experts put into its fused ones by hand, and every other tensor in its place."""
    module = plain(base.weights)
    alternating = module.config.model_type == "gpt_oss"  # gate and up in turn, and inputs before outputs
    for key, value in module.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        kind = "bias" if leaf.endswith("_bias") else "weight"
        if key in tensors:
            value.copy_(tensors[key])
        elif leaf.startswith("down_proj"):
            made = torch.stack([tensors[f"{owner}.{i}.down_proj.{kind}"] for i in range(len(value))])
            value.copy_(made.mT if alternating and kind == "weight" else made)
        elif leaf.startswith("gate_up_proj"):
            pairs = [[tensors[f"{owner}.{i}.{p}_proj.{kind}"] for p in ("gate", "up")] for i in range(len(value))]
            made = torch.stack([torch.stack(p, 1).flatten(0, 1) if alternating else torch.cat(p) for p in pairs])
            value.copy_(made.mT if alternating and kind == "weight" else made)
        else:  # tied, or under another name in the files: untouched, then
            assert any(torch.equal(value, tensor) for tensor in tensors.values() if tensor.shape == value.shape), key
    return module


def grid(word: str) -> Callable[..., None]:
    """GPTQ and rounding: what the packed files stand for, unpacked by the format's definition, has the same logits."""

    def check(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
        stage = apply(word, base, folder, bits=4, group_size=32, **(FEW if word.endswith("gptq") else {}))
        after = ours(stage)
        whole = dense(stage.weights, tmp / f"dense-{word}")
        fused = json.loads((whole / "config.json").read_text())["model_type"] in FUSED
        module = assembled(stored(whole), base) if fused else plain(whole)
        assert torch.allclose(after, logits_of(module, IDS), atol=1e-4)
        assert 0 < distance(after, logits) < 1.2  # routers of random experts choose others at the least change
        changed = sum(t.numel() for key, t in block_matrices(stage.weights).items() if key.endswith("qweight")) * 8
        share = changed / sum(t.numel() for t in block_matrices(base.weights).values())
        assert share > 0.5, f"{share:.0%} of the blocks are packed"

    return check


def half_pruned(word: str) -> Callable[..., None]:
    """Half of what the blocks hold is zero, and plain transformers opens it to the same logits."""

    def check(base: Artifact, folder: Path, logits: torch.Tensor, _: Path) -> None:
        stage = apply(word, base, folder, sparsity=0.5, **FEW)
        after = ours(stage)
        assert torch.allclose(after, logits_of(plain(stage.weights), IDS), atol=1e-5)
        assert distance(after, logits) > 0
        matrices = block_matrices(stage.weights).values()
        zeros = sum(int((t == 0).sum()) for t in matrices) / sum(t.numel() for t in matrices)
        assert 0.3 < zeros < 0.55, f"{zeros:.0%} of the blocks are zero"

    return check


def fewer_layers(base: Artifact, folder: Path, logits: torch.Tensor, _: Path) -> None:
    """What plain transformers opens is the base without one block, taken out of its list by hand."""
    stage = apply("prune.layers", base, folder, drop=1, **FEW)
    module, spliced = plain(stage.weights), plain(base.weights)
    assert torch.allclose(ours(stage), logits_of(module, IDS), atol=1e-5)
    blocks = max((m for m in spliced.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    count = len(blocks)
    for i in stage.notes["dropped"]:
        del blocks[i]
    for config in (m.config for m in spliced.modules() if hasattr(m, "config")):
        config.num_hidden_layers = count - 1
        for name in ("layer_types", "block_types", "attn_layer_indices"):
            meant = config.attribute_map.get(name, name)
            if hasattr(config, meant) and not isinstance(getattr(type(config), meant, None), property):
                setattr(config, meant, getattr(module.config, meant))
    assert module.config.num_hidden_layers == count - 1
    with torch.inference_mode():
        assert torch.allclose(logits_of(module, IDS), spliced(input_ids=IDS, use_cache=False).logits, atol=1e-5)


def merged(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """Plain PEFT on the base, plain transformers on the merged folder, and llmq give the same logits."""
    from peft import PeftModel

    rows = [{"prompt": f"What is {i} plus {i}? ", "completion": f"It is {2 * i}."} for i in range(8)]
    data = tmp / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapted = apply("adapt.lora", base, folder, data=str(data), **LORA)
    after = apply("adapt.merge", adapted, folder.with_name("merged"), window=32, tokens=64)
    wanted = logits_of(PeftModel.from_pretrained(plain(base.weights), adapted.adapter).eval(), IDS)
    assert distance(wanted, logits) > 1e-3, "the adapter learned nothing"
    assert distance(ours(adapted), wanted) < 1e-4
    assert distance(logits_of(plain(after.weights), IDS), wanted) < 1e-3


def perplexity(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """exp of the mean loss of a plain loop over the same windows."""
    (tmp / "text.txt").write_text(TEXT)
    task: Any = plugin.build(
        {"perplexity": {"data": str(tmp / "text.txt"), "part": "all", "window": 32, "limit": 4, "bos": False}}, "tasks"
    )
    with base.open("cpu") as loaded:
        answers = {m.metric: m.value for m in task.score(loaded)}
        ids = loaded.processor(TEXT, add_special_tokens=False)["input_ids"][:128]
    module, total = plain(base.weights), 0.0
    for start in range(0, 128, 32):
        window = torch.tensor([ids[start : start + 32]])
        loss = torch.nn.functional.cross_entropy(logits_of(module, window)[0, :-1], window[0, 1:], reduction="sum")
        total += float(loss)
    assert answers["token_perplexity"] == pytest.approx(math.exp(total / (4 * 31)), rel=1e-4)


def lm_eval(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """lm-eval's own class on the module that plain transformers opens."""
    import lm_eval as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = TEXT.split()
    rows = [
        {"context": " ".join(words[i : i + 5]), "choices": [words[i + 5], words[i + 9]], "label": 0} for i in range(6)
    ]
    (tmp / "asked").mkdir()
    (tmp / "asked" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp / "asked" / "tiny_choice.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp}/asked/rows.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    task: Any = plugin.build({"lm_eval": {"tasks": ["tiny_choice"], "include_path": str(tmp / "asked")}}, "tasks")
    with base.open("cpu") as loaded:
        found = {m.metric: m.value for m in task.score(loaded) if isinstance(m, Measurement)}
        peer = HFLM(pretrained=plain(base.weights), tokenizer=loaded.processor, batch_size=1, max_length=256)
    manager = TaskManager(include_path=str(tmp / "asked"), include_defaults=False)
    theirs = harness.simple_evaluate(model=peer, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)
    for metric in ("acc", "acc_norm"):
        assert found[metric] == theirs["results"]["tiny_choice"][f"{metric},none"]


def generate(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """The greedy answer of plain transformers."""
    rows = [{"prompt": TEXT[: 40 + i], "completion": " and so on."} for i in range(12)]
    (tmp / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": str(tmp / "prompts.jsonl"), "examples": 1, "max_new_tokens": 8}
    task: Any = plugin.build({"generate": settings}, "tasks")
    with base.open("cpu") as loaded:
        shown = next(a for a in task.score(loaded) if isinstance(a, Exhibit))
        ids = torch.tensor([loaded.processor(shown.input, add_special_tokens=False)["input_ids"]])
        made = plain(base.weights).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        wanted = loaded.processor.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert shown.output == wanted


def speed(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """Every clock takes time, and after it has run the cache still holds the prompt and nothing else."""
    from llmq.measure import interleave

    task: Any = plugin.build({"speed": {"prompt_tokens": 16, "new_tokens": 4, "rounds": 2}}, "tasks")
    with base.open("cpu") as loaded:
        clocks = list(task.clocks(loaded))
        found = interleave({"0-base": clocks}, "cpu")["0-base"]
        assert {m.metric for m in found} >= {"time_to_first_token", "prefill_tokens_per_second"}
        assert all(math.isfinite(m.value) and m.value > 0 for m in found)
        if len(clocks) == 1:
            assert loaded.module.config.model_type == "recurrent_gemma"  # which gives out no cache
            return
        (prompt,), (_, name, cache, token, places) = clocks[0].run.args[1:], clocks[1].run.args
        told = {"position_ids": torch.tensor([[places[0]]])} if loaded.module.config.model_type == "bamba" else {}
        with torch.inference_mode():
            going_on = loaded.module(input_ids=token, **{name: cache}, use_cache=True, **told).logits[:, -1]
            anew = loaded.module(input_ids=torch.cat([prompt, token], 1), use_cache=False).logits[:, -1]
        assert torch.allclose(going_on, anew, atol=1e-3)


def as_gguf(base: Artifact, folder: Path, logits: torch.Tensor, tmp: Path) -> None:
    """The file, read by the gguf package, makes the logits of the base, with the settings that engines hold fixed."""
    architecture = json.loads((base.weights / "config.json").read_text())["model_type"]
    if its := SPECIAL.get(architecture):
        base = base_of(build(architecture, tmp / "as-engines", base.weights, **its), "float32")
        logits = logits_of(plain(base.weights), IDS)
    stage = apply("export.gguf", base, folder, type="f16")
    assert distance(ours(stage), logits) < ROUNDED_TO_FLOAT16


def as_openvino(base: Artifact, folder: Path, logits: torch.Tensor, _: Path) -> None:
    """The graph, run by OpenVINO, has the logits of plain transformers up to float16."""
    stage = apply("export.openvino", base, folder)
    assert stage.runtime == "openvino"
    assert distance(ours(stage), logits) < ROUNDED_TO_FLOAT16


def as_compressed(base: Artifact, folder: Path, logits: torch.Tensor, _: Path) -> None:
    """Plain transformers opens the pack-quantized folder to the logits of the packed stage before."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    stage = apply("quantize.rtn", base, folder.with_name("to-compress"), bits=4, group_size=32)
    made = apply("export.compressed_tensors", stage, folder)
    if json.loads((base.weights / "config.json").read_text())["model_type"] in INITIALIZED_BY_WEIGHT:
        how = CompressedTensorsConfig(dequantize=True)
        module = AutoModelForCausalLM.from_pretrained(made.weights, dtype="float32", quantization_config=how).eval()
    else:
        module = plain(made.weights)
    assert torch.allclose(logits_of(module, IDS), ours(stage), atol=1e-4)


CHECKS: dict[str, Callable[..., None]] = {
    "bnb4": bnb(4),
    "bnb8": bnb(8),
    "gptq": grid("quantize.gptq"),
    "rtn": grid("quantize.rtn"),
    "wanda": half_pruned("prune.wanda"),
    "sparsegpt": half_pruned("prune.sparsegpt"),
    "layers": fewer_layers,
    "lora": merged,
    "perplexity": perplexity,
    "lm_eval": lm_eval,
    "generate": generate,
    "speed": speed,
    "to_gguf": as_gguf,
    "to_openvino": as_openvino,
    "to_compressed": as_compressed,
}


def outcome(architecture: str, column: str, base: Artifact, logits: torch.Tensor, tmp: Path) -> str:
    """`right`, or the one line in which llmq refuses; folders of this machine out of it."""
    folder = tmp / column
    try:
        CHECKS[column](base, folder, logits, tmp)
    except UserError as error:
        line = str(error).replace(str(base.weights), architecture).replace(str(tmp), "")
        assert "\n" not in line
        named = architecture in line or type(plain(base.weights)).__name__ in line or LAYER.search(line)
        assert named, f"names neither model nor layer: {line}"
        return line
    return support.RIGHT


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_word_is_right_or_one_line(architecture, tiny_llama, tmp_path):
    torch.set_num_threads(1)
    base = base_of(build(architecture, tmp_path / "model", tiny_llama), "float32")
    logits = logits_of(plain(base.weights), IDS)
    found, wrong = {}, {}
    for column in CHECKS:
        try:
            found[column] = outcome(architecture, column, base, logits, tmp_path)
        except Exception as error:  # noqa: BLE001  # every cell is looked at before the test fails
            wrong[column] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if os.environ.get("LLMQ_WRITE_SUPPORT"):
        support_tables.write("text", architecture, found)
    assert not wrong, (architecture, wrong)
    assert found == support.cells("text")[architecture]


def test_the_table_holds_every_architecture_and_column():
    assert CHECKS.keys() == support.TEXT_COLUMNS.keys()
    assert support.cells("text").keys() == ARCHITECTURES.keys()
    assert all(row.keys() == CHECKS.keys() for row in support.cells("text").values())


def test_the_page_is_drawn_from_the_table():
    page = Path(__file__).parent.parent / "docs" / "support.md"
    if os.environ.get("LLMQ_WRITE_SUPPORT"):
        page.write_text(support_tables.page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == support_tables.page()


def test_check_says_what_the_table_says(tiny_llama, tmp_path):
    from typer.testing import CliRunner

    from llmq.cli import app

    architecture, line = next(
        (name, row["bnb4"]) for name, row in support.cells("text").items() if row["bnb4"] != support.RIGHT
    )
    folder = build(architecture, tmp_path / "model", tiny_llama)
    recipe = tmp_path / "job.yaml"
    recipe.write_text(f"model: {{causal_lm: {{weights: {folder}}}}}\nsteps: [quantize.bnb]\nevaluate: [size]\n")
    said = CliRunner().invoke(app, ["check", str(recipe)])
    assert said.exit_code == 0
    assert f"quantize.bnb refused a tiny {architecture}: {line}" in said.output
    told = CliRunner().invoke(app, ["check", str(recipe), f"model.weights={tiny_llama}"])
    assert "refused" not in told.output
