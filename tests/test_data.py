"""Sources of examples: shapes and files recognised, sides that share nothing, counts that add up."""

import ast
import csv
import datetime
import importlib.util
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.data import docstrings
from llmq.data.docstrings import QUESTION, Docstrings
from llmq.data.file import File
from llmq.data.pydoc import SHARED_PARAGRAPH, Pydoc
from llmq.errors import UserError
from llmq.files import bundled
from llmq.text import rows
from llmq.text.windows import joined

quickly = settings(max_examples=60, deadline=None, database=None)


def checked(*raw, columns=None):
    return rows.check([(f"x:{i}", row) for i, row in enumerate(raw, 1)], columns or {}, "x")


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


# The shapes of rows


@pytest.mark.parametrize(
    ("raw", "shape", "expected"),
    [
        ({"messages": turns("q", "a")}, "messages", {"messages": turns("q", "a")}),
        ({"prompt": "p", "completion": "c"}, "prompt/completion", {"prompt": "p", "completion": "c"}),
        (
            {"instruction": "do", "input": "this", "output": "done"},
            "instruction/input/output",
            {"messages": turns("do\n\nthis", "done")},
        ),
        (
            {"instruction": "do", "input": "", "output": "done"},
            "instruction/input/output",
            {"messages": turns("do", "done")},
        ),
        ({"instruction": "do", "output": "done"}, "instruction/input/output", {"messages": turns("do", "done")}),
        ({"question": "q", "answer": "a"}, "question/answer", {"messages": turns("q", "a")}),
        ({"text": "t"}, "text", {"text": "t"}),
    ],
)
def test_each_shape_is_recognised_whatever_other_columns_stand_by(raw, shape, expected):
    assert checked(raw) == ([expected], shape)
    assert checked({"id": 7, **raw}) == ([expected], shape)


def test_columns_may_go_by_other_names():
    found, shape = checked({"query": "p", "reply": "c"}, columns={"prompt": "query", "completion": "reply"})
    assert (found, shape) == ([{"prompt": "p", "completion": "c"}], "prompt/completion")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ([1, 2], "x:2: a row is a JSON object"),
        ({"prompt": "p"}, "x:2: column 'completion' is missing"),
        ({"prompt": "p", "completion": None}, "x:2: column 'completion' is null"),
        ({"prompt": "p", "completion": 5}, "x:2: column 'completion' is 5"),
        ({"prompt": " \n", "completion": "c"}, "x:2: column 'prompt' is empty"),
    ],
)
def test_a_bad_row_is_named_with_its_place_and_column(raw, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        checked({"prompt": "p", "completion": "c"}, raw)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "not a list of messages"),
        ([], "not a list of messages"),
        ([{"role": "robot", "content": "x"}], "message 0 of column 'messages' needs a role"),
        (turns("only a question"), "no assistant message"),
        ([*turns("q", "a"), {"role": "user"}], "message 2: column 'content' is missing"),
    ],
)
def test_bad_messages_are_named(messages, complaint):
    with pytest.raises(UserError, match=complaint):
        checked({"messages": messages})


def test_unknown_columns_are_listed_and_near_ones_suggested():
    with pytest.raises(UserError, match="'a', 'b' are none of messages; prompt/completion"):
        checked({"a": "x", "b": "y"})
    with pytest.raises(UserError, match="no column 'querry'; did you mean 'query'"):
        checked({"query": "x", "reply": "y"}, columns={"prompt": "querry"})


def test_a_name_that_is_none_of_ours_maps_no_column():
    """Of `completions: reply` nothing came, and a column of another name was learned."""
    rows = {"prompt": "p", "reply": "the right answer", "completion": "another"}
    with pytest.raises(UserError, match="columns: 'completions' is no column of ours; did you mean 'completion'"):
        checked(rows, columns={"completions": "reply"})


def test_no_rows_are_an_error():
    with pytest.raises(UserError, match="x: no rows"):
        checked()


# The split of rows


few_texts = st.lists(st.sampled_from("abcdefghij").map(lambda c: {"text": c}), min_size=1, max_size=40)


@quickly
@given(few_texts, st.floats(0, 0.9), st.none() | st.integers(1, 50))
def test_equal_rows_fall_on_one_side_and_the_counts_add_up(many, share, limit):
    made = rows.split(rows.Gathered(many), "text", share, limit)
    train, held_out = ({r["text"] for r in side} for side in (made.train, made.held_out))
    assert not train & held_out
    used = many[:limit] if limit else many
    assert sorted(r["text"] for r in (*made.train, *made.held_out)) == sorted(r["text"] for r in used)
    assert made.counts["read"] == len(many)
    assert made.counts["read"] == sum(v for k, v in made.counts.items() if k != "read")
    assert (made.counts["train"], made.counts["held_out"]) == (len(made.train), len(made.held_out))


