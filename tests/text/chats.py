"""Chat templates in the manner of families of the field, and conversations, for tests."""

CHATML = (
  "{% for message in messages %}\n"
  "{{ '<|im_start|>' + message['role'] + '\\n' }}"
  "{% if message['role'] == 'assistant' %}\n"
  "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{{ '\\n' }}"
  "{% else %}\n"
  "{{ message['content'] + '<|im_end|>\\n' }}"
  "{% endif %}\n"
  "{% endfor %}\n"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson(indent=4)) }}
    {%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
  "{{ raise_exception('System role not supported') }}{% endif %}"
  "{% for message in messages %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
  "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
  "{% else %}{% set role = message['role'] %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\\n' }}"
  "{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
  "{{ '<end_of_turn>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- set ns = namespace(last=-1) %}
  {%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
  {%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index0 == ns.last and tools %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
"""
LLAMA2 = (
  "{% if messages[0]['role'] == 'system' %}"
  "{% set rest = messages[1:] %}"
  "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n' %}"
  "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
  "{% for m in rest %}"
  "{% if loop.index0 == 0 and system != false %}{% set said = system + m['content'] %}"
  "{% else %}{% set said = m['content'] %}{% endif %}"
  "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
  "{% elif m['role'] == 'assistant' %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}"
  "{% endfor %}"
)
PHI = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{{ m['content'] + '<|end|>\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HERMES = """{%- set ns = namespace(first=true, system='You help.') -%}
{%- for m in messages if m.role == 'system' %}{% set ns.system = m.content %}{% endfor -%}
<|im_start|>system
{{ ns.system }}
{%- if tools is iterable and tools | length > 0 %}


# Tools
<tools>
{%- for tool in tools %}
{{ tool.function | tojson(indent=2, sort_keys=true) }}
{%- endfor %}
</tools>
{%- endif %}<|im_end|>
{% for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {#- comments vanish, and with them the spaces around -#}
<|im_start|>{{ m.role }}
{{ m.content if m.content is defined else '' }}
    {%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
    {%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
COMMAND = """{{ bos_token }}
{%- if documents is not none %}
{{ '<results>' }}
{% for document in documents %}
Document: {{ loop.index0 }}
{% for key, value in document.items() %}
{{ key }}: {{ value }}
{% endfor %}
{% endfor %}
</results>
{% else %}no documents
{% endif %}
{%- for m in messages %}
{%- if loop.index0 >= 2 %}{% break %}{% endif %}
<|START|>{{ m.role | upper }}: {{ m.content | trim | replace('\n', ' ') }}<|END|>
{%- endfor %}"""
DATED = """{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif -%}
Today: {{ date }}
{% macro said(m) -%}
  {%- if m.content is string %}{{ m.content }}{% else %}
    {{- m.content | map(attribute='text') | join }}
  {%- endif -%}
{%- endmacro %}
  {% for m in messages | rejectattr('role', 'equalto', 'system') %}
{{ loop.index }}/{{ loop.length }} {{ m.role.capitalize() }}: {{ said(m) }}
  {%- if not loop.last %}{{ '---' }}{% endif %}
{% endfor %}
"""
NAMES = """{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}|
{{ sep_token }}|{{ image_token }}|
{%- if mask_token is defined %}a mask{% else %}no mask{% endif %}
{%- if tools is none and documents is none %}, nothing{% endif %}
{{ tools is defined }} {{ documents is defined }} {{ nothing is defined }}"""
DEEPSEEK = """{{ bos_token }}{% set ns = namespace(system='', last='') %}
{%- for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}
{%- endfor %}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{{ '<|User|>' + m['content'] }}
  {%- elif m['role'] == 'assistant' and m['content'] is not none -%}
    {%- set content = m['content'] -%}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
    {{- '<|Assistant|>' }}{% generation %}{{ content + eos_token }}{% endgeneration -%}
  {%- endif -%}{% set ns.last = m['role'] %}
{%- endfor -%}
{%- if add_generation_prompt and ns.last == 'user' %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
	{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% else %}{{ raise_exception('a role of "' ~ message['role'] ~ '"') }}
    {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {
  "chatml": CHATML,
  "llama3": LLAMA3,
  "gemma": GEMMA,
  "mistral": MISTRAL,
  "llama2": LLAMA2,
  "phi": PHI,
  "hermes": HERMES,
  "command": COMMAND,
  "dated": DATED,
  "names": NAMES,
  "deepseek": DEEPSEEK,
  "zephyr": ZEPHYR,
}

TURNS = [
  {"role": "user", "content": " What is <b>2 & 2</b>, “naïve” one?\n"},
  {"role": "assistant", "content": "4 🦙"},
  {"role": "user", "content": "And\n\n  3?"},
]
ANSWERED = [*TURNS, {"role": "assistant", "content": "Three.\n"}]
SYSTEM = [{"role": "system", "content": "Be brief. "}, *ANSWERED]
CALL = {"type": "function", "function": {"name": "wörter", "arguments": {"text": "é <b>", "n": 1}}}
CALLED = [
  *TURNS[:1],
  {"role": "assistant", "content": None, "tool_calls": [CALL]},
  {"role": "tool", "name": "wörter", "content": '{"n": 2}'},
]
CONVERSATIONS = {"turns": TURNS, "answered": ANSWERED, "system": SYSTEM, "called": CALLED}
DOCUMENTS = [{"title": "Ü", "text": "one\ntwo"}, {"title": "B", "text": "{{ 3 }}"}]
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "wörter",
      "description": "Counts <words> & more",
      "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
  }
]
