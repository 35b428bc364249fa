"""Rows -> tokens -> packed batches: nothing lost, nothing said twice, nothing seen across a border."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import UserError
from llmq.text import rows
from llmq.text.examples import IGNORED, Collator, Tokens, pack
from llmq.text.tokens import encode, encode_all, prompt_and_reference, shown_prompt

quickly = settings(max_examples=60, deadline=None, database=None)
BOS, EOS, PAD = 1, 2, 0


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = EOS
    bos_token_id = BOS

    def __init__(self, chat_template=None, marks_beginning=False):
        self.chat_template = chat_template
        self.marks_beginning = marks_beginning

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        mark = [BOS] if add_special_tokens and self.marks_beginning else []
        ids = mark + [EOS if c == "$" else ord(c) for c in text]
        spans = [(0, 0)] * len(mark) + [(i, i + 1) for i in range(len(text))]
        return {"input_ids": ids} | ({"offset_mapping": spans} if return_offsets_mapping else {})

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i not in (BOS, EOS))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        turns = [f"<{m['role']}>{self.shown(m, m is messages[-1])}$\n" for m in messages]
        return "".join(turns) + ("<assistant>" if add_generation_prompt else "")

    def shown(self, message, is_last):
        return message["content"]


class Rewriting(Letters):
    """Its chat template writes the last message otherwise than earlier ones, as those of reasoning models do."""

    def shown(self, message, is_last):
        return message["content"] + ("(thought)" if is_last else "")


def spelled(tokens, said=None):
    """The text of an example; with `said`, of the tokens so marked."""
    kept = zip(tokens.ids, tokens.said, strict=True)
    return "".join("$" if i == EOS else chr(i) for i, s in kept if said is None or s == said)


def example(start, length):
    return Tokens(tuple(range(start, start + length)), (True,) * length)


def dialogue(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@quickly
@given(lengths, st.integers(20, 50))
def test_every_example_lands_whole_in_exactly_one_row_that_has_room(sizes, length):
    examples = [example(100 * i, size) for i, size in enumerate(sizes)]
    packed = pack(examples, length)
    assert sorted(e.ids for row in packed for e in row) == sorted(e.ids for e in examples)
    assert all(0 < sum(map(len, row)) <= length for row in packed)


@quickly
@given(lengths, st.integers(20, 50))
def test_no_two_rows_would_fit_into_one(sizes, length):
    # Best fit: a row was only begun when no other had room for its first, and longest, example.
    filled = [sum(map(len, row)) for row in pack([example(0, s) for s in sizes], length)]
    assert sum(f * 2 <= length for f in filled) <= 1


def test_packing_is_deterministic():
    examples = [example(10 * i, size) for i, size in enumerate((3, 5, 3, 5, 2))]
    assert pack(examples, 8) == pack(examples, 8)


@quickly
@given(lengths)
def test_positions_restart_at_each_example_and_at_the_padding(sizes):
    batch = Collator(PAD)(pack([example(0, s) for s in sizes], 30))
    packed = pack([example(0, s) for s in sizes], 30)
    width = max(sum(map(len, row)) for row in packed)
    for row, positions in zip(packed, batch["position_ids"].tolist(), strict=True):
        spans = [*map(len, row), width - sum(map(len, row))]
        assert positions == [p for n in spans for p in range(n)]


@quickly
@given(lengths)
def test_labels_never_cross_the_border_of_an_example(sizes):
    packed = pack([example(1000 * i + 1, s) for i, s in enumerate(sizes)], 30)
    batch = Collator(PAD)(packed)
    predicted = 0
    for ids, positions, labels in zip(
        *(batch[k].tolist() for k in ("input_ids", "position_ids", "labels")), strict=True
    ):
        for i, label in enumerate(labels):
            if label != IGNORED:
                predicted += 1
                assert label == ids[i + 1] == ids[i] + 1
                assert positions[i + 1] == positions[i] + 1
    assert predicted == sum(s - 1 for s in sizes)


def test_a_batch_pads_the_shorter_rows_and_learns_nothing_from_the_padding():
    collate = Collator(PAD)
    batch = collate([[example(10, 3), example(20, 2)], [example(30, 2)]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21], [30, 31, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[11, 12, IGNORED, 21, IGNORED], [31, *[IGNORED] * 4]]
    assert batch["shift_labels"].tolist() == batch["labels"].tolist()
    assert batch["tokens"] == 7


def test_labels_are_the_said_tokens_one_place_ahead():
    tokens = Tokens((5, 6, 7, 8), (True, False, True, True))
    assert tokens.labels() == [IGNORED, 7, 8, IGNORED]


def test_a_cut_is_an_example_of_its_own():
    cut = Tokens((5, 6, 7, 8), (False, False, True, True)).cut(1, 3)
    assert cut == Tokens((6, 7), (False, True))
    assert cut.labels() == [7, IGNORED]


@quickly
@given(st.text("abc ", min_size=1, max_size=60), st.integers(2, 12), st.booleans())
def test_of_a_long_text_every_token_but_the_first_is_predicted_exactly_once(text, max_length, marked):
    tokenizer = Letters(marks_beginning=marked)
    examples, counts = encode_all([{"text": text}], tokenizer, max_length)
    whole = encode({"text": text}, tokenizer)
    assert [label for e in examples for label in e.labels() if label != IGNORED] == list(whole.ids[1:])
    assert all(len(e) <= max_length for e in examples)
    assert counts == {"rows": 1, "used": 1, "truncated": 0, "prompt_too_long": 0}


def test_a_truncated_completion_is_kept_and_counted():
    ((cut,), counts) = encode_all([{"prompt": "ask", "completion": "a long answer"}], Letters(), 9)
    assert spelled(cut, said=False) == "ask"
    assert spelled(cut, said=True) == "a long"
    assert counts == {"rows": 1, "used": 1, "truncated": 1, "prompt_too_long": 0}


def test_a_row_that_just_fits_is_not_truncated():
    ((whole,), counts) = encode_all([{"prompt": "ask", "completion": "told"}], Letters(), 8)
    assert spelled(whole) == "asktold$"
    assert counts["truncated"] == 0


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted():
    good = {"prompt": "ask", "completion": "x"}
    examples, counts = encode_all([{"prompt": "question", "completion": "x"}, good], Letters(), 8)
    assert [spelled(e) for e in examples] == ["askx$"]
    assert counts == {"rows": 2, "used": 1, "truncated": 0, "prompt_too_long": 1}


@quickly
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=9), st.text("cd", min_size=1, max_size=9)), max_size=8),
    st.integers(2, 12),
)
def test_the_counts_of_encoding_add_up(pairs, max_length):
    examples, counts = encode_all([{"prompt": p, "completion": c} for p, c in pairs], Letters(), max_length)
    assert counts["rows"] == len(pairs) == counts["used"] + counts["prompt_too_long"]
    assert len(examples) == counts["used"] >= counts["truncated"]
    assert all(any(label != IGNORED for label in e.labels()) for e in examples)


def test_the_end_of_text_is_appended_to_a_completion_and_is_said():
    tokens = encode({"prompt": "ab", "completion": "cd"}, Letters())
    assert spelled(tokens) == "abcd$"
    assert tokens.said == (False, False, True, True, True)
    assert tokens.labels() == [IGNORED, ord("c"), ord("d"), EOS, IGNORED]


def test_no_second_end_of_text_is_appended():
    assert spelled(encode({"prompt": "ab", "completion": "cd$"}, Letters())) == "abcd$"


def test_a_tokenizer_without_an_end_of_text_gets_none():
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    assert spelled(encode({"prompt": "ab", "completion": "cd"}, tokenizer)) == "abcd"


def test_a_mark_before_every_text_is_kept_once_and_is_not_said():
    tokens = encode({"prompt": "ab", "completion": "c"}, Letters(marks_beginning=True))
    assert tokens.ids == (BOS, ord("a"), ord("b"), ord("c"), EOS)
    assert tokens.said == (False, False, False, True, True)


CONVERSATION = dialogue(
    ("system", "be kind"), ("user", "hello"), ("assistant", "hi"), ("user", "bye"), ("assistant", "farewell")
)


def test_of_a_conversation_the_chat_template_marks_the_assistants_words_and_their_end():
    tokens = encode(CONVERSATION, Letters("a template", marks_beginning=True))
    # No mark before it: a chat template writes its own.
    assert spelled(tokens) == "<system>be kind$\n<user>hello$\n<assistant>hi$\n<user>bye$\n<assistant>farewell$"
    assert spelled(tokens, said=True) == "hi$farewell$"
    assert spelled(tokens, said=False) == "<system>be kind$\n<user>hello$\n<assistant>\n<user>bye$\n<assistant>"


def test_what_a_person_says_last_is_not_part_of_a_templated_example():
    tokens = encode(dialogue(("user", "a"), ("assistant", "b"), ("user", "thanks")), Letters("a template"))
    assert spelled(tokens) == "<user>a$\n<assistant>b$"


def test_without_a_chat_template_a_conversation_is_lines():
    tokens = encode(CONVERSATION, Letters())
    assert spelled(tokens) == "be kind\nhello\nhi\nbye\nfarewell$"
    assert spelled(tokens, said=True) == "hi\nfarewell$"


def test_of_a_template_that_rewrites_earlier_turns_the_turns_are_found_as_they_stand():
    tokens = encode(CONVERSATION, Rewriting("a template"))
    assert spelled(tokens, said=True) == "hi$farewell(thought)$"
    assert spelled(tokens, said=False).endswith("<user>hello$\n<assistant>\n<user>bye$\n<assistant>")


class Counting(Letters):
    """Its chat template writes how long the whole conversation is before each of its turns."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        length = sum(len(m["content"]) for m in messages)
        return "".join(f"<{m['role']} {length}>{m['content']}$\n" for m in messages)


