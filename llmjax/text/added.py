"""Tokens that files beside a model add to it, or say more about: special or not, and their flags.

The `tokenizers` library knows what the flags mean; a model of another make whose tokens have any is
therefore turned into a `tokenizer.json`.
"""

import json
from collections.abc import Mapping

from llmjax.core.errors import UserError
from llmjax.text import fast
from llmjax.text.base import Tokenizer
from llmjax.text.export import to_json

_STRIPS = ("lstrip", "rstrip", "single_word")
_FLAGS = (*_STRIPS, "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def listed(config: Mapping, special: Mapping, extra: Mapping[str, int]) -> dict[str, dict]:
  """Gathers what a Hugging Face folder says of tokens.

  Args:
    config: `tokenizer_config.json`; its `added_tokens_decoder` says most.
    special: `special_tokens_map.json`.
    extra: `added_tokens.json`, token → id.
  Returns:
    token → `special` and the flags that are said, and `id` where it is; `named` is true of tokens
    that have a name, as `eos_token`, and are therefore special.
  """
  found = {}
  for said in (special, config):
    named = [token for name, token in said.items() if name.endswith("_token")]
    for token in [*named, *(token for name in _LISTS for token in said.get(name) or ())]:
      entry = token if isinstance(token, dict) else {"content": token}
      if isinstance(entry.get("content"), str):
        found[entry["content"]] = {**entry, "special": True, "named": True}
  for token, i in extra.items():
    found[token] = {"special": False, **found.get(token, {}), "id": i}
  for i, entry in config.get("added_tokens_decoder", {}).items():
    old = found.get(entry["content"], {})
    found[entry["content"]] = {**entry, "id": int(i), **({"special": True} if old else {})}
  return found


def add(
  made: Tokenizer, entries: Mapping[str, dict], whole: bool
) -> tuple[bytes, type[Tokenizer], dict[str, int]]:
  """Adds tokens to a tokenizer.

  Args:
    made: the tokenizer as its model file has it.
    entries: of `listed`.
    whole: the model file has flags itself, which then hold; it is a `tokenizer.json`.
  Returns:
    (model, its class, special tokens that the model does not hold, text → id).
  Raises:
    UserError: a token's id is none that it can have.
  """
  there = made.added_tokens()
  wanted = {}
  for token, entry in entries.items():
    entry = {**entry, **(there.get(token, {}) if whole else {})}
    entry["special"] = entry.get("special", False) or bool(entries[token].get("named"))
    entry["id"] = made.find(token) if entry.get("id") is None else entry["id"]
    plain = entry["special"] and not any(entry.get(flag) for flag in _STRIPS)
    same = there.get(token, {}).get("special") == entry["special"] and (whole or plain)
    if not same and entry["id"] is not None and not (plain and entry["id"] == made.unk_id):
      wanted[token] = {**entry, "plain": plain}
  if all(entry["plain"] and made.find(token) is None for token, entry in wanted.items()):
    return made.to_bytes(), type(made), {token: entry["id"] for token, entry in wanted.items()}
  return _folded(made, wanted)


def _folded(made: Tokenizer, wanted: Mapping[str, dict]):
  written = json.loads(to_json(made))
  tokens = {entry["content"]: entry for entry in written["added_tokens"]}
  for token, entry in wanted.items():
    flags = {"normalized": not entry["special"], **entry}
    flags = {flag: bool(flags.get(flag)) for flag in _FLAGS}
    tokens[token] = {"id": entry["id"], "content": token, **flags}
  written["added_tokens"] = sorted(tokens.values(), key=lambda entry: entry["id"])
  model = json.dumps(written, ensure_ascii=False, separators=(",", ":")).encode()
  kind = fast.kind_of(model)
  read = kind(model)
  for token, entry in wanted.items():
    if read.find(token) != entry["id"]:
      raise UserError(
        f"the added token {token!r} is said to be id {entry['id']}, where only "
        f"{read.find(token)} is free"
      )
  return model, kind, {}
