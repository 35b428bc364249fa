"""Names and data are shown harmless on the terminal, in Markdown and in the page, each read again by its own reader."""

import io
import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import exit_code
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from llmq import harmless
from llmq.artifact import Artifact, Failure, Stage
from llmq.errors import UNSEEN, UserError, one_line, visible
from llmq.files import to_json
from llmq.report import Report, html, markdown, screen
from llmq.types import Exhibit, Measurement

PIECES = [
    *("\x1b[2J", "\x1b]0;x\x07", "\r", "\n", "\t", "\x9b", "\x00", "\u202e", "\u200b", "\ud800", "[/x]", "[bold]"),
    *("[red]a[/]", ":smile:", "```", "`", "|", "||", "~~", "*", "**", "_", "__", "\\", "<", ">", "&lt;", "&#x3c;"),
    *("<script>alert(1)</script>", "<img src=x onerror=y>", "[a](javascript:b)", "![a](b)", "[", "]", "](", "# ", "- "),
    *("1. ", "> ", "$a$", "$\\bad$", "{{ 1/0 }}", "{% x %}", '"', "'", "-->", "]]>", "</pre>", "a", "word", " ", "é"),
    *("字", "\u200d", "%s", "<https://a.b>", "[x]", "[ ] "),
]
NASTY = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=6).map("".join)
FACTS = {"data_sha256": {}, "libraries": {}}


def report(name: str) -> Report:
    """A report in which a name stands wherever a name or a text of data can stand."""
    facts = {**FACTS, "reads": [f"{name} reads"], "device": name, "libraries": {"lib": name}, "trusted": [name]}
    told = [Measurement(f"t{name}", f"m{name}", v, f"u{name}", "lower", 1, None, name, exact=True) for v in (1.0, 2.0)]
    shown = Exhibit(f"t{name}", f"h{name}", f"in {name}", f"out {name}", f"ref {name}")
    stages = []
    for i, m in enumerate(told):
        artifact = Artifact(None, None, notes={"seconds": 1.0, name: name})  # type: ignore[arg-type]
        object.__setattr__(artifact, "weight_files", list)
        stages.append(Stage(f"{i}-{name}", artifact, (m,), (shown,), (name,), (Failure(name, "score", name),)))
    return Report.of({"name": name}, facts, stages, stages[0].name)


def tags(tokens) -> list[str]:
    """What a Markdown reader makes of a text, without the texts themselves."""
    return [
        t.type for token in tokens for t in (token, *(token.children or ())) if t.type not in ("text", "text_special")
    ]


def structure(page: str) -> list[tuple[str, ...]]:
    """The tags of a page with the names of their attributes, but for the places where a long name may break."""
    found: list[tuple[str, ...]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attrs: found.append((tag, *(key for key, _ in attrs)))  # type: ignore[method-assign]
    reader.handle_comment = lambda data: found.append(("comment", data))  # type: ignore[method-assign]
    reader.feed(page)
    return [tag for tag in found if tag != ("wbr",)]


PLAIN = report("x")
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@settings(max_examples=10, deadline=None)
@given(NASTY)
@example("".join(PIECES))
@example("a\n```\n# b")
def test_a_name_changes_nothing_of_what_is_around_it(name):
    check_faces(name)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(NASTY)
def test_many_names_change_nothing_of_what_is_around_them(name):
    check_faces(name)


def check_faces(name: str) -> None:
    """See that a name leaves the structure of every face as it is."""
    told = report(f"x{name}x")
    text = markdown.draw(told)
    assert tags(READER.parse(text)) == tags(READER.parse(markdown.draw(PLAIN)))
    page = html.draw(told, Path())
    assert structure(page) == structure(html.draw(PLAIN, Path()))
    out = io.StringIO()
    screen.show(told, Console(file=out, width=400))
    for face in (text, page, out.getvalue()):
        assert not UNSEEN.search(face), UNSEEN.search(face)
        face.encode()


def test_the_text_of_a_picture_ends_where_it_ends(tmp_path):
    for name in ("a] b", "[a", "a](x)", "\\]", "`]`"):
        (inline,) = (t for t in READER.parse(f"![{harmless.alternative(name)}](<f.png>)") if t.type == "inline")
        (image,) = inline.children
        assert (image.type, image.content) == ("image", harmless.alternative(name))


@settings(max_examples=100, deadline=None)
@given(NASTY)
def test_each_face_says_what_it_was_given(name):
    shown = visible(name)
    assert not UNSEEN.search(shown)
    assert shown.encode().decode("utf-8") == shown
    assert harmless.cell(name).plain == shown
    # Markdown, read by a reader of its own, gives back the text but for blanks and breaks of lines.
    (inline,) = (t for t in READER.parse(f"x {harmless.markdown(name)} x") if t.type == "inline")
    said = "".join(t.content for t in inline.children)
    assert said.replace("⏎", " ").split() == f"x {shown} x".replace("⏎", " ").split()
    fence, *others = READER.parse(harmless.fenced(name))
    assert not others
    assert fence.type == "fence"
    assert fence.content.rstrip("\n").replace("\r", "") == shown.rstrip("\n")
    if "\ud800" not in name and name.isprintable():
        assert shown == name
    kept = to_json({name: name}, indent=1)
    assert not UNSEEN.search(kept)
    assert json.loads(kept) == {name: name}
    for error in (UserError(name), ValueError(name)):
        assert not UNSEEN.search(one_line(error))
        assert "\n" not in one_line(error)


def test_a_joiner_of_persian_or_of_emoji_belongs_to_the_text():
    for text in ("می\u200cخواهم", "\U0001f469\u200d\U0001f52c", "a\tb\nc"):
        assert visible(text) == text


@pytest.mark.parametrize("name", ["\x1b[31mred", "[/x]", "\u202eevil"])
def test_what_the_command_line_quotes_back_moves_no_cursor(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = (["run", name], ["eval", name, "--suite", "x"], ["gate", name, "--rule", name], ["show", name], [name])
    for words in (*commands, ["compare", name], ["run", "text/quickstart", f"seed={name}"], ["list", name]):
        assert exit_code(*words) == 2, words
        said = capsys.readouterr()
        assert not UNSEEN.search(said.err + said.out), words
        assert said.err.count("\n") == 1, words


def test_names_of_charts_are_no_mathematics():
    from llmq.report import charts

    told = asdict(report("a"))
    for m, value in zip(told["measurements"], (1e6, 2e6), strict=True):
        m |= {"metric": "bytes_on_disk", "value": value, "unit": "bytes"}
    names = {"0-a": "0-$\\bad$", "1-a": "1-$x$<b>"}
    for entries in (told["stages"], told["measurements"]):
        for entry in entries:
            key = "name" if "name" in entry else "stage"
            entry[key] = names[entry[key]]
    told["measurements"] += [{**m, "metric": "psnr", "unit": "dB"} for m in told["measurements"]]
    drawn = charts.draw(Report(**told))["Size against quality"]
    assert "0-$\\bad$" in drawn
    assert "1-$x$&lt;b&gt;" in drawn
