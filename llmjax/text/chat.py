"""Chat templates: Jinja source that turns a list of messages into the text a model was tuned on,
rendered as transformers does, in Jinja's sandbox, since a template is untrusted code."""

import datetime
import functools
import json
import secrets
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmjax.core.errors import UserError
from llmjax.text.base import Tokenizer

# Random marks, so that no message can hold them: around what the assistant says, and inside special
# tokens that a message spells out.
_MARK, _CUT = (f"\ufdd0{secrets.token_hex(8)}\ufdd1" for _ in range(2))


def render(
  template: str, messages: Sequence[Mapping], add_generation_prompt: bool = False, **values
) -> str:
  """Turns messages into text.

  Args:
    messages: each with `role` and `content` and whatever else the template reads.
    add_generation_prompt: ends with what begins an answer.
    **values: further variables of the template, such as `bos_token`, `tools` (JSON schemas of
      functions that the model may call) and `documents`.
  Returns:
    The text; its special tokens are spelled out, BOS too where the template writes it.
  Raises:
    UserError: the template is wrong or refuses the messages.
  """
  return spans(template, messages, add_generation_prompt, **values)[0]


def spans(
  template: str, messages: Sequence[Mapping], add_generation_prompt: bool = False, **values
) -> tuple[str, list[tuple[int, int]]]:
  """Renders as `render` does and finds what the template puts between `{% generation %}` and
  `{% endgeneration %}`, which is what the assistant wrote.

  Returns:
    (text, [(start, stop), …] in characters).
  """
  messages = [  # templates know what to make of a missing key
    {key: value for key, value in message.items() if value is not None}
    if isinstance(message, Mapping) else message
    for message in messages
  ]
  given = {"messages": messages, "tools": None, "documents": None}
  given |= {"add_generation_prompt": add_generation_prompt, **values}
  try:
    text = _compiled(template).render(given)
  except jinja2.TemplateSyntaxError as error:
    raise UserError(f"chat template, line {error.lineno}: {error.message}") from error
  except Exception as error:  # what a template does with its values may raise anything
    raise UserError(f"the chat template refuses: {' '.join(str(error).split())}") from error
  plain, found = "", []
  for number, piece in enumerate(text.split(_MARK)):
    if number % 2:  # between two marks
      found.append((len(plain), len(plain) + len(piece)))
    plain += piece
  return plain, found


def encode_chat(
  tokenizer: Tokenizer, messages: Sequence[Mapping], add_generation_prompt: bool = False, **values
) -> list[int]:
  """Renders messages with the tokenizer's own template and encodes the result.

  Special tokens that the template writes become their ids; those that a message spells out stay
  text, so a user who types `<|im_end|>` cannot end the turn.

  Args:
    tokenizer: with a `chat_template`; the other arguments are those of `render`. With `tools` its
      `tool_template` is taken, if there is one.
  Raises:
    UserError: the tokenizer has no template, or the template refuses.
  """
  if not tokenizer.chat_template:
    raise UserError("this tokenizer has no chat template; give render() one")
  template = tokenizer.chat_template
  if values.get("tools") is not None:
    template = tokenizer.settings.tool_template or template
  texts = {name: values[name] for name in ("tools", "documents") if name in values}
  texts = _guard({"messages": messages, **texts}, tokenizer.special_tokens)
  values = {**token_values(tokenizer), **values, **texts}
  text = render(template, add_generation_prompt=add_generation_prompt, **values)
  return tokenizer.encode(text, allow_special=True, cut=_CUT)


def token_values(tokenizer: Tokenizer) -> dict[str, str]:
  """The texts of special tokens under the names that templates have for them, as `bos_token`."""
  ids = {name: getattr(tokenizer, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
  texts = {f"{name}_token": tokenizer.spell(i) for name, i in ids.items() if i is not None}
  return texts | tokenizer.settings.named


def _guard(value, special: Mapping[str, int]):
  """Breaks every special token that a text in a nested value spells out, by a mark in it."""
  if isinstance(value, str):
    for token in special:
      value = value.replace(token, _CUT.join(token))
    return value
  if isinstance(value, Mapping):
    return {key: _guard(each, special) for key, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_guard(each, special) for each in value]
  return value


class _Generation(jinja2.ext.Extension):
  """`{% generation %} … {% endgeneration %}`: puts the text between two marks."""

  tags = frozenset(["generation"])

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller) -> str:
    return f"{_MARK}{caller()}{_MARK}"


def _refuse(message):
  raise jinja2.TemplateError(message)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  # Jinja's own escapes for HTML.
  environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
  environment.globals["raise_exception"] = _refuse
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)
