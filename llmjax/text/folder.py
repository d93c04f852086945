"""Tokenizer files of the field: told by their content, read, and written so that others read them.

A Hugging Face folder says beside the tokenizer which ids are BOS, EOS and PAD, and how a chat is
written; all of that is read here.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llmjax.core.errors import UserError
from llmjax.text import vocabulary
from llmjax.text.added import add, listed
from llmjax.text.base import NONE, Settings, Tokenizer, ends
from llmjax.text.export import to_json

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
# What a folder is searched for, fullest description first.
_NAMES = (
  *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
  *("tekken.json", *vocabulary.MERGES, "vocab.txt"),
)
# kind → the file that holds its model, where that is not tokenizer.json
_FILES = {
  "sentencepiece": "tokenizer.model",
  "unigram": "tokenizer.model",
  "tiktoken": "ranks.tiktoken",
}


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Reads a tokenizer.

  Args:
    path: `tokenizer.json`, a SentencePiece model, a tiktoken rank file, Mistral's `tekken.json`,
      BERT's `vocab.txt`, GPT-2's `encoder.json` or `vocab.json` with its merges beside it; or the
      folder of one.
  Returns:
    The tokenizer, with the BOS, EOS, PAD and chat template that files beside it name.
  Raises:
    UserError: nothing there, or nothing that is understood.
  """
  path = Path(path)
  file = tokenizer_file(path) if path.is_dir() else path
  if file is None:
    raise UserError(f"tokenizer folder {str(path)!r} holds none of {', '.join(_NAMES)}")
  folder = file.parent
  described = any(file.match(name) for name in (*_NAMES, *vocabulary.MERGES.values()))
  config = _json(folder / _CONFIG) if described else {}
  try:
    model, kind, alone = vocabulary.read(file, config)
    plain = kind(model, alone)
    if not described:
      around = _around({}, plain, (None, None), plain.adds)
      return kind(model, dataclasses.replace(alone, around=around))
    special = _json(folder / "special_tokens_map.json")
    entries = listed(config, special, _json(folder / "added_tokens.json"))
    model, kind, added = add(plain, entries, whole=file.name == "tokenizer.json")
    made = plain if kind is type(plain) and model == plain.to_bytes() else kind(model)
    added = {**made.settings.added, **added}
    return kind(model, _settings(folder, config, special, added, made, plain.adds))
  except (OSError, UserError) as error:
    why = getattr(error, "strerror", error)
    raise UserError(f"tokenizer file {str(file)!r}: {why}") from error
  except Exception as error:  # what a broken file makes the libraries raise is not documented
    why = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"tokenizer file {str(file)!r} cannot be read: {why}") from error


