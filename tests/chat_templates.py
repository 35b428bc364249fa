"""The chat templates of well-known families, as their makers publish them, and what a conversation becomes under each.

`pieces` are written by hand: the text of `TALK` in alternation, what the assistant should not say and what it should.
"""

from dataclasses import dataclass, field

TALK = [
    ("system", "Be kind."),
    ("user", "Hello!"),
    ("assistant", "Hi you."),
    ("user", "Bye?"),
    ("assistant", "Farewell!"),
]


@dataclass(frozen=True)
class Family:
    """A chat template with the marks of its tokenizer; `stops` are the marks that generation ends at."""

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    pieces: tuple[str, ...]
    has_system: bool = True
    padded: bool = False
    """Whether the template strips what stands around a content."""
    more: dict[str, bool] = field(default_factory=dict)
    """Settings of single added tokens: `rstrip` for all of them."""


CHATML = Family(
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    None,
    "<|im_end|>",
    ("<|im_start|>", "<|endoftext|>"),
    ("<|im_end|>",),
    (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
        "Hi you.<|im_end|>",
        "\n<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\n",
        "Farewell!<|im_end|>",
    ),
)

LLAMA_2 = Family(
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "<s>",
    "</s>",
    (),
    ("</s>",),
    (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello! [/INST]",
        " Hi you. </s>",
        "<s>[INST] Bye? [/INST]",
        " Farewell! </s>",
    ),
    padded=True,
)

LLAMA_3 = Family(
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|begin_of_text|>",
    "<|eot_id|>",
    ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ("<|eot_id|>", "<|end_of_text|>"),
    (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hi you.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Farewell!<|eot_id|>",
    ),
    padded=True,
)

MISTRAL = Family(
    # v0.3: what the system says stands in the last question, so that earlier turns are written anew with each question.
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last or loop.index0 == loop_messages | length - 2 %}"
    "{%- if system_message is defined %}{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}"
    "{%- endfor %}",
    "<s>",
    "</s>",
    ("[INST]", "[/INST]"),
    ("</s>",),
    ("<s>[INST] Hello![/INST]", " Hi you.</s>", "[INST] Be kind.\n\nBye?[/INST]", " Farewell!</s>"),
)

GEMMA = Family(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "<bos>",
    "<eos>",
    ("<start_of_turn>", "<end_of_turn>"),
    ("<eos>", "<end_of_turn>"),
    (
        "<bos><start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n",
        "Hi you.<end_of_turn>",
        "\n<start_of_turn>user\nBye?<end_of_turn>\n<start_of_turn>model\n",
        "Farewell!<end_of_turn>",
    ),
    has_system=False,
    padded=True,
)

PHI_3 = Family(
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "<s>",
    "<|endoftext|>",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ("<|endoftext|>", "<|end|>", "<|assistant|>"),
    (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHello!<|end|>\n<|assistant|>\n",
        "Hi you.<|end|>",
        "\n<|user|>\nBye?<|end|>\n<|assistant|>\n",
        "Farewell!<|end|>",
    ),
)

PHI_3_STRIPPING = Family(  # its added tokens swallow the line's end after them
    PHI_3.template,
    PHI_3.bos,
    PHI_3.eos,
    PHI_3.special,
    PHI_3.stops,
    tuple(piece.replace("\n", "") for piece in PHI_3.pieces),
    more={"rstrip": True},
)

ZEPHYR = Family(
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "<s>",
    "</s>",
    (),
    ("</s>",),
    (
        "<|system|>\nBe kind.</s>\n<|user|>\nHello!</s>\n<|assistant|>\n",
        "Hi you.</s>",
        "\n<|user|>\nBye?</s>\n<|assistant|>\n",
        "Farewell!</s>",
    ),
)

QWEN_3 = Family(
    # Shortened to what it does with thoughts: those of turns before the last question are dropped, an answer to the
    # last question begins with its thoughts, and with empty ones where it has none.
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}{%- set thoughts = '' %}"
    "{%- set said = m.content %}{%- if m.reasoning_content is string %}{%- set thoughts = m.reasoning_content %}"
    "{%- elif '</think>' in m.content %}{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thoughts = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{%- else %}{{- said }}{%- endif %}"
    '{%- for call in m.tool_calls or [] %}{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    None,
    "<|im_end|>",
    ("<|im_start|>", "<|endoftext|>"),
    ("<|im_end|>", "<|endoftext|>"),
    (
        *CHATML.pieces[:3],
        "<think>\n\n</think>\n\nFarewell!<|im_end|>",
    ),
)

DEEPSEEK_R1 = Family(
    # Shortened: thoughts are dropped from every turn, and the prompt for an answer opens new ones.
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    "<|begin|>",
    "<|end|>",
    ("<|User|>", "<|Assistant|>"),
    ("<|end|>",),
    (
        "<|begin|>Be kind.<|User|>Hello!<|Assistant|>",
        "Hi you.<|end|>",
        "<|User|>Bye?<|Assistant|>",
        "Farewell!<|end|>",
    ),
)

TAGGED = Family(
    CHATML.template.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
    ),
    CHATML.bos,
    CHATML.eos,
    CHATML.special,
    CHATML.stops,
    CHATML.pieces,
)

PLAIN = Family(  # no special token but the end of text, and no prompt for an answer
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endif %}{% endfor %}",
    "<s>",
    "</s>",
    (),
    ("</s>",),
    ("SYSTEM: Be kind. USER: Hello! ASSISTANT:", " Hi you.</s>", "USER: Bye? ASSISTANT:", " Farewell!</s>"),
)

FAMILIES = {name.lower(): family for name, family in globals().copy().items() if isinstance(family, Family)}