def test_a_template_whose_turns_cannot_be_told_apart_is_refused():
    with pytest.raises(UserError, match=r"turn 2 of the row that begins 'be kind'.*one turn a row"):
        encode(CONVERSATION, Counting("a template"))


def test_the_reference_is_the_last_thing_that_the_model_should_say():
    prompt, reference = prompt_and_reference(CONVERSATION, Letters("a template"))
    assert spelled(Tokens(prompt, (False,) * len(prompt))).endswith("<user>bye$\n<assistant>")
    assert reference == "farewell"
    assert prompt_and_reference({"prompt": "ask", "completion": "told"}, Letters()) == (tuple(map(ord, "ask")), "told")


@pytest.mark.parametrize("template", [None, "a template"])
def test_the_reference_is_not_what_a_person_says_after_it(template):
    row = dialogue(("user", "question"), ("assistant", "answer"), ("user", "thanks"))
    _, reference = prompt_and_reference(row, Letters(template))
    assert reference.strip("$\n") == "answer"


def test_the_prompt_shown_is_the_last_thing_that_a_person_wrote():
    assert shown_prompt(CONVERSATION) == "bye"
    assert shown_prompt({"prompt": "ask", "completion": "told"}) == "ask"


def test_a_conversation_in_which_nobody_asks_can_be_shown():
    # `rows.check` lets it pass, so that what shows rows must bear it.
    (row,), _ = rows.check([("x:1", dialogue(("system", "be kind"), ("assistant", "hi")))], {}, "x")
    assert isinstance(shown_prompt(row), str)
