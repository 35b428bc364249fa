"""Models whose positions are turned otherwise once a text of the batch is long: none may depend on another."""

import json

import pytest
import tiny_text_models
import torch
from helpers import apply, base_of, some_ids

from llmq.errors import UserError
from llmq.text import decoding, scoring
from llmq.text.examples import Tokens
from llmq.text.losses import losses
from llmq.text.streaming import Reader


@pytest.fixture(scope="module")
def long_rope(tiny_llama, tmp_path_factory):
    """A Phi-3 with LongRoPE: from 33 tokens on all positions of a batch are turned by other numbers."""
    table = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
    table["original_max_position_embeddings"] = 32
    changes = {"rope_parameters": table, "original_max_position_embeddings": 32}
    return tiny_text_models.build("phi3", tmp_path_factory.mktemp("phi3"), tiny_llama, **changes)


def test_no_score_depends_on_a_longer_text_beside_it(long_rope):
    """Under LongRoPE a text of 40 tokens moved the log-likelihood of one of 20 by more than a nat."""
    texts = [tuple(some_ids(1, n)[0].tolist()) for n in (20, 40, 60)]
    asked = [scoring.Request(text, 10) for text in texts]
    windows = [Tokens(text, (True,) * len(text)) for text in texts]
    jobs = [decoding.Job(text, (), 20) for text in texts]
    with base_of(long_rope, "float32").open("cpu") as loaded:
        module, tokenizer = loaded.module, loaded.processor
        alone = [scoring.score(module, [one], "cpu")[0][0] for one in asked]
        assert [s for s, _ in scoring.score(module, asked, "cpu")] == pytest.approx(alone, abs=1e-3)
        by_itself = [losses(module, [window], "cpu", 1)[0] for window in windows]
        assert losses(module, windows, "cpu", 3) == pytest.approx(by_itself, abs=1e-3)
        written = [decoding.generate(module, tokenizer, [job], "cpu")[0] for job in jobs]
        assert decoding.generate(module, tokenizer, jobs, "cpu") == written
        reader = Reader(module, "cpu")
        kept = [reader.logits(texts[1][:n]) for n in (30, 34, 40, 31)]
        fresh = [Reader(module, "cpu").logits(texts[1][:n]) for n in (30, 34, 40, 31)]
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(kept, fresh, strict=True))


def test_examples_of_a_batch_that_turn_each_others_positions_are_refused(long_rope, tmp_path):
    rows = [{"prompt": "a ", "completion": "word " * n} for n in (3, 30, 4, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": {"file": {"path": str(tmp_path / "rows.jsonl"), "held_out": 0}}, "max_steps": 1}
    with pytest.raises(UserError, match=r"more than 32 tokens, .* set max_length: 32, or packing: false"):
        apply("adapt.lora", base_of(long_rope), tmp_path / "a", **settings)
    apply("adapt.lora", base_of(long_rope), tmp_path / "b", **settings, max_length=32)
