"""Tokens that files beside a model add to it, or give flags to. Only the `tokenizers` library knows
the flags' meaning, so a model of another kind with flagged tokens becomes a `tokenizer.json`."""

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
  """Gathers what a Hugging Face folder's `tokenizer_config.json`, `special_tokens_map.json` and
  `added_tokens.json` (token → id) say of tokens.

  Returns:
    token → its flags, `special` among them, and `id`, where they are given; `named` is true of
    tokens that have a name, such as `eos_token`, and are therefore special.
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
  tokenizer: Tokenizer, entries: Mapping[str, dict], has_flags: bool
) -> tuple[bytes, type[Tokenizer], dict[str, int]]:
  """Adds tokens to a tokenizer.

  Args:
    tokenizer: as its model file has it.
    entries: of `listed`.
    has_flags: the model file is a `tokenizer.json`, whose own flags hold.
  Returns:
    (model, its class, special tokens that the model does not hold, text → id).
  Raises:
    UserError: a token's id is none that it can have.
  """
  known = tokenizer.added_tokens()
  new = {}
  for token, entry in entries.items():
    entry = {**entry, **(known.get(token, {}) if has_flags else {})}
    entry["special"] = entry.get("special", False) or bool(entries[token].get("named"))
    entry["id"] = tokenizer.find(token) if entry.get("id") is None else entry["id"]
    plain = entry["special"] and not any(entry.get(flag) for flag in _STRIPS)
    same = known.get(token, {}).get("special") == entry["special"] and (has_flags or plain)
    if not same and entry["id"] is not None and not (plain and entry["id"] == tokenizer.unk_id):
      new[token] = {**entry, "plain": plain}
  if all(entry["plain"] and tokenizer.find(token) is None for token, entry in new.items()):
    added = {token: entry["id"] for token, entry in new.items()}
    return tokenizer.to_bytes(), type(tokenizer), added
  return _add_to_json(tokenizer, new)


def _add_to_json(tokenizer: Tokenizer, new: Mapping[str, dict]):
  written = json.loads(to_json(tokenizer))
  tokens = {entry["content"]: entry for entry in written["added_tokens"]}
  for token, entry in new.items():
    flags = {"normalized": not entry["special"], **entry}
    flags = {flag: bool(flags.get(flag)) for flag in _FLAGS}
    tokens[token] = {"id": entry["id"], "content": token, **flags}
  written["added_tokens"] = sorted(tokens.values(), key=lambda entry: entry["id"])
  model = json.dumps(written, ensure_ascii=False, separators=(",", ":")).encode()
  kind = fast.kind_of(model)
  read = kind(model)
  for token, entry in new.items():
    if read.find(token) != entry["id"]:
      raise UserError(
        f"the added token {token!r} is said to be id {entry['id']}, where only "
        f"{read.find(token)} is free"
      )
  return model, kind, {}