@quickly
@given(st.integers(1, 60), st.floats(0, 0.9))
def test_of_rows_that_all_differ_the_share_asked_for_is_set_aside(n, share):
    held_out = rows.split(rows.Gathered([{"text": str(i)} for i in range(n)]), "text", share, None).held_out
    # At least one on either side: a share of few rows would round to none, or to all.
    assert len(held_out) == (min(max(1, round(share * n)), n - 1) if share and n > 1 else 0)


def test_a_row_stays_on_its_side_when_the_others_are_shuffled():
    many = [{"text": str(i)} for i in range(40)]
    one, other = (
        rows.split(rows.Gathered(many), "text", 0.3, None),
        rows.split(rows.Gathered(many[::-1]), "text", 0.3, None),
    )
    assert one.held_out == other.held_out[::-1]
    assert rows.split(rows.Gathered(many), "text", 0.3, None) == one


@pytest.mark.parametrize("talks", [False, True])
def test_rows_with_one_question_fall_on_one_side(talks):
    def row(asked, answered):
        talk = [("system", "s"), ("user", f"q{asked}"), ("assistant", f"a{answered}")]
        plain = {"prompt": f"q{asked}", "completion": f"a{answered}"}
        return {"messages": [{"role": r, "content": c} for r, c in talk]} if talks else plain

    def asked(side):
        return {made["messages"][1]["content"] if talks else made["prompt"] for made in side}

    found, shape = checked(*(row(i % 25, i) for i in range(100)))
    made = rows.split(found, shape, 0.1, None)
    assert not asked(made.train) & asked(made.held_out)
    assert 10 <= len(made.held_out) <= 13
    alike, shape = checked(*(row(0, i) for i in range(100)))  # one question alone: equal rows stay together
    assert len(rows.split(alike, shape, 0.1, None).held_out) == 10


def test_the_hash_of_a_split_depends_on_rows_and_sides():
    a, b = {"text": "a"}, {"text": "b"}
    hashes = {rows.make_split(*sides, "text", {}).sha256 for sides in [([a], [b]), ([b], [a]), ([a], [])]}
    assert len(hashes) == 3


# Files


PAIRS = [{"prompt": f'say "{i}",\nplease', "completion": f"ünïcode {i}"} for i in range(20)]


