"""Chat templates in the manner of four families, and conversations, for tests."""

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
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}

TURNS = [
  {"role": "user", "content": " What is <b>2 & 2</b>, “naïve” one?\n"},
  {"role": "assistant", "content": "4 🦙"},
  {"role": "user", "content": "And\n\n  3?"},
]
ANSWERED = [*TURNS, {"role": "assistant", "content": "Three.\n"}]
SYSTEM = [{"role": "system", "content": "Be brief. "}, *ANSWERED]
CONVERSATIONS = {"turns": TURNS, "answered": ANSWERED, "system": SYSTEM}
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
