"""Tokenizer files and folders of other projects, read and written, with what the files beside them
say: special ids, chat templates, affixes."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmjax.core.errors import UserError
from llmjax.core.files import read_json
from llmjax.text import vocabulary
from llmjax.text.added import add, listed
from llmjax.text.base import NONE, Settings, Tokenizer, bos_eos
from llmjax.text.export import to_json

_json = functools.partial(read_json, default={})
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
# Tokenizer files, fullest description first.
_NAMES = (
  *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
  *("tekken.json", *vocabulary.MERGES, "vocab.txt"),
)
# kind → the file that holds its model, where that is not tokenizer.json
_FILES = {
  "sentencepiece": "tokenizer.model", "unigram": "tokenizer.model", "tiktoken": "ranks.tiktoken",
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
  try:
    return _load(file)
  except (OSError, UserError) as error:
    why = getattr(error, "strerror", error)
    raise UserError(f"tokenizer file {str(file)!r}: {why}") from error
  except Exception as error:  # what a broken file makes the libraries raise is not documented
    why = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"tokenizer file {str(file)!r} cannot be read: {why}") from error


def _load(file: Path) -> Tokenizer:
  folder = file.parent
  described = any(file.match(name) for name in (*_NAMES, *vocabulary.MERGES.values()))
  config = _json(folder / _CONFIG) if described else {}
  model, kind, settings = vocabulary.read(file, config)
  plain = kind(model, settings)
  if not described:
    affixes = _affixes({}, plain, None, None, plain.adds)
    return kind(model, dataclasses.replace(settings, affixes=affixes))
  special = _json(folder / "special_tokens_map.json")
  entries = listed(config, special, _json(folder / "added_tokens.json"))
  model, kind, added = add(plain, entries, has_flags=file.name == "tokenizer.json")
  full = plain if kind is type(plain) and model == plain.to_bytes() else kind(model)
  added = {**full.settings.added, **added}
  return kind(model, _settings(folder, config, special, added, full, plain.adds))


def save(tokenizer: Tokenizer, folder: str | Path, affixes: Sequence[Sequence[int]] | None = None):
  """Writes a tokenizer so that `load_tokenizer` gives it back and transformers can read it.

  Args:
    folder: made if it is missing. Gets `tokenizer.json` and `tokenizer_config.json`, beside them
      the model in its own format (`tokenizer.model`, `ranks.tiktoken`) and `chat_template.jinja`.
    affixes: ids that readers are to put before and after a text; None: those of the tokenizer, BOS
      before where it has none.
  """
  settings, folder = tokenizer.settings, Path(folder)
  affixes = affixes or settings.affixes or tokenizer.template() or bos_eos(tokenizer.bos_id, None)
  folder.mkdir(parents=True, exist_ok=True)
  ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
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
    "affixes": affixes,
  }
  (folder / "tokenizer.json").write_bytes(to_json(tokenizer, affixes))
  (folder / _CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
  if tokenizer.kind in _FILES:
    (folder / _FILES[tokenizer.kind]).write_bytes(tokenizer.to_bytes())
  templates = {_TEMPLATE: settings.chat_template, _TOOL_TEMPLATE: settings.tool_template}
  for name, template in templates.items():
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
  found = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
  keys = (_json(folder / file).get("chat_template") for file in ("chat_template.json", _CONFIG))
  found = found or next(filter(None, keys), {})
  if isinstance(found, list):
    found = {entry["name"]: entry.get("template", "") for entry in found}
  found = {"default": found} if isinstance(found, str) else found
  if found and "default" not in found:
    raise UserError(f"{folder}: no chat template is named 'default'; there are {sorted(found)}")
  return found


def tokenizer_file(folder: Path) -> Path | None:
  """The fullest description among a folder's tokenizer files; None where there is none."""
  written = _json(folder / _CONFIG).get("model_file")  # a key of `save`
  first = [written] if written in _FILES.values() else []
  found = [file for name in (*first, *_NAMES) for file in sorted(folder.glob(name))]
  return found[0] if found else None


def _settings(folder: Path, config: dict, special: dict, added, tokenizer, adds) -> Settings:
  """Gathers a Hugging Face folder's settings; the most specific file that says something wins."""
  size = max(tokenizer.vocab_size, *added.values(), 0)

  def chosen(name: str) -> int | None:
    for file in (config, special):
      if f"{name}_token" in file:
        token = _content(file[f"{name}_token"])
        return NONE if token is None else added.get(token, tokenizer.find(token))
    for file in ("generation_config.json", "config.json"):
      i = _json(folder / file).get(f"{name}_token_id")
      i = i[0] if isinstance(i, list) and i else i
      if isinstance(i, int) and 0 <= i < size:
        return i
    return getattr(tokenizer.settings, f"{name}_id")

  bos_id, eos_id, pad_id = map(chosen, ("bos", "eos", "pad"))
  templates = read_templates(folder)
  named = _named(config, special)
  if tokenizer.unk_id is not None and named.get("unk_token") == tokenizer.spell(tokenizer.unk_id):
    del named["unk_token"]  # the model file says it
  eos = tokenizer.eos_id if eos_id is None else eos_id
  return Settings(
    bos_id, eos_id, pad_id, added, chat_template=templates.get("default"),
    tool_template=templates.get("tool_use"), pattern=tokenizer.settings.pattern,
    affixes=_affixes(config, tokenizer, bos_id, eos_id, adds),
    ends=[i for i in _ends(folder) if i != eos] or None, named=named,
  )


def _content(token):
  return token["content"] if isinstance(token, dict) else token


def _named(*files: dict) -> dict[str, str]:
  """The special tokens that files name beside BOS, EOS and PAD; the first file wins."""
  tables = [table for file in files for table in (file, file.get("extra_special_tokens"))]
  found = {}
  for table in reversed([each for each in tables if isinstance(each, Mapping)]):
    found |= {name: _content(token) for name, token in table.items() if name.endswith("_token")}
  usual = ("bos_token", "eos_token", "pad_token")
  return {n: token for n, token in found.items() if isinstance(token, str) and n not in usual}


def _affixes(config: dict, tokenizer: Tokenizer, bos_id, eos_id, adds) -> list[list[int]]:
  """The affixes of a text: the tokenizer's own, else as its configuration or its kind has it."""
  saved = config.get("affixes", config.get("around"))  # `save`'s key, and the one it had before
  if "model_file" in config and saved is not None:
    return saved
  if tokenizer.settings.affixes is not None:
    return tokenizer.settings.affixes
  bos_id = tokenizer.bos_id if bos_id is None else bos_id
  eos_id = tokenizer.eos_id if eos_id is None else eos_id
  first, last = map(config.get, ("add_bos_token", "add_eos_token"), adds)
  return tokenizer.template() or bos_eos(bos_id if first else None, eos_id if last else None)


def _ends(folder: Path) -> list[int]:
  """The stop ids, by transformers' rule: those of the first file that names any."""
  config = _json(folder / "config.json")
  for file in (_json(folder / "generation_config.json"), config, config.get("text_config") or {}):
    found = file.get("eos_token_id")
    if found is not None:
      ids = found if isinstance(found, list) else [found]
      if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f"{folder}: eos_token_id {found!r} is not a list of token ids")
      return ids
  return []
