"""Conversations under the chat templates of well-known families: what is said token by token, one BOS, one end mark."""

import json
import re

import pytest
from chat_templates import CHATML, DEEPSEEK_R1, FAMILIES, GEMMA, LLAMA_2, LLAMA_3, PHI_3, QWEN_3, TAGGED, TALK, ZEPHYR
from tiny_text_models import trained_bpe

from llmq.errors import UserError
from llmq.text import rows
from llmq.text.conversation import Conversation
from llmq.text.prompting import Prompting
from llmq.text.tokens import encode, encode_all, unused


@pytest.fixture(scope="module")
def bpe():
    return trained_bpe().to_str()


@pytest.fixture(scope="module")
def tokenizer_of(bpe):
    """The tokenizer of a family: byte-level, with the family's marks and template."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def make(family, begins=False):
        def marks(*names):
            return [AddedToken(name, special=True, normalized=False, **family.more) for name in names]

        plain = Tokenizer.from_str(bpe)
        plain.add_special_tokens(marks(*filter(None, (family.bos, family.eos)), *family.special))
        if begins:  # as Llama's: a mark before every text
            begin = (family.bos, plain.token_to_id(family.bos))
            plain.post_processor = TemplateProcessing(f"{family.bos} $A", None, [begin])
        made = PreTrainedTokenizerFast(
            tokenizer_object=plain, bos_token=family.bos, eos_token=family.eos, extra_special_tokens=[*family.special]
        )
        made.chat_template = family.template
        return made

    return make


def talk(family, turns=TALK):
    """A row of turns; what the assistant says has blanks around it where the family strips them."""
    return {
        "messages": [
            {"role": role, "content": f" {said}\n" if family.padded and role == "assistant" else said}
            for role, said in turns
            if family.has_system or role != "system"
        ]
    }


def stops(family, tokenizer):
    return tokenizer.convert_tokens_to_ids(list(family.stops))


def pieces(tokens, tokenizer):
    """The text of an example in alternation: not said, said, not said …"""
    runs = []
    for i, (token, said) in enumerate(zip(tokens.ids, tokens.said, strict=True)):
        if not i or said != tokens.said[i - 1]:
            runs.append([])
        runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
def test_of_every_family_the_assistants_words_and_their_end_mark_are_said(name, tokenizer_of):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    tokens = encode(talk(family), tokenizer, stops(family, tokenizer))
    assert pieces(tokens, tokenizer) == list(family.pieces)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("knows_its_stops", [True, False])
def test_one_end_mark_that_the_model_stops_at_ends_every_example(name, knows_its_stops, tokenizer_of):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    ends = {*stops(family, tokenizer)} if knows_its_stops else {tokenizer.eos_token_id}
    tokens = encode(talk(family), tokenizer, ends)
    end = tokens.ids[-1]
    assert end in ends
    assert tokens.said[-1]
    answer = [t for t, said in zip(tokens.ids, tokens.said, strict=True) if said][-6:]
    assert sum(t in ends for t in answer) == 1


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.bos])
def test_a_template_that_writes_the_beginning_mark_gets_no_second_one(name, tokenizer_of):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family, begins=True)
    ids = encode(talk(family), tokenizer).ids
    written = tokenizer.apply_chat_template(talk(family)["messages"], tokenize=False)
    assert ids.count(tokenizer.bos_token_id) == written.count(family.bos)


@pytest.mark.parametrize("row", [{"text": "<s>one two"}, {"prompt": "<s>one", "completion": " two"}])
def test_a_text_that_begins_with_the_mark_gets_no_second_one(row, tokenizer_of):
    tokenizer = tokenizer_of(LLAMA_2, begins=True)
    bare = {key: value.removeprefix("<s>") for key, value in row.items()}
    assert encode(row, tokenizer).ids == encode(bare, tokenizer).ids
    assert encode(bare, tokenizer).ids[:2] == tuple(tokenizer("one").input_ids[:2])
    prompting = Prompting(tokenizer, raw=True)
    assert prompting.plain("<s>one") == prompting.plain("one") == tuple(tokenizer("one").input_ids)


def test_windows_over_a_text_that_begins_with_the_mark_have_it_once(tokenizer_of):
    from llmq.text.windows import windows_of

    tokenizer = tokenizer_of(LLAMA_2, begins=True)
    text = "one two three four five six seven"
    plain, marked = (windows_of(t, tokenizer, 8, bos=True) for t in (text, f"<s>{text}"))
    assert all(w.tokens.ids.count(tokenizer.bos_token_id) == 1 for w in (*plain, *marked))
    assert marked[0].tokens.ids == plain[0].tokens.ids
    assert marked[0].scored == plain[0].scored


@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s>\n\n \n", "</s></s>"])
def test_a_completion_that_ends_already_gets_no_second_end(end, tokenizer_of):
    tokenizer = tokenizer_of(LLAMA_2)
    plain = encode({"prompt": "ask", "completion": " told"}, tokenizer)
    assert encode({"prompt": "ask", "completion": f" told{end}"}, tokenizer) == plain
    assert plain.ids.count(tokenizer.eos_token_id) == 1


def test_a_turn_of_weight_0_is_read_and_not_learned(tokenizer_of):
    for family in (CHATML, TAGGED, LLAMA_3, QWEN_3):
        tokenizer = tokenizer_of(family)
        row = talk(family)
        row["messages"][2]["weight"] = 0
        tokens = encode(row, tokenizer)
        assert pieces(tokens, tokenizer) == ["".join(family.pieces[:3]), family.pieces[3]]
        assert tokens.ids == encode(talk(family), tokenizer).ids


def test_what_follows_the_last_turn_to_be_learned_is_left_out(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    row = talk(CHATML)
    row["messages"][4]["weight"] = 0
    assert pieces(encode(row, tokenizer), tokenizer) == list(CHATML.pieces[:2])


def test_one_refusal_names_what_a_template_does_not_take(tokenizer_of):
    with pytest.raises(UserError, match=r"refuses the row that begins 'Be kind\.': System role not supported"):
        encode({"messages": [{"role": r, "content": c} for r, c in TALK]}, tokenizer_of(GEMMA))


THINKING = {
    "messages": [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi you."},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Farewell!", "reasoning_content": "An end."},
    ]
}


def test_thoughts_that_a_template_drops_from_earlier_turns_are_not_said(tokenizer_of):
    tokenizer = tokenizer_of(QWEN_3)
    assert pieces(encode(THINKING, tokenizer), tokenizer)[1::2] == [
        "Hi you.<|im_end|>",
        "<think>\nAn end.\n</think>\n\nFarewell!<|im_end|>",
    ]


def test_thoughts_that_a_template_does_not_know_are_refused(tokenizer_of):
    with pytest.raises(UserError, match="leaves out 'reasoning_content' of message 3"):
        encode(THINKING, tokenizer_of(CHATML))
    with pytest.raises(UserError, match="leaves out 'reasoning_content' of message 3"):
        encode(THINKING, tokenizer_of(DEEPSEEK_R1))


@pytest.mark.parametrize("name", ["thinking", "reasoning", "reasoning_content"])
def test_thoughts_go_by_every_name(name, tokenizer_of):
    tokenizer = tokenizer_of(QWEN_3)
    said = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi.", name: "Greet."}]
    (row,), _ = rows.check([("x", {"messages": said})], {}, "x")
    assert pieces(encode(row, tokenizer), tokenizer)[-1] == "<think>\nGreet.\n</think>\n\nHi.<|im_end|>"


TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
}
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + ARGUMENTS + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("arguments", ["call.function.arguments | tojson", "call.function.arguments"])
@pytest.mark.parametrize("offer", [{"tools": [{"type": "function", "function": TOOL}]}, {"functions": [TOOL]}])
def test_tools_go_into_the_template_and_calls_are_said(arguments, offer, tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = WITH_TOOLS.replace("ARGUMENTS", arguments)
    (row,), _ = rows.check([("x", {**CALLING, **offer})], {}, "x")
    first, call, _, answer = pieces(encode(row, tokenizer), tokenizer)
    wanted = json.dumps([{"type": "function", "function": TOOL}])
    assert first.startswith(f"<|im_start|>system\n{wanted}<|im_end|>\n<|im_start|>user\n1 + 1?")
    assert call == '<call>add {"a": 1}</call><|im_end|>'
    assert answer == "It is 2.<|im_end|>"


def test_what_a_template_would_leave_out_is_refused_by_name(tokenizer_of):
    asked = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    with pytest.raises(UserError, match="leaves out 'tools' \\('add'\\)"):
        encode({**asked, "tools": [{"type": "function", "function": TOOL}]}, tokenizer_of(CHATML))
    (row,), _ = rows.check([("x", CALLING)], {}, "x")
    with pytest.raises(UserError, match="leaves out 'tool_calls' of message 1"):
        encode(row, tokenizer_of(CHATML))
    told = {"messages": [*asked["messages"], {"role": "tool", "content": "so"}, {"role": "assistant", "content": "ok"}]}
    with pytest.raises(UserError, match="leaves out message 2 \\(role 'tool'\\)"):
        encode(told, tokenizer_of(ZEPHYR))


def test_a_dropped_turn_is_seen_where_another_turn_holds_its_words(tokenizer_of):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}" + CHATML.template.partition("%}")[2]
    )
    turns = [("system", "Hi"), ("user", "Hi there"), ("assistant", "Hi")]
    with pytest.raises(UserError, match=r"leaves out message 0 \(role 'system'\)"):
        encode({"messages": [{"role": role, "content": said} for role, said in turns]}, tokenizer)


def test_the_date_of_a_template_is_the_same_on_every_day_but_for_whoever_asks(tokenizer_of):
    from datetime import datetime

    tokenizer = tokenizer_of(FAMILIES["chatml"])
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + CHATML.template
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert tokenizer.decode(encode(row, tokenizer).ids).startswith("2024-07-26")
    split = rows.make_split([row], [row], "messages", {})
    assert unused(split, tokenizer) == {"date_in_chat_template": "2024-07-26"}
    asked = tokenizer.decode(Prompting(tokenizer).conversation(row["messages"][:1]))
    assert asked[:10] in {f"{datetime.now():%Y-%m-%d}", str(datetime.now())[:10]}


def test_without_an_end_mark_of_the_tokenizer_the_models_own_is_learned(tokenizer_of):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    end = tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokens = encode({"prompt": "a", "completion": "b"}, tokenizer, [end])
    assert (tokens.ids[-1], tokens.said[-1]) == (end, True)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({**CALLING, "tools": [{"function": TOOL}]}, "tools"),
        (CALLING, "tool_calls"),
        (THINKING, "reasoning_content"),
    ],
)
def test_without_a_chat_template_what_has_no_place_is_refused(row, name, tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = None
    (row,), _ = rows.check([("x", row)], {}, "x")
    with pytest.raises(UserError, match=f"no chat template, so that '{name}'"):
        encode(row, tokenizer)


def test_settings_of_the_template_are_the_rows_own(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = "{{ 'loud ' if loud else 'low ' }}" + CHATML.template
    row = talk(CHATML)
    assert tokenizer.decode(encode(row, tokenizer).ids).startswith("low <|im_start|>")
    loud = {**row, "chat_template_kwargs": {"loud": True}}
    assert tokenizer.decode(encode(loud, tokenizer).ids).startswith("loud <|im_start|>")
    for name in ("lout", "add_generation_prompt", "tools"):
        with pytest.raises(UserError, match=f"takes no '{name}'"):
            encode({**row, "chat_template_kwargs": {name: True}}, tokenizer)


def test_a_template_that_raises_anything_is_one_line(tokenizer_of):
    tokenizer = tokenizer_of(CHATML)
    for broken in ("{{ messages[9]['content'] + 'x' }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% if %}"):
        tokenizer.chat_template = broken
        with pytest.raises(UserError, match=r"refuses the row that begins 'Be kind\.'") as caught:
            encode(talk(CHATML), tokenizer)
        assert "\n" not in str(caught.value)


def test_keys_of_messages_that_nothing_reads_are_told(tokenizer_of):
    data = [{"messages": [{**m, "id": i, "name": "x"} for i, m in enumerate(talk(CHATML)["messages"])], "source": "s"}]
    split = rows.split_of([("x", data[0])], {}, "x", 0, None)
    told = {"columns_not_used": "source", "message_keys_not_used": "id, name"}
    assert unused(split, tokenizer_of(CHATML)) == told
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = CHATML.template.replace("message['role']", "message['role'] + message['name']")
    assert unused(split, tokenizer) == {**told, "message_keys_not_used": "id"}


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_put_together_are_the_rendering(name, tokenizer_of):
    # Whatever the mask says, the tokens are those of the template's own text, up to the last end mark.
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    talked = Conversation(talk(family), tokenizer)
    ids = tokenizer(talked.text, add_special_tokens=False).input_ids
    made = encode(talk(family), tokenizer, stops(family, tokenizer)).ids
    assert list(made) == ids[: len(made)]
    assert re.fullmatch(r"\s*(<\|endoftext\|>)?", tokenizer.decode(ids[len(made) :]))


def test_an_example_that_is_too_long_is_cut_alike_under_a_template(tokenizer_of):
    tokenizer = tokenizer_of(PHI_3)
    whole = encode(talk(PHI_3), tokenizer, stops(PHI_3, tokenizer))
    ((cut,), counts) = encode_all([talk(PHI_3)], tokenizer, len(whole) - 3, stops(PHI_3, tokenizer))
    assert (cut, counts["truncated"]) == (whole.cut(0, len(whole) - 3), 1)


def test_steps_leave_the_tokenizer_as_it_was(tiny_llama, tiny_jsonl, tmp_path):
    from helpers import apply, base_of

    base = base_of(tiny_llama)
    with base.open("cpu") as loaded:
        assert loaded.processor.pad_token == loaded.processor.eos_token  # in memory, where a batch needs it
    assert json.loads((tiny_llama / "tokenizer_config.json").read_text()).get("pad_token") is None
    packed = apply("quantize.bnb", base, tmp_path / "bnb")
    adapted = apply("adapt.lora", packed, tmp_path / "lora", data=str(tiny_jsonl), max_steps=1)
    merged = apply("adapt.merge", adapted, tmp_path / "merge", tokens=64, window=64)
    names = [f.name for f in tiny_llama.iterdir() if "token" in f.name or "template" in f.name]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {*names}
    for folder in (packed.weights, adapted.adapter, merged.weights):
        for name in names:
            assert (folder / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_the_report_of_a_training_lists_what_was_not_used(tiny_llama, tmp_path):
    from helpers import apply, base_of

    rows_of_file = [{**talk(CHATML), "id": i, "source": "web"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_file))
    made = apply("adapt.lora", base_of(tiny_llama), tmp_path / "lora", data=str(tmp_path / "a.jsonl"), max_steps=1)
    assert made.notes["data"]["columns_not_used"] == "id, source"
