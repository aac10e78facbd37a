"""Chat templates: what transformers renders, what the sandbox refuses, and bombs that end within their budget."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.chat import ChatTemplate
from jaxinfer.errors import CheckpointError, InputError, JaxinferError

TALK = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "1 < 2 & 'quotes' — naïve?"},
    {"role": "assistant", "content": "Yes.", "tool_calls": [{"name": "f", "arguments": {"x": [1, None, 2.5]}}]},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": 1}}}]
# In the manner of the published ones: ChatML, Llama 3, Gemma, Mistral, Qwen 3.
TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
    {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
    {% endif %}""",
    "llama": """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{{- "<|system|>" + system_message }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0] %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}""",
    "gemma": """{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message.role == "assistant" else message.role -%}
    {{ '<start_of_turn>' + role + '\n' + (messages[0].content if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}""",
    "qwen": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool') %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, text) %}{{ role ~ ':' ~ text.split('?')[0].lstrip('\n') ~ '\n' }}{% endmacro %}
{%- for m in messages %}
    {%- if loop.index0 > ns.last %}{% continue %}{% endif %}
    {%- generation %}{{ turn(m.role, m.content) }}{% endgeneration %}
    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
    {%- if loop.last or loop.nextitem is undefined %}.{% endif %}
{%- endfor %}
{{- messages | map(attribute='role') | join(', ') | upper }} {{ 1 }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>' }}{% endif %}
{%- for key, value in {'b': 1, 'a': 2}|dictsort %}{{ '%s=%03d;' % (key, value) }}{% endfor %}
{{- '{}'.format(3) }}{{ 2 ** 5 }}{{ 'ab' * 2 }}{{ range(3)|list }}{{ dict(a=1) }}{{ [1, [2]] | tojson }}
{{- strftime_now('%')}}""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[3:]])
def test_rendering_equals_that_of_transformers(name, tools, talk):
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"enable_thinking": False}
    ours = ChatTemplate.compile({"default": TEMPLATES[name]}, special_tokens=SPECIAL)
    theirs = render_jinja_template(
        conversations=[talk],
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **SPECIAL,
        **variables,
    )[0][0]
    assert ours.render(talk, tools=tools, variables=variables) == theirs


def test_a_plain_template():
    template = ChatTemplate.compile({"default": TEMPLATES["chatml"]})
    assert template.render(TALK[3:]) == "<|im_start|>user\nWhy?<|im_end|>\n\n<|im_start|>assistant\n\n"
    assert template.render(TALK[3:], add_generation_prompt=False) == "<|im_start|>user\nWhy?<|im_end|>\n\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]
    assert template.render(parts) == template.render(TALK[3:])


