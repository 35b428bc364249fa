"""`llmq chat`: answers in a pipe and on a terminal, history, room, Ctrl-C and Ctrl-D."""

import io
import os
import pty
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from helpers import apply, base_of, exit_code, reshaped, some_ids
from tiny_text_models import ARCHITECTURES, build

from llmq import chatting, cli
from llmq.errors import UserError
from llmq.text.dialogue import Dialogue
from llmq.text.streaming import Reader, Sampling, pieces, stream

pytestmark = pytest.mark.usefixtures("one_thread")
USUAL = ("llama", "gpt2", "mamba", "bloom")


@pytest.fixture
def llmq(monkeypatch, capsys):
    """Runs a command line with some text on its input; the exit code, the standard output and the errors."""

    def run(text: str | bytes, *words: object) -> tuple[int, str, str]:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = exit_code(*words)
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


def settings(**options: Any) -> Any:
    return chatting.settings({"max_new_tokens": 6, **options})


def said(dialogue: Dialogue, turn: str) -> str:
    return "".join(dialogue.answer(turn))


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    with base_of(tiny_llama, "float32").open("cpu") as opened:
        yield opened


@pytest.mark.parametrize(
    "architecture", [a if a in USUAL else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_a_stream_is_what_the_models_own_generation_writes(architecture, tiny_llama, tmp_path):
    with base_of(build(architecture, tmp_path / "model", tiny_llama), "float32").open("cpu") as opened:
        ids = some_ids(1, 20)
        with torch.inference_mode():
            expected = opened.module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
            )
        streamed = list(stream(Reader(opened.module, "cpu"), ids[0].tolist(), 12, Sampling().picker(()), ()))
    written = expected[0, 20:].tolist()  # up to an end mark
    assert streamed[: len(written)] == written


@pytest.mark.parametrize(
    "architecture", [a if a in USUAL else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_what_was_read_before_changes_no_answer(architecture, tiny_llama, tmp_path):
    ids = some_ids(1, 60)[0].tolist()
    texts = [ids[:20], ids[:20] + ids[40:], ids[:12] + ids[30:50], ids[:12], ids[5:30]]  # goes on, turns off, is cut
    with base_of(build(architecture, tmp_path / "model", tiny_llama), "float32").open("cpu") as opened:
        reader, pick = Reader(opened.module, "cpu"), Sampling().picker(())
        for text in texts:
            fresh = list(stream(Reader(opened.module, "cpu"), text, 8, pick, ()))
            assert list(stream(reader, text, 8, pick, ())) == fresh
            follows = [*reader.ids, *ids[50:]]  # as the next turn does
            torch.testing.assert_close(reader.logits(follows), Reader(opened.module, "cpu").logits(follows))


@pytest.mark.slow
def test_a_graph_reads_only_what_differs_from_the_text_before(tiny_llama, tmp_path):
    pytest.importorskip("openvino")
    ids = some_ids(1, 40)[0].tolist()
    with apply("export.openvino", base_of(tiny_llama, "float32"), tmp_path / "stage").open("cpu") as opened:
        reader, read = Reader(opened.module, "cpu"), []
        opened.module.register_forward_pre_hook(
            lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        for text, new in ((ids[:30], 30), (ids[:20] + ids[35:], 5), (ids[:10], 1), (ids[5:], 35)):
            read.clear()
            logits = reader.logits(text)
            assert read == [new]
            torch.testing.assert_close(logits, Reader(opened.module, "cpu").logits(text))


def test_a_conversation_is_read_once(loaded):
    read = []
    handle = loaded.module.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    talk = Dialogue("m", loaded, settings())
    said(talk, "Hi.")
    before, length = len(read), len(talk.prompting.conversation(talk.turns))
    said(talk, "And?")
    handle.remove()
    assert read[before] < length


def test_a_pass_that_was_interrupted_is_read_again(loaded):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    ids, pick = some_ids(1, 20)[0].tolist(), Sampling().picker(())
    reader = Reader(loaded.module, "cpu")
    list(stream(reader, ids[:10], 4, pick, ()))
    handle = loaded.module.get_input_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(stream(reader, ids, 4, pick, ()))
    handle.remove()
    expected = list(stream(Reader(loaded.module, "cpu"), ids, 4, pick, ()))
    assert list(stream(reader, ids, 4, pick, ())) == expected


def test_a_stream_ends_after_an_end_mark(loaded):
    ids = some_ids(1, 20)[0].tolist()
    whole = list(stream(Reader(loaded.module, "cpu"), ids, 12, Sampling().picker(()), ()))
    assert (
        list(stream(Reader(loaded.module, "cpu"), ids, 12, Sampling().picker(()), {whole[3]}))
        == whole[: whole.index(whole[3]) + 1]
    )


def test_a_model_that_keeps_nothing_reads_all_again(loaded):
    class Forgetful(torch.nn.Module):
        config = loaded.module.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            output = loaded.module(input_ids=input_ids, use_cache=False)
            return type("Output", (), {"logits": output.logits})

    ids = some_ids(1, 20)[0].tolist()
    expected = list(stream(Reader(loaded.module, "cpu"), ids, 8, Sampling().picker(()), ()))
    assert list(stream(Reader(Forgetful(), "cpu"), ids, 8, Sampling().picker(()), ())) == expected


def test_draws_follow_the_probabilities_within_the_share():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = torch.zeros(4)
    pick = Sampling(1.0, 1.0, 0).picker([1])
    for _ in range(2000):
        counts[pick(logits)] += 1
    assert (counts / 2000 - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.04
    pick = Sampling(1.0, 0.6, 0).picker([1])
    assert {pick(logits) for _ in range(200)} == {0, 1}
    assert Sampling(1e-30, 1.0, 0).picker([1])(logits) == 0
    first, again, other = (Sampling(5.0, 1.0, seed).picker([1]) for seed in (0, 0, 1))
    draws = [[pick(logits) for _ in range(30)] for pick in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_pieces_are_whole_characters():
    text = "a€𝄞b"
    data = text.encode()
    tokens = iter(range(len(data)))
    made = list(pieces(tokens, lambda ids: data[: len(ids)].decode("utf-8", "replace")))
    assert made == ["a", "€", "𝄞", "b"]
    cut = list(pieces(iter(range(2)), lambda ids: data[: len(ids)].decode("utf-8", "replace")))
    assert cut == ["a", "\ufffd"]


def test_the_history_goes_through_the_template(loaded):
    talk = Dialogue("m", loaded, settings(system="Be brief."))
    first = said(talk, "Hi.")
    said(talk, "And?")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    text = loaded.processor.decode(talk.prompting.conversation(talk.turns[:3]))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
        f"{first}<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    talk.reset()
    assert said(talk, "Hi.") == first
    assert talk.last == first


def test_without_a_template_a_text_goes_on(loaded):
    talk = Dialogue("m", loaded, settings(raw=True))
    first = said(talk, "Once upon")
    said(talk, "a time")
    assert loaded.processor.decode(talk.prompting.plain("Once upon")) == "Once upon"
    assert [turn["content"] for turn in talk.turns][:3] == ["Once upon", first, "a time"]


def test_the_oldest_turns_make_room_and_a_turn_too_long_is_forgotten(loaded, capsys):
    talk = Dialogue("m", loaded, settings(max_new_tokens=60))
    for _ in range(5):
        said(talk, "word " * 40)
    assert "m: the oldest turn is forgotten: no room" in capsys.readouterr().err
    assert len(talk.turns) < 8
    before = list(talk.turns)
    with pytest.raises(UserError, match=r"the turn has \d+ tokens, and 452 at most leave room to answer"):
        said(talk, "word " * 300)
    assert talk.turns == before


def test_a_stopped_answer_is_remembered_as_far_as_it_came(loaded):
    talk = Dialogue("m", loaded, settings(max_new_tokens=50))
    pieces_of = talk.answer("Hi.")
    first = next(pieces_of)
    pieces_of.close()
    assert talk.last == first


def test_a_pipe_gets_the_answers_alone(llmq, tiny_llama, loaded):
    code, out, err = llmq("Hi.\n\n  And?  \n", "chat", tiny_llama, "--max-new-tokens", 6)
    assert (code, err) == (0, "")
    with base_of(tiny_llama).open("cpu") as opened:
        talk = Dialogue("m", opened, settings())
        expected = [said(talk, turn) for turn in ("Hi.", "And?")]
    assert out == "".join(f"{chatting.visible(text)}\n" for text in expected)
    assert "\x1b" not in out
    code, out, err = llmq("Hi.\n/reset\nHi.\n/exit\nHi.", "chat", tiny_llama, "--max-new-tokens", 6)
    assert code == 0
    lines = out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert err == "forgotten"
    assert llmq("", "chat", tiny_llama) == (0, "", "")
    assert llmq(b"\xff\xfe\n", "chat", tiny_llama, "--max-new-tokens", 2)[0] == 0


def test_two_models_answer_side_by_side(llmq, tiny_llama, tmp_path):
    other = reshaped(tiny_llama, tmp_path / "other", num_hidden_layers=1)
    words = ("chat", tiny_llama, "--max-new-tokens", 6, "--beside")
    code, out, _ = llmq("Hi.\n", *words, other)
    assert code == 0
    assert f"[{tiny_llama}]\n" in out
    assert f"[{other}]\n" in out
    assert "(differ from word 1: " in out
    assert llmq("Hi.\n", *words, tiny_llama)[1].endswith("(both the same)\n")


def test_the_words_that_differ_are_marked():
    first, second = chatting._marked("the cat sat down", "the dog sat")
    assert [(span.start, span.end) for span in first.spans] == [(3, 7), (11, 16)]
    assert [(span.start, span.end) for span in second.spans] == [(3, 7)]
    assert (first.plain, second.plain) == ("the cat sat down", "the dog sat")
    assert chatting._difference("a b", "a c d") == "(differ from word 2: 'b' and 'c')"
    assert chatting._difference("a", "a b") == "(differ from word 2: the end and 'b')"


def test_what_cannot_be_is_one_line(llmq, tiny_llama, tmp_path):
    code, out, err = llmq("Hi.\n", "chat", tiny_llama, "--system", "Be brief.", "--raw")
    assert (code, out) == (2, "")
    assert err == "llmq: --system 'Be brief.' needs a chat template, and --raw leaves it out"
    code, out, err = llmq("word " * 900, "chat", tiny_llama)
    assert (code, out) == (2, "")
    assert "at most leave room to answer" in err
    from transformers import AutoTokenizer

    bare = reshaped(tiny_llama, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    code, out, err = llmq("Hi.\n", "chat", bare, "--max-new-tokens", 2)
    assert code == 0
    assert "has no chat template: what you write is continued as plain text" in err


class Terminal:
    """A chat on a terminal of its own, in a fork of this process, which has imported what takes seconds."""

    def __init__(self, *words: object) -> None:
        self.text, self.seen = "", 0
        self.child, self.ours = pty.fork()
        if not self.child:
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
            sys.argv = ["llmq", "chat", *map(str, words)]
            try:
                cli.main()
            except SystemExit as stop:
                os._exit(int(stop.code or 0))
            os._exit(99)

    def until(self, words: str, seconds: float = 60) -> str:
        """Read until `words` were written; returns the text from the words before up to these."""
        end = time.monotonic() + seconds
        while (place := self.text.find(words, self.seen)) < 0:
            assert time.monotonic() < end, self.text
            if select.select([self.ours], [], [], 0.2)[0]:
                self.text += os.read(self.ours, 4096).decode("utf-8", "replace")
        begin, self.seen = self.seen, place + len(words)
        return self.text[begin : self.seen]

    def interrupt(self) -> None:
        os.kill(self.child, signal.SIGINT)

    def write(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        with suppress(OSError):  # a terminal whose last writer is gone
            while os.read(self.ours, 4096):
                pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self.ours)
        return code


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(tiny_llama):
    chat = Terminal(tiny_llama, "--max-new-tokens", 500, "--temperature", 3)
    chat.until("> ")
    chat.write("Hi.\n")
    chat.until("Hi.")
    time.sleep(0.3)
    chat.interrupt()
    chat.until("> ", 20)
    chat.write("/reset\n")
    chat.until("forgotten")
    chat.until("> ")
    chat.write("\x04")
    assert chat.end() == 0


def test_ctrl_c_twice_ends(tiny_llama):
    chat = Terminal(tiny_llama)
    chat.until("> ")
    chat.interrupt()
    chat.until("(again, or Ctrl-D, to end)")
    chat.interrupt()
    assert chat.end() == 130


def test_two_columns_on_a_terminal(tiny_llama):
    chat = Terminal(tiny_llama, "--beside", tiny_llama, "--max-new-tokens", 5)
    chat.until("> ")
    chat.write("Hi.\n")
    assert "┃" in chat.until("> ")
    chat.write("/exit\n")
    assert chat.end() == 0
