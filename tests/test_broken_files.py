"""Broken files of rows: one line that names the place, or rows, and never anything else."""

import io
import json
import random

import pytest

from llmq.data.file import File
from llmq.errors import UserError
from llmq.types import Split

ROWS = [
    {"prompt": f'say "{i}",\nplease', "completion": f"ünïcode {i}", "extra": [{"b": i}, {"a": None}]} for i in range(6)
]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a"}],
                "weight": 1,
                "tool_calls": [{"function": {"name": "f"}}],
            },
        ],
        "tools": [{"name": "f"}],
    }
] * 4
PIECES = [
    b'"',
    b"\\ud800",
    b"\xff",
    b"\0",
    b"\r",
    b"\n",
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b"NaN",
    b"1e999",
    b"\xef\xbb\xbf",
]
PIECES += [
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b"null",
    b"true",
    b'""',
    b"\xe2\x80\xa8",
    b"-",
    b"PAR1",
    b"\x1f\x8b",
]


def parquet(rows):
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def whole_files():
    text = [{k: v for k, v in row.items() if k != "extra"} for row in ROWS]
    head = "prompt,completion\n" + "".join(
        f'"{r["prompt"].replace(chr(34), 2 * chr(34))}",{r["completion"]}\n' for r in text
    )
    return [
        (".csv", head.encode()),
        (".csv", b"text,n\none,1\ntwo,2\n"),
        (".txt", "Ünï one.\n\nTwo.\r\nThree.\n".encode() * 9),
        *((".jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode()) for rows in (ROWS, TALKS)),
        *((".json", json.dumps(rows).encode()) for rows in (ROWS, TALKS)),
        *((".parquet", parquet(rows)) for rows in (ROWS, TALKS)),
    ]


def broken(content, dice):
    """The content after a few accidents."""
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(content) + 1)
        length = dice.choice([0, 1, 1, 2, 8, len(content)])
        kind = dice.randrange(4)
        put = [b"", dice.choice(PIECES), dice.randbytes(dice.randint(1, 4)), content[place : place + 20]][kind]
        content = content[:place] + put + content[place + length :]
    return content


def outcome(path):
    """The message of the error, or nothing for a split; anything else goes up."""
    try:
        made = File(path=path).read()
    except UserError as error:
        message = str(error)
    else:
        assert isinstance(made, Split)
        assert made.train or made.held_out
        json.dumps([*made.train, *made.held_out], ensure_ascii=False, allow_nan=False).encode()
        return ""
    assert "\n" not in message
    assert len(message.encode()) < 700
    return message


def test_whatever_happens_to_a_file_it_is_a_split_or_a_users_error(tmp_path):
    dice = random.Random(12)
    files = whole_files()
    assert all(outcome(write(tmp_path / f"whole{i}{kind}", content)) == "" for i, (kind, content) in enumerate(files))
    messages = []
    for i in range(600):
        kind, content = files[i % len(files)]
        messages.append(outcome(write(tmp_path / f"a{kind}", broken(content, dice))))
    assert 100 < sum(map(bool, messages)) < 600


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


GOOD = '{"text": "x"}\n'
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", 'prompt,completion\nx,y\n"a,1\nb,2\nc,3\nd,4\n', "a.csv:3: a quoted field begins here"),
        ("a.csv", 'prompt,completion\nx,y\na,"1\nb,2\nc,3"\nd,4\n', "a.csv:3: a quoted field begins here"),
        ("a.csv", 'prompt,completion\n"a,1\nb,2\n"c",3\n', "a.csv:2: a quoted field begins here"),
        ("a.csv", 'prompt,completion\n"a"b,1\n', "a.csv:2: not CSV"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the column 'text' stands twice"),
        ("a.csv", "text,n\na,1\n\nb,2\n", "a.csv:3: the line has 0 of the 2 columns"),
        ("a.csv", "text\na\0b\n", "a.csv:2: a NUL byte"),
        ("a.txt", "one\ntwo\0\n", "a.txt:2: a NUL byte"),
        ("a.txt", "one\n".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00\x00", "a.jsonl: compressed by gzip"),
        ("a.jsonl", GOOD + '{"text": "y", "n": ' + "7" * 5000 + "}\n", "a.jsonl:2: a number of 5000 digits"),
        ("a.jsonl", GOOD + '{"text": "\\ud800"}\n', "a.jsonl:2: column 'text' cannot be used: half a character"),
        ("a.jsonl", GOOD + '{"text": ' + DEEP + "}\n", "a.jsonl:2: lists or objects are nested too deep"),
        ("a.jsonl", GOOD + '{"text": "y", "n": NaN}\n', "a.jsonl:2: NaN is no JSON"),
        ("a.jsonl", GOOD + '{"text": "y", "n": -Infinity}\n', "a.jsonl:2: -Infinity is no JSON"),
        ("a.jsonl", GOOD + '{"text": "y", "text": "z"}\n', 'a.jsonl:2: the key "text" stands twice'),
        ("a.json", f'[{GOOD},\n{{"text": {DEEP}}}]', "a.json:3: row 1: lists or objects are nested too deep"),
        ("a.json", f'[{GOOD},\n{{"text": {"7" * 5000}}}]', "a.json:3: row 1: a number of 5000 digits"),
        ("a.json", f"[{GOOD}] x", "a.json:2: column 3: not JSON: extra data"),
        ("a.json", "7", "a .json file of rows is a list of objects"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.parquet", b"PAR1" + bytes(60) + b"PAR1", "a.parquet: from row 0: cannot be read"),
    ],
)
def test_the_line_names_what_is_wrong(tmp_path, name, content, complaint):
    assert complaint in outcome(write(tmp_path / name, content))


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    for name, content in (("a.jsonl", GOOD), ("a.json", f"[{GOOD}]"), ("a.csv", "text\nx\n"), ("a.txt", "x")):
        made = File(path=write(tmp_path / name, b"\xef\xbb\xbf" + content.encode()), held_out=0).read()
        assert made.train == [{"text": "x"}]


def test_a_csv_whose_texts_go_over_lines_is_read(tmp_path):
    poem = 'a line, of two\nanother, of two\nand, "more"'
    quoted = poem.replace('"', '""')
    for rows in (2, 5):
        path = write(tmp_path / "a.csv", "text,n\n" + f'"{quoted}",1\n' * rows)
        assert File(path=path, held_out=0).read().train == [{"text": poem}] * rows


def test_parquet_with_columns_of_every_kind_is_read(tmp_path):
    rows = [{"text": "x", "picture": b"\xff\x00", "nested": {"a": [1, None]}, "when": None}]
    made = File(path=write(tmp_path / "a.parquet", parquet(rows)), held_out=0).read()
    assert (made.train, made.unused) == ([{"text": "x"}], ("picture", "nested", "when"))
    for value in (b"\xff", ["x"], {"a": 1}):
        path = write(tmp_path / "a.parquet", parquet([{"text": value}]))
        assert "column 'text' is" in outcome(path)


@pytest.mark.parametrize("held_out", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "text",
    [
        "one two three\nfour five\nsix seven eight nine\n" * 7,
        "".join(f"Paragraph {i}.\nIt has two lines.\n\n" for i in range(9)),
        "no line ends here but there are words " * 5,
        "one line\nanother",
        "x" * 50,
        "\n\n a\n\n",
    ],
)
def test_the_parts_of_a_text_are_the_text(tmp_path, text, held_out):
    from llmq.text.windows import joined

    made = File(path=write(tmp_path / "a.txt", text), held_out=held_out).read()
    parts = [row["text"] for row in (*made.train, *made.held_out)]
    assert joined([*made.train, *made.held_out]).strip() == text.strip()
    assert all(part in text for part in parts)
    if "\n" in text.strip():
        assert all(text.startswith(part) or text[text.index(part) - 1] == "\n" for part in parts)