def write(path, content):
    """Rows in the format that the name of the file says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, content[0])
            writer.writeheader()
            writer.writerows(content)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Parquet files are read by way of a cache, which is not to be the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("own_cache")
def test_every_kind_of_file_reads_alike(tmp_path):
    kinds = (".jsonl", ".json", ".csv", ".parquet")
    splits = [File(path=write(tmp_path / f"rows{kind}", PAIRS), held_out=0.25).read() for kind in kinds]
    assert all(s == splits[0] for s in splits)
    made = splits[0]
    assert made.shape == "prompt/completion"
    assert made.counts == {"read": 20, "train": 15, "held_out": 5, "over_the_limit": 0}
    assert sorted((*made.train, *made.held_out), key=PAIRS.index) == PAIRS


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_good_file_passes_the_check(tmp_path, kind):
    File(path=write(tmp_path / f"rows{kind}", PAIRS)).check()


def test_texts_of_a_jsonl_file_and_of_a_txt_file_are_text_rows(tmp_path):
    text = "a paragraph\nof two lines\n\nanother"
    (tmp_path / "a.txt").write_text(text)
    of_txt = File(path=tmp_path / "a.txt", held_out=0).read()
    of_jsonl = File(path=write(tmp_path / "a.jsonl", [{"text": text}]), held_out=0).read()
    assert (of_txt.train, of_txt.held_out, of_txt.shape) == (of_jsonl.train, of_jsonl.held_out, of_jsonl.shape)
    assert of_txt.sha256 == of_jsonl.sha256


def test_a_text_file_is_split_at_the_end_of_a_paragraph_and_loses_nothing(tmp_path):
    text = "".join(f"Paragraph {i} is of this length.\n\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    made = File(path=tmp_path / "a.txt", held_out=0.2).read()
    (train,), (held_out,) = made.train, made.held_out
    assert joined([train, held_out]) == text
    assert held_out["text"].startswith("Paragraph 8")
    assert len(held_out["text"]) == pytest.approx(0.2 * len(text), rel=0.1)
    assert made.counts == {"read": 2, "train": 1, "held_out": 1}


def test_a_text_without_paragraphs_is_split_where_the_share_ends(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    made = File(path=tmp_path / "a.txt", held_out=0.1).read()
    assert [len(r["text"]) for r in (*made.train, *made.held_out)] == [90, 10]


def test_a_limit_uses_the_first_rows_and_counts_the_others(tmp_path):
    made = File(path=write(tmp_path / "a.jsonl", PAIRS), limit=8, held_out=0.25).read()
    assert made.counts == {"read": 20, "train": 6, "held_out": 2, "over_the_limit": 12}
    assert {r["completion"] for r in (*made.train, *made.held_out)} == {r["completion"] for r in PAIRS[:8]}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": oops}\n', "a.jsonl:2: column 10: not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"}\n', "a.jsonl:2: the line is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": ""}\n', "a.jsonl:2: column 'text' is empty"),
        ("a.json", '[{"text": "x"},\n{"text" "y"}]', "a.json:2: column 9: not JSON"),
        ("a.json", '{"text": "x"}', "a .json file of rows is a list"),
        ("a.json", '[{"text": "x"}, {"text": 3}]', "a.json: row 1: column 'text' is 3"),
        ("a.csv", "prompt,completion\nx,y\nz\n", "a.csv:3: the line has"),
        ("a.csv", "prompt,completion\nx,y,z\n", "a.csv:2: the line has"),
        ("a.txt", " \n", "a.txt: the file is empty"),
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.parquet", "PAR1, and cut off", "is not a whole .parquet file"),
        ("a.xml", "<x/>", "not a .jsonl, .json, .csv, .parquet or .txt file"),
    ],
)
def test_the_check_names_file_line_and_column_of_what_is_wrong(tmp_path, name, content, complaint):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(complaint)):
        File(path=tmp_path / name).check()


def test_the_check_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        File(path=tmp_path / "a.csv").check()


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\nGröße\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv:2: not UTF-8 text: byte 3 of the line is 0xf6"):
        File(path=tmp_path / "a.csv").check()


@pytest.mark.usefixtures("own_cache")
def test_a_parquet_column_that_json_does_not_know_is_a_users_error(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": datetime.datetime(2020, 1, 1)}])
    with pytest.raises(UserError, match="column 'text' is"):
        File(path=path).read()


def test_a_csv_field_may_be_as_long_as_a_text(tmp_path):
    long = "word " * 30_000  # the csv module stops at 131,072 characters unless told otherwise
    made = File(path=write(tmp_path / "a.csv", [{"text": long}]), held_out=0).read()
    assert made.train == [{"text": long}]


# The reference manual


@pytest.fixture(scope="module")
def manual():
    return Pydoc().read()


def paragraphs(side):
    return {" ".join(p.split()) for row in side for p in re.split(r"\n\s*\n", row["text"])}


def test_the_sides_of_the_manual_share_no_paragraph(manual):
    shared = paragraphs(manual.train) & paragraphs(manual.held_out)
    assert [p for p in shared if len(p) >= SHARED_PARAGRAPH == 60] == []


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_manual_sets_aside_about_the_share_asked_for(share):
    made = Pydoc(held_out=share).read()
    held_out, train = (sum(len(r["text"]) for r in side) for side in (made.held_out, made.train))
    assert 0.8 * share < held_out / (held_out + train) < 1.1 * share
    shared = paragraphs(made.train) & paragraphs(made.held_out)
    assert max(map(len, shared), default=0) < SHARED_PARAGRAPH


def test_the_manual_is_read_alike_every_time_and_counted_whole(manual):
    from pydoc_data.topics import topics

    assert Pydoc().read() == manual
    counts = manual.counts
    assert counts["read"] == len(topics) == counts["train"] + counts["held_out"] + counts["inside_another"]


def test_no_text_of_the_manual_stands_in_another(manual):
    texts = [row["text"].strip() for row in (*manual.train, *manual.held_out)]
    long = [t for t in texts if len(t) >= SHARED_PARAGRAPH]
    assert [t for t in long if sum(t in other for other in texts) != 1] == []


# Docstrings


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A cache of its own, with the standard library parsed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Docstrings().read()


@pytest.mark.slow
def test_no_prompt_of_the_docstrings_stands_twice(library):
    prompts = [row["prompt"] for row in (*library.train, *library.held_out)]
    assert len(prompts) == len(set(prompts)) > 3000
    assert not {r["prompt"] for r in library.train} & {r["prompt"] for r in library.held_out}


@pytest.mark.slow
def test_docstrings_are_split_by_module(library):
    module_of = {}
    for module, prompt, _ in Docstrings()._pairs():
        module_of.setdefault(prompt, module)
    train, held_out = ({module_of[r["prompt"]] for r in side} for side in (library.train, library.held_out))
    assert not train & held_out
    assert 0.05 < len(held_out) / len(train | held_out) < 0.15


@pytest.mark.slow
def test_docstrings_are_split_alike_every_time_and_counted_whole(library):
    assert Docstrings().read() == library
    counts = library.counts
    assert counts["read"] == len(Docstrings()._pairs()) == sum(v for k, v in counts.items() if k != "read")
    assert library.shape == "prompt/completion"


@pytest.mark.slow
def test_a_larger_share_of_docstrings_only_adds_modules(library):
    more = {r["prompt"] for r in Docstrings(held_out=0.3).read().held_out}
    assert {r["prompt"] for r in library.held_out} < more


@pytest.mark.slow
def test_longer_functions_are_left_out_and_counted(library):
    short = Docstrings(max_characters=300).read()
    assert max(len(r["prompt"]) for r in (*short.train, *short.held_out)) <= 300
    assert short.counts["too_long"] > library.counts["too_long"]
    assert short.counts["read"] == library.counts["read"]


@pytest.mark.slow
def test_a_prompt_is_a_function_without_its_docstring_and_the_question(library):
    for row in library.train[:500]:
        code = row["prompt"].removesuffix(QUESTION)
        assert code != row["prompt"]
        if not code.startswith(" "):  # what holds a string that begins at the margin stays indented
            (function,) = ast.parse(code).body
            assert ast.get_docstring(function) is None
        assert len(row["completion"]) >= 15
        assert "\n" not in row["completion"]


def pairs_of(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    return list(docstrings._pairs_of_library(tmp_path))


METHOD = '''
class A:
    @property
    def size(self,
             unit=1):
        """The size of it
        in units.

        A second paragraph.
        """
        # counted

        return len(self) * unit
'''


def test_a_pair_is_made_of_a_method(tmp_path):
    code = "def size(self,\n         unit=1):\n    # counted\n    return len(self) * unit"
    assert pairs_of(tmp_path, METHOD) == [("module.py", code + QUESTION, "The size of it in units.")]


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """It has a docstring and nothing else."""\n',
        'def f():\n    """Short."""\n    return 1\n',
        "def f():\n    return 1\n",
        'def f(): """All of it stands on one line."""; return 1\n',
    ],
)
def test_no_pair_is_made_of_what_says_too_little(tmp_path, source):
    assert pairs_of(tmp_path, source) == []


def test_tests_of_the_library_are_left_out(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "module.py").write_text(METHOD)
    assert list(docstrings._pairs_of_library(tmp_path)) == []


def test_a_form_feed_does_not_move_the_lines(tmp_path):
    # Older modules set their sections apart by it; `str.splitlines` takes it for a line's end, the parser does not.
    assert pairs_of(tmp_path, "\f\n" + METHOD) == pairs_of(tmp_path, METHOD)


# Continuations


@pytest.fixture(scope="module")
def continuations():
    """The file of lm-eval's task `pydoc_continuation`."""
    file = bundled("evals") / "lm_eval" / "pydoc_continuation.py"
    spec = importlib.util.spec_from_file_location("pydoc_continuation", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def questions(continuations):
    return continuations.questions()


def test_every_question_has_four_distinct_choices(questions):
    assert len(questions) > 50
    assert all(len(set(q["choices"])) == len(q["choices"]) == 4 for q in questions)


def test_the_right_answer_goes_on_from_the_context_and_the_others_do_not(questions, manual):
    texts = [" ".join(w for w in r["text"].split() if any(map(str.isalnum, w))) for r in manual.held_out]
    for question in questions:
        goes_on = [any(f"{question['context']} {c}" in t for t in texts) for c in question["choices"]]
        assert [i for i, right in enumerate(goes_on) if right] == [question["label"]]


def test_every_place_is_right_about_as_often_as_another(questions):
    labels = [q["label"] for q in questions]
    assert all(0.12 < labels.count(i) / len(labels) < 0.4 for i in range(4))


def test_questions_are_the_same_every_time_and_written_once(continuations, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    path = continuations.file()
    assert path.is_relative_to(tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == questions
    monkeypatch.setattr(continuations, "questions", lambda: pytest.fail("made again"))
    assert continuations.file() == path


# What changes the meaning of a row


def messages_of(raw, columns=None):
    (row,), _ = checked(raw, columns=columns)
    return row["messages"]


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"instruction": "do", "output": "done", "system": "be kind"}, [SYSTEM, *turns("do", "done")]),
        ({"question": "q", "answer": "a", "system_prompt": "be kind"}, [SYSTEM, *turns("q", "a")]),
        (
            {"instruction": "c", "output": "d", "system": "be kind", "history": [["a", "b"]]},
            [SYSTEM, *turns("a", "b", "c", "d")],
        ),
        ({"instruction": "c", "output": "d", "history": '[["a", "b"]]'}, turns("a", "b", "c", "d")),
        ({"instruction": "c", "output": "d", "history": [], "system": ""}, turns("c", "d")),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "be kind"},
            [SYSTEM, *turns("q", "a")],
        ),
        (
            {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
            [turns("a")[0], {**turns("a", "b")[1], "weight": 0}, *turns("c", "d")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, turns("", "a")[1]]},
            turns("q", "a"),
        ),
        ({"messages": json.dumps(turns("q", "a"))}, turns("q", "a")),
        ({"messages": [{"role": "developer", "content": "be kind"}, *turns("q", "a")]}, [SYSTEM, *turns("q", "a")]),
        (
            {"messages": [turns("q")[0], {**turns("", "a")[1], "train": False}, *turns("r", "b")]},
            [turns("q")[0], {**turns("", "a")[1], "weight": 0}, *turns("r", "b")],
        ),
    ],
)
def test_what_changes_the_meaning_is_used(raw, expected):
    assert messages_of(raw) == expected


