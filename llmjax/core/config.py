"""Strict configs: dataclasses declare keys, types and defaults, `get_config()` in a Python file
changes values, `--config.section.key=value` changes them again, and the run gets frozen
dataclasses. Unknown keys are errors that name the nearest one."""

import dataclasses
import difflib
import hashlib
import json
import re
import runpy
import traceback
import typing
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llmjax.core.choices import check_finite
from llmjax.core.errors import UserError, nearest
from llmjax.core.files import check_exists

# Keys that were renamed: old name → new name.
RENAMED = {
  "model.context": "model.max_seq_len",
  "model.attention.context": "model.attention.context_parallel",
  "model.moe.dense_first": "model.moe.first_k_dense",
  "train.zero": "train.zero_stage",
  "train.accumulation": "train.grad_accum_steps",
  "train.sum_dtype": "train.grad_reduce_dtype",
  "optim.final": "optim.min_lr_ratio",
  "optim.no_decay": "optim.groups",
  "loss.balance": "loss.moe_aux",
  "task.hidden": "task.mask_prob",
}


_CONVERT = {
  "optim.no_decay": lambda patterns: (*((p, {"decay": 0.0}) for p in patterns), ("*", {})),
}


class Options(dict):
  """A dict that is never changed, so that a config that holds it can be hashed."""

  def __hash__(self):
    return hash(tuple(sorted(self.items(), key=lambda item: item[0])))


def unknown_key(key: str, known) -> UserError:
  """Returns the error for an unknown key, with its new name or the nearest known one."""
  if key in RENAMED:
    return UserError(f"config key {key!r} is now called {RENAMED[key]!r}")
  old = difflib.get_close_matches(key, [*known, *RENAMED], n=1, cutoff=0.5)
  if old and old[0] in RENAMED:
    return UserError(f"unknown config key {key!r}: {old[0]!r} is now called {RENAMED[old[0]]!r}")
  return UserError(f"unknown config key {key!r}; {nearest(key, known)}")


def with_new_names(values: dict, prefix: str = "") -> dict:
  """Gives a stored config, nested dicts, the keys of today; values are converted where need be."""
  out = {}
  for name, value in values.items():
    key = prefix + name
    if isinstance(value, dict):
      value = with_new_names(value, f"{key}.")
    convert = _CONVERT.get(key, lambda value: value)
    out[RENAMED.get(key, name).rpartition(".")[2]] = convert(value)
  return out


def defaults(schema: type) -> ConfigDict:
  """Returns a locked, editable config tree with the defaults of a dataclass."""
  return editable(schema())


def editable(config) -> ConfigDict:
  """Returns a locked, editable config tree of a frozen config, or of one section of it."""
  return ConfigDict(dataclasses.asdict(config)).lock()


def load(path: str, overrides: Sequence[str], schema: type):
  """Reads a config file, applies overrides, and freezes the result.

  Args:
    path: Python file with a `get_config()` that returns a `ConfigDict`.
    overrides: `--config.section.key=value` arguments.
    schema: dataclass of the whole config.
  Returns:
    A frozen instance of `schema`.
  Raises:
    UserError: no such file, an error in it, an unknown key, a value of the wrong type.
  """
  check_exists("config file", path)
  return _apply(_run_file(path, schema), overrides, schema)


def override(config, overrides: Sequence[str]):
  """Returns a frozen config with `--config.a.b=v` arguments applied.

  Raises:
    UserError: an unknown key or a value of the wrong type.
  """
  return _apply(editable(config), overrides, type(config))


def _apply(tree: ConfigDict, overrides: Sequence[str], schema: type):
  known = flat(schema())
  for argument in overrides:
    key, found, _ = argument.removeprefix("--config.").partition("=")
    if key not in known:
      raise unknown_key(key, known)
    if not found:
      raise UserError(f"config key {key!r} has no value; write --config.{key}=VALUE")
  values = flags.FlagValues()
  argv = ["llmjax", *overrides]
  config_flags.DEFINE_config_dict("config", tree, flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, AttributeError, KeyError) as error:
    raise UserError(str(error).splitlines()[0]) from error
  return freeze(values.config.to_dict(), schema)


def _run_file(path: str, schema: type) -> ConfigDict:
  try:
    names = runpy.run_path(path)
    if "get_config" not in names:
      raise UserError(f"{path}: no get_config() in it")
    tree = names["get_config"]()
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
  except Exception as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    raise UserError(f"{where}: {_reason(error, schema)}") from error
  if not isinstance(tree, ConfigDict):
    raise UserError(f"{path}: get_config() must return an ml_collections.ConfigDict")
  return tree


def _reason(error: Exception, schema: type) -> str:
  """Describes an error in a config file; of an unknown key, its new name or the nearest one."""
  if missing := re.search('Key "([^"]+)" does not exist', str(error)):
    new = [new for old, new in RENAMED.items() if old.endswith(f".{missing[1]}")]
    keys = {key.rpartition(".")[2] for key in flat(schema())}
    hint = f"it is now called {' or '.join(new)}" if new else nearest(missing[1], keys)
    return f"no config key {missing[1]!r} there; {hint}"
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  return f"{type(error).__name__}: {' '.join(str(text).split())}"


def freeze(values: dict, schema: type, prefix: str = ""):
  """Turns nested dicts into a frozen dataclass, strictly.

  Args:
    values: an entry for every field of `schema`, or fewer: the rest take their defaults.
    schema: frozen dataclass with fields of type int, float, bool, str, tuple or another dataclass.
    prefix: path of this section in the whole config, for messages.
  Returns:
    An instance of `schema`, which its `__post_init__` has checked.
  Raises:
    UserError: an unknown key or a value of the wrong type.
  """
  hints = typing.get_type_hints(schema)
  fields = {}
  for name, value in values.items():
    if name not in hints:
      raise unknown_key(prefix + name, [prefix + hint for hint in hints])
    fields[name] = coerce(value, hints[name], prefix + name)
  return schema(**fields)


def frozen(config, schema: type, prefix: str = ""):
  """Returns a config as an instance of `schema`, whether it is one or editable.

  Args:
    config: instance of `schema`, what `defaults` or `get_config()` returns, or nested dicts.
    schema: frozen dataclass.
    prefix: path of this section in the whole config, for messages.
  Raises:
    UserError: it is something else, or `freeze` raised it.
  """
  if isinstance(config, schema):
    return config
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  if not isinstance(config, dict):
    raise UserError(
      f"a config is an llmjax.{schema.__name__}, or editable as llmjax.defaults(llmjax.Config) "
      f"returns it, not {type(config).__name__}"
    )
  return freeze(config, schema, prefix)


def coerce(value, kind: type, key: str):
  """Returns a value in its key's type: int becomes float, list tuple; others are a `UserError`."""
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, dict):
      raise UserError(f"config key {key!r} is a section, not {value!r}")
    return freeze(value, kind, f"{key}.")
  kind = typing.get_origin(kind) or kind
  if kind is float and type(value) is int:
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if type(value) is not kind:
    raise UserError(
      f"config key {key!r} must be {kind.__name__}, not {value!r} ({type(value).__name__})"
    )
  check_finite(key, value)
  return value


def flat(config) -> dict:
  """Returns a config's values by dotted key."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      out.update({f"{field.name}.{key}": leaf for key, leaf in flat(value).items()})
    else:
      out[field.name] = value
  return out


def config_hash(config) -> str:
  """Hashes every value of a config to 16 hex digits, the same on every machine."""
  text = json.dumps(dataclasses.asdict(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
