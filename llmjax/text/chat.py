"""Chat templates: Jinja source that turns a list of messages into the text a model was tuned on.

Rendered as Hugging Face's transformers does, in Jinja's sandbox: a template is code of strangers.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmjax.core.errors import UserError

# Stand for themselves in a rendered text until it is returned; drawn anew in every process, so no
# message can hold them.
_NONCE = secrets.token_hex(8)
_OPEN, _CLOSE, _CUT = (f"\ufdd0{_NONCE}{mark}\ufdd1" for mark in "oce")


def render(
  template: str,
  messages: Sequence[Mapping],
  add_generation_prompt: bool = False,
  bos_token: str = "",
  eos_token: str = "",
  tools: Sequence[Mapping] | None = None,
  **values,
) -> str:
  """Turns messages into text.

  Args:
    template: Jinja source.
    messages: each with `role` and `content` and whatever else the template reads.
    add_generation_prompt: ends with what begins an answer.
    bos_token: text that the template's `bos_token` stands for.
    eos_token: text that the template's `eos_token` stands for.
    tools: JSON schemas of functions that the model may call.
    **values: further variables of the template.
  Returns:
    The text; its special tokens are spelled out, BOS too where the template writes it.
  Raises:
    UserError: the template is wrong or refuses the messages.
  """
  values |= {"bos_token": bos_token, "eos_token": eos_token, "tools": tools}
  return spans(template, messages, add_generation_prompt, **values)[0]


def spans(
  template: str, messages: Sequence[Mapping], add_generation_prompt: bool = False, **values
) -> tuple[str, list[tuple[int, int]]]:
  """Renders as `render` does and tells which characters the assistant wrote.

  Args:
    template: Jinja source; what it puts between `{% generation %}` and `{% endgeneration %}` is
      the assistant's.
    messages: as for `render`.
    add_generation_prompt: as for `render`.
    **values: as for `render`.
  Returns:
    (text, [(start, stop), …] in characters); no spans when the template marks none.
  Raises:
    UserError: the template is wrong or refuses the messages.
  """
  values = {"tools": None, "bos_token": "", "eos_token": "", **values}
  text = _run(template, messages=messages, add_generation_prompt=add_generation_prompt, **values)
  plain, found, start = [], [], 0
  length = 0
  for piece in re.split(f"({_OPEN}|{_CLOSE})", text):
    if piece == _OPEN:
      start = length
    elif piece == _CLOSE:
      found.append((start, length))
    else:
      plain.append(piece)
      length += len(piece)
  return "".join(plain), found


def encode_chat(
  tokenizer, messages: Sequence[Mapping], add_generation_prompt: bool = False, **values
) -> list[int]:
  """Renders messages with the tokenizer's own template and encodes the result.

  Special tokens that the template writes become their ids. Those that a message spells out do not:
  a user who types `<|im_end|>` cannot end the turn.

  Args:
    tokenizer: with a `chat_template`.
    messages: as for `render`.
    add_generation_prompt: as for `render`.
    **values: as for `render`.
  Returns:
    Ids, BOS among them where the template writes it.
  Raises:
    UserError: the tokenizer has no template, or the template refuses.
  """
  if not tokenizer.chat_template:
    raise UserError("this tokenizer has no chat template; give render() one")
  names = {i: text for text, i in tokenizer.special_tokens.items()}
  values = {
    "bos_token": names.get(tokenizer.bos_id, ""),
    "eos_token": names.get(tokenizer.eos_id, ""),
    **values,
  }
  guarded = _guard(messages, tokenizer.special_tokens)
  text = render(tokenizer.chat_template, guarded, add_generation_prompt, **values)
  return [i for part in text.split(_CUT) for i in tokenizer.encode(part, allow_special=True)]


def read_template(folder: Path) -> str | None:
  """Finds a folder's chat template.

  Returns:
    The text of `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (of a list
    of named ones the one named `default`), else None.
  Raises:
    UserError: a list of templates without a default.
  """
  try:
    return Path(folder, "chat_template.jinja").read_text(encoding="utf-8")
  except OSError:
    pass
  try:
    found = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  template = found.get("chat_template")
  if isinstance(template, list):
    named = {entry["name"]: entry.get("template", "") for entry in template}
    if "default" not in named:
      raise UserError(f"{folder}: no chat template is named 'default'; there are {sorted(named)}")
    template = named["default"]
  return template


def _guard(value, special: Mapping[str, int]):
  """Puts a cut into every special token that a message spells out."""
  if isinstance(value, str):
    for token in special:
      value = value.replace(token, f"{token[:1]}{_CUT}{token[1:]}")
    return value
  if isinstance(value, Mapping):
    return {key: _guard(part, special) for key, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_guard(part, special) for part in value]
  return value


class _Generation(jinja2.ext.Extension):
  """`{% generation %} … {% endgeneration %}`: passes the text through, between two marks."""

  tags = frozenset(["generation"])

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller) -> str:
    return f"{_OPEN}{caller()}{_CLOSE}"


def _refuse(message):
  raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


@functools.cache
def _compiled(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
  environment.globals["raise_exception"] = _refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)


def _run(template: str, **values) -> str:
  try:
    return _compiled(template).render(**values)
  except jinja2.TemplateSyntaxError as error:
    raise UserError(f"chat template, line {error.lineno}: {error.message}") from error
  except Exception as error:  # what a template does with its values may raise anything
    raise UserError(f"the chat template refuses: {' '.join(str(error).split())}") from error