def test_templates_come_from_their_file_the_config_or_a_list(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "x"}))
    assert ChatTemplate.load(tmp_path) is None

    config.write_text(json.dumps({"chat_template": "one {{ messages[0].content }} {{ eos_token }}"}))
    found = ChatTemplate.load(tmp_path, special_tokens={"eos_token": "E"})
    assert found is not None and found.render(TALK[3:]) == "one Why? E"

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert (found.render(TALK), found.render(TALK, tools=TOOLS)) == ("plain", "tools")
    assert found.render(TALK, name="tool_use") == "tools"
    with pytest.raises(InputError, match="no chat template 'rag'; it has default, tool_use"):
        found.render(TALK, name="rag")

    (tmp_path / "chat_template.jinja").write_text("from the file")
    found = ChatTemplate.load(tmp_path)
    assert found is not None and found.render(TALK, tools=TOOLS) == "from the file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"chat_template": 3}, "chat_template must be text or a list"),
        ({"chat_template": [{"name": "a"}]}, "chat_template must be text or a list"),
        ({"chat_template": "\n{% if %}"}, r"tokenizer_config.json \(default\): line 2: Expected an expression"),
        ({"chat_template": "{{ x"}, "line 1: "),
        ({"chat_template": "{{ x | nonsense }}"}, "line 1: No filter named 'nonsense'"),
        ({"chat_template": "{{ " + "(" * 5000 + " }}"}, "nested too deeply|does not compile"),
    ],
)
def test_a_broken_template_is_named(content, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], "messages\\[0\\] must be an object with a text role"),
        ([{"content": "x"}], "messages\\[0\\] must be an object with a text role"),
        ([{"role": "user", "content": 3}], "messages\\[0\\]: content must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages\\[0\\]: only text parts"),
        ([{"role": "user"}], "fails on these messages: UndefinedError"),
        ([{"role": "user", "content": None}], "fails on these messages: TypeError"),
    ],
)
def test_messages_that_cannot_be_rendered(messages, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate.compile({"default": TEMPLATES["chatml"]}).render(messages)


def test_a_template_may_refuse_messages():
    with pytest.raises(InputError, match="refuses the messages: Conversation roles must alternate"):
        ChatTemplate.compile({"default": TEMPLATES["gemma"]}).render([TALK[2]])


SHARED = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling sum": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "sharing list": SHARED + "{{ ns.x }}",
    "sharing list as JSON": SHARED + "{{ ns.x|tojson }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ 10**10 * [1] }}",
    "center": "{{ 'a' | center(10**10) }}",
    "method": "{{ 'a'.ljust(10**10) }}",
    "percent": "{{ '%9999999999d' % 3 }}",
    "percent star": "{{ '%*d' % (10**9, 3) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "filter block": "{% filter center(10**12) %}x{% endfilter %}",
    "power": "{{ 9 ** 9999999 }}",
    "recursive loop": "{% for x in range(9) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "replace": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}",
    "replace method": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 99999 %}{{ x | join(x) }}",
    "append": "{{ messages.append(1) }}",
    "private attribute": "{{ namespace(__class__=1) }}",
    "set private attribute": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon_in_an_error_that_names_the_template(name):
    began = time.process_time()
    with pytest.raises(CheckpointError, match="dir/tokenizer_config.json"):
        ChatTemplate.compile({"default": BOMBS[name]}, origin="dir/tokenizer_config.json").render(TALK)
    assert time.process_time() - began < 7


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.mro() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum() }}",
        "{{ self.__dict__ }}",
    ],
)
def test_nothing_leads_out_of_the_sandbox(text):
    try:
        assert ChatTemplate.compile({"default": text}).render(TALK) == ""
    except JaxinferError:
        pass


def test_rendering_leaves_the_messages_as_they_are():
    talk = [{"role": "user", "content": "x", "list": [1]}]
    with pytest.raises(CheckpointError, match="sandbox forbids"):
        ChatTemplate.compile({"default": "{{ messages[0].list.append(2) }}"}).render(talk)
    assert talk == [{"role": "user", "content": "x", "list": [1]}]


PIECES = (
    "{{ messages }}", "{{ messages[0].content }}", "{{ x }}", "{{ x.y }}", "{% for m in messages %}", "{% endfor %}",
    "{% if loop.first %}", "{% else %}", "{% endif %}", "{{ m.role | upper }}", "{{ m | tojson }}", "{% set x = m %}",
    "{% set ns = namespace(a=[]) %}", "{% set ns.a = ns.a + messages %}", "{{ ns.a * 99 }}", "{% break %}",
    "{%- macro f(x) -%}", "{% endmacro %}", "{{ f(f) }}", "{{ f(messages) ~ x }}", "{{ 'a' % m }}",
    "{{ '%s %s' % m }}", "{{ -x }}", "{{ 1 / 0 }}", "{% for k in messages recursive %}", "{{ loop(k) }}",
    "{{ loop }}", "{{ raise_exception(x) }}", "{{ strftime_now(x) }}", "{{ range(x) }}", "{{ range(10**9) }}",
    "{% generation %}", "{% endgeneration %}", "{{ messages | groupby('role') }}", "{{ messages | sum }}",
    "{{ messages | sort }}", "{{ 'a' | round }}", "{{ x is divisibleby 0 }}", "{% raw %}", "{# ", " #}",
    "{{ [1, 2][::0] }}", "{{ 'é\\ud800' }}", "{% call f() %}", "{% endcall %}", "{{ caller() }}",
    "{{ tools | map('abs') | list }}",
)  # fmt: skip


def fuzz_templates(examples):
    outcomes = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=7))
    def run(pieces):
        try:
            rendered = ChatTemplate.compile({"default": "".join(pieces)}).render(TALK, variables={"x": 3})
            outcomes.append(isinstance(rendered, str))
        except JaxinferError:
            outcomes.append(False)

    run()
    assert 0.05 < np.mean(outcomes) < 0.95


def test_random_templates_render_or_give_a_clear_error():
    fuzz_templates(150)


@pytest.mark.slow
def test_thousands_of_random_templates_render_or_give_a_clear_error():
    fuzz_templates(3000)