def test_calls_of_tools_have_one_form():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    forms = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ]
    for form in forms:
        assert messages_of({"messages": [turns("q")[0], form]})[1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [call],
        }


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "'chosen' and 'rejected' are preferences"),
        ({"messages": turns("q", "a"), "chosen": [], "rejected": []}, "'chosen' and 'rejected' are preferences"),
        ({"prompt": "p", "completion": "c", "label": False}, "'label' says which completions are bad"),
        ({"prompt": "p", "completion": "c", "system": "be kind"}, "column 'system' has no place beside a prompt"),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "f"}]}, "column 'tools' has no place"),
        ({"messages": turns("q", "a"), "images": ["a.png"]}, "column 'images': a language model reads text only"),
        ({"messages": turns("q", "a"), "tools": ["f"]}, "column 'tools' is [\"f\"], not a list of tools"),
        ({"messages": turns("q", "a"), "tools": [{"type": "function"}]}, "tool 0 of column 'tools' has no function"),
        ({"messages": [SYSTEM, *turns("q", "a")], "system": "other"}, "a system turn stands in column 'system'"),
        ({"messages": [{**turns("q")[0], "weight": 1}, turns("", "a")[1]]}, "'weight' is 1 on a turn of role 'user'"),
        ({"messages": [turns("q")[0], {**turns("", "a")[1], "weight": 0.5}]}, "'weight' is 0.5"),
        ({"messages": [turns("q")[0], {**turns("", "a")[1], "weight": 0}]}, "no assistant message to learn from"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, turns("", "a")[1]]}, 'type "image_url"'),
        ({"instruction": "c", "output": "d", "history": [["a"]]}, "column 'history': item 0 is no pair"),
        ({"instruction": "c", "output": "d", "input": 5}, "column 'input' is 5, not text"),
        ({"messages": turns("q", "a"), "chat_template_kwargs": [1]}, "column 'chat_template_kwargs' is [1]"),
        ({"prompt": turns("q"), "completion": "a"}, "column 'completion' is not a list of messages"),
    ],
)
def test_what_has_no_use_is_refused_by_name(raw, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        checked(raw)


def test_what_was_chosen_can_be_learned_by_naming_it():
    raw = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert checked(raw, columns={"completion": "chosen", "prompt": "prompt"})[0] == [{"prompt": "p", "completion": "a"}]
    talk = {"chosen": turns("q", "a"), "rejected": turns("q", "b")}
    assert messages_of(talk, {"messages": "chosen"}) == turns("q", "a")


def test_columns_that_nothing_is_made_of_are_listed(tmp_path):
    rows_of_file = [{"id": i, "query": f"q{i}", "answer": "a", "prompt": "old"} for i in range(3)]
    made = File(path=write(tmp_path / "a.csv", rows_of_file), columns={"question": "query"}).read()
    assert (made.shape, made.unused) == ("question/answer", ("id", "prompt"))