def save(tokenizer: Tokenizer, folder: str | Path, around: Sequence[Sequence[int]] | None = None):
  """Writes a tokenizer so that `load_tokenizer` gives it back and transformers can read it.

  Args:
    folder: made if it is missing. Gets `tokenizer.json` and `tokenizer_config.json`, beside them
      the model in its own format (`tokenizer.model`, `ranks.tiktoken`) and `chat_template.jinja`.
    around: ids that those who read it are to put before and after a text; None: what the tokenizer
      puts there itself, BOS before where that is not said.
  """
  own = tokenizer.settings.around or tokenizer.template()
  around = around or own or ends(tokenizer.bos_id, None)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
  settings, tools = tokenizer.settings, tokenizer.settings.tool_template
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **settings.named,
    **{f"{name}_token": tokenizer.special_names.get(i) for name, i in ids.items()},
    "added_tokens_decoder": {
      str(i): {"content": token, "special": True} for token, i in settings.added.items()
    },
    "model_file": _FILES.get(tokenizer.kind, "tokenizer.json"),
    **({"pattern": settings.pattern} if settings.pattern else {}),
    "around": around,
  }
  (folder / "tokenizer.json").write_bytes(to_json(tokenizer, around))
  (folder / _CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
  if tokenizer.kind in _FILES:
    (folder / _FILES[tokenizer.kind]).write_bytes(tokenizer.to_bytes())
  for name, template in ((_TEMPLATE, settings.chat_template), (_TOOL_TEMPLATE, tools)):
    (folder / name).unlink(missing_ok=True)
    if template is not None:
      (folder / name).parent.mkdir(exist_ok=True)
      (folder / name).write_text(template, encoding="utf-8")


def read_templates(folder: Path) -> dict[str, str]:
  """Finds a folder's chat templates, by name.

  Returns:
    Of the first of these that there are: the files `chat_template.jinja` (`default`) and
    `additional_chat_templates/NAME.jinja`; `chat_template` of `chat_template.json`, or of
    `tokenizer_config.json`: one template (`default`), or several with their names.
  Raises:
    UserError: named templates without a default, or a configuration that is not JSON.
  """
  files = {"default": folder / _TEMPLATE} if (folder / _TEMPLATE).is_file() else {}
  files |= {file.stem: file for file in (folder / _TOOL_TEMPLATE).parent.glob("*.jinja")}
  named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
  said = (_json(folder / file).get("chat_template") for file in ("chat_template.json", _CONFIG))
  template = named or next(filter(None, said), {})
  if isinstance(template, list):
    template = {entry["name"]: entry.get("template", "") for entry in template}
  template = {"default": template} if isinstance(template, str) else template
  if template and "default" not in template:
    raise UserError(f"{folder}: no chat template is named 'default'; there are {sorted(template)}")
  return template


def tokenizer_file(folder: Path) -> Path | None:
  """The file that says most of a folder's tokenizer; None where there is none."""
  said = _json(folder / _CONFIG).get("model_file")  # a key of ours
  ours = [name for name in _FILES.values() if name == said]
  found = [file for name in (*ours, *_NAMES) for file in sorted(folder.glob(name))]
  return found[0] if found else None


def _settings(folder: Path, config: dict, special: dict, added, made, adds) -> Settings:
  """Gathers what a Hugging Face folder says of special tokens, the most specific file first."""

  def chosen(name: str) -> int | None:
    for said in (config, special):
      if f"{name}_token" in said:
        token = said[f"{name}_token"]
        token = token["content"] if isinstance(token, dict) else token
        return NONE if token is None else added.get(token, made.find(token))
    for file in ("generation_config.json", "config.json"):
      i = _json(folder / file).get(f"{name}_token_id")
      i = i[0] if isinstance(i, list) and i else i
      if isinstance(i, int) and 0 <= i < max(made.vocab_size, *added.values(), 0):
        return i
    return getattr(made.settings, f"{name}_id")

  ids = chosen("bos"), chosen("eos"), chosen("pad")
  around = _around(config, made, ids, adds)
  templates = read_templates(folder)
  default, tools = map(templates.get, ("default", "tool_use"))
  named = _named(config, special)
  if made.unk_id is not None and named.get("unk_token") == made.spell(made.unk_id):
    del named["unk_token"]  # what the model file says itself
  others = [i for i in _ends(folder) if i != (made.eos_id if ids[1] is None else ids[1])] or None
  return Settings(*ids, added, default, made.settings.pattern, around, others, tools, named)


def _named(*files: dict) -> dict[str, str]:
  """The special tokens that files name beside those told by their ids; the first file wins."""
  parts = [part for file in files for part in (file, file.get("extra_special_tokens"))]
  dicts = [part for part in reversed(parts) if isinstance(part, dict)]
  said = {name: token for part in dicts for name, token in part.items()}
  contents = {
    name: token["content"] if isinstance(token, dict) else token
    for name, token in said.items()
    if name.endswith("_token") and name not in ("bos_token", "eos_token", "pad_token")
  }
  return {name: token for name, token in contents.items() if isinstance(token, str)}


def _around(config: dict, made: Tokenizer, ids: Sequence[int | None], adds) -> list[list[int]]:
  """The ids around a text: the tokenizer's own, else as its configuration or its kind has it."""
  if "around" in config and "model_file" in config:  # keys of ours
    return config["around"]
  own = (made.bos_id, made.eos_id)
  bos, eos = (there if i is None else i for i, there in zip(ids[:2], own, strict=True))
  if made.settings.around is not None:
    return made.settings.around
  first, last = map(config.get, ("add_bos_token", "add_eos_token"), adds)
  return made.template() or ends(bos if first else None, eos if last else None)


def _ends(folder: Path) -> list[int]:
  """The ids that end what a model writes, by transformers' rule: the first file that names any."""
  config = _json(folder / "config.json")
  for said in (_json(folder / "generation_config.json"), config, config.get("text_config") or {}):
    found = said.get("eos_token_id")
    if found is None:
      continue
    listed = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and i >= 0 for i in listed):
      raise UserError(f"{folder}: eos_token_id {found!r} is not a list of token ids")
    return listed
  return []


def _json(file: Path) -> dict:
  """Reads a JSON object; a file that is not there holds nothing."""
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except OSError:
    return {}
  except ValueError as error:
    raise UserError(f"{str(file)!r} is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise UserError(f"{str(file)!r} holds a JSON {type(found).__name__}, not an object")
  return found
