"""Chat templates that compute end in one line; real ones are rendered as transformers renders them."""

import resource
import time

import pytest
from chat_templates import FAMILIES, TALK
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from llmq.errors import UserError
from llmq.guarded import templates
from llmq.text.conversation import Conversation, TemplateTooCostly
from llmq.text.tokens import encode

ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]}
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
BOMBS = {
    "{{ 1/0 }}": "division by zero",
    "{{ '%999999999d'|format(1) }}": "more than",
    "{{ '%999999999d' % 1 }}": "more than",
    "{{ messages[0].content|center(10**9) }}": "more than",
    "{{ messages[0].content.ljust(10**10) }}": "more than",
    "{{ '{:>999999999}'.format(1) }}": "more than",
    "{{ 'x' * 10**10 }}": "more than",
    "{{ [1] * 10**10 }}": "more than",
    "{{ 'a'|indent(10**10, true) }}": "more than",
    "{{ messages|tojson(indent=10**9) }}": "more than",
    "{{ ('a' * 10**6)|replace('', 'b' * 10**6) }}": "more than",
    "{{ ['a']|map('center', 10**9)|list }}": "more than",
    "{{ range(99999)|join(messages[0].content * 99999) }}": "more than",
    DOUBLED: "more than",
    DOUBLED.replace("n.x + n.x", "n.x ~ n.x"): "more than",
    DOUBLED.replace("n.x + n.x", "[n.x, n.x]") + "{{ n.x }}": "more than",
    "{{ 10**(10**8) }}": "more than 4096 bits",
    "{% macro m(x, n) %}{% if n %}{{ m(x + x, n - 1) }}{% endif %}{% endmacro %}{{ m('ab', 90) }}": "more than",
    "{% macro m(n) %}{% if n %}{% set x = m(n - 1) %}{{ x }}{{ x }}{% endif %}ab{% endmacro %}{{ m(90) }}": "more than",
    "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60: "more than",
    "{% for i in range(9999) %}{{ messages[0].content * 99999 }}{% endfor %}": "more than",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}": "more than 4096 bits",
    "{{ 1.5|round(10**9, 'ceil') }}": "rounds to 1000000000 digits",
    "{% for i in range(10**9) %}a{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than",
    "{{ range(99999)|select('in', range(99999)|map('string')|list)|list }}": "more than",
    "{{ lipsum(n=10**9) }}": "more than",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "too deep",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}": "more than",
    "{% for i in [[[]]] recursive %}{{ loop([i]) }}{% endfor %}": "too deep",
    "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}": "too deep",
    "{% if 1 %}" * 120 + "a" + "{% endif %}" * 120: "too deep",
    "{% for i in [1] %}" * 30 + "a" + "{% endfor %}" * 30: "too deep",
}


@pytest.fixture
def tokenizer(tiny_llama, monkeypatch):
    """A tokenizer whose template a test sets; bounds that are reached soon."""
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "LONGEST", 10**7)
    monkeypatch.setattr(templates, "_the_clock", templates._Clock())
    monkeypatch.setattr(templates, "MEMORY", 128 * 2**20)
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda text: text[:40])
def test_a_template_that_computes_ends_in_one_line(tokenizer, bomb):
    tokenizer.chat_template = bomb + "{{ messages[0].content }}"
    limits, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    with pytest.raises(UserError) as caught:
        encode(ROW, tokenizer)
    assert time.monotonic() - began < 5
    assert BOMBS[bomb] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_one_that_computes_for_some_messages_alone_is_not_tried_again(tokenizer):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = f"{{% if messages|length == 1 %}}{loop}{{% endif %}}{{{{ messages }}}}"
    with pytest.raises(TemplateTooCostly, match=r"takes more than 0.2 s"):
        encode(ROW, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_real_templates_are_rendered_as_transformers_renders_them(tokenizer, name, monkeypatch):
    from transformers.utils import chat_template_utils as theirs

    family = FAMILIES[name]
    tokenizer.bos_token = family.bos
    tokenizer.chat_template = family.template
    turns = [{"role": r, "content": said} for r, said in TALK if family.has_system or r != "system"]
    ours, spans = Conversation({"messages": turns}, tokenizer), Conversation({"messages": turns}, tokenizer).tagged()
    text = ours.render(turns)
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
        theirs._compile_jinja_template.cache_clear()
        assert tokenizer.apply_chat_template(turns, tokenize=False) == text
        assert Conversation({"messages": turns}, tokenizer).tagged() == spans
    theirs._compile_jinja_template.cache_clear()


def test_templates_of_a_folders_tasks_reach_nothing(tmp_path):
    from lm_eval_tasks import CHOICE, write

    from llmq import plugin, trust
    from llmq.harness.data import built

    text = "{{ ''.__class__.__mro__[1].__subclasses__()|length }}"
    asked = plugin.build(
        {"lm_eval": {"tasks": [write(tmp_path, "reach", {**CHOICE, "doc_to_text": text})], "include_path": tmp_path}},
        "tasks",
    )._asked()
    built.cache_clear()
    with pytest.raises(Exception, match="unsafe"):
        built(asked)
    trust.given(remote_code=True)
    built(asked)
    built.cache_clear()
