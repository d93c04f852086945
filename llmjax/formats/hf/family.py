"""What a family of published models is: a row of values and tables, read in both directions.

Nothing here knows a particular family. `read_config` turns a `config.json` into a `ModelConfig`,
`write_config` does the reverse, and a family can hold a config if writing and reading give it back.
"""

import dataclasses
from collections.abc import Callable

from flax.traverse_util import unflatten_dict

from llmjax.core import config as configs
from llmjax.core.errors import UserError, note
from llmjax.formats.hf.canonical import canonical
from llmjax.models.config import ModelConfig

# Keys that change no number an evaluation computes.
_HARMLESS = (
  "_attn_implementation _attn_implementation_autoset _name_or_path architectures "
  "attention_dropout attention_probs_dropout_prob attn_pdrop auto_map bos_token_id "
  "cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id "
  "dropout_rate dtype embd_pdrop eos_token_id finetuning_task forced_bos_token_id "
  "forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label "
  "initializer_factor initializer_range is_encoder_decoder label2id max_length "
  "max_sequence_length model_type n_ctx num_labels output_attentions output_hidden_states "
  "output_past pad_token_id predict_special_tokens prefix pretraining_tp problem_type resid_pdrop "
  "return_dict sep_token_id summary_activation summary_first_dropout summary_proj_to_labels "
  "summary_type summary_use_proj task_specific_params tokenizer_class torch_dtype torchscript "
  "transformers_version unsloth_version use_bfloat16 use_cache vocab_file "
)
HARMLESS = frozenset(_HARMLESS.split())
# Keys of any family that change what it computes, unless they are empty.
REFUSED = {
  "quantization_config": "is quantized",
  "per_layer_config": "has layers of several sizes",
  "pruned_heads": "has layers without some of their heads",
}
# How a model is run, not what it computes.
RUN_KEYS = ("dtype", "scan", "remat", "dropout", "attention.kernel", "attention.block")
REQUIRED = object()
KINDS = {key: type(value) for key, value in configs.flat(ModelConfig()).items()}


@dataclasses.dataclass(frozen=True)
class Key:
  """What one key of their `config.json` means.

  Attributes:
    ours: our dotted key; empty for a key that is only checked.
    default: their value where the key is absent, that of the family's config class in
      transformers; or a function of our values so far.
    values: their value → ours, the first of several being the one written; None: as it is. Or two
      functions: of their value and our values so far, of our value and our config.
    other: another name of the key, read where the first is absent.
    null: what their null means, and what is written as null; by default null is refused where the
      default is a value.
  """

  ours: str
  default: object = REQUIRED
  values: dict | tuple | None = None
  null: object = REQUIRED
  other: str = ""


def only(*values) -> Key:
  """A key that has to have one of these values, the first of which is its default."""
  return Key("", values[0], dict.fromkeys(values))


@dataclasses.dataclass(frozen=True)
class Part:
  """What a table of keys cannot say.

  Attributes:
    keys: their keys that `read` looks at.
    read: (their config, our values so far) → more of our values.
    write: our config → some of their keys; raises `UserError` where they have no word for it.
  """

  keys: tuple
  read: Callable[[dict, dict], dict] = lambda theirs, values: {}
  write: Callable[[ModelConfig], dict] = lambda config: {}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family: its words for our config, and its names for our weights.

  Attributes:
    name: their `model_type`.
    architecture: the class that transformers builds.
    keys: their key → `Key`.
    tensors: their name → our module, or (letters, our path or paths); see `hf_layout`.
    parts: what tables cannot say.
    fixed: our dotted key → the value that the family implies.
    offset: norm scales are stored less this number.
    aliases: (pattern, replacement): other spellings of their names.
    ignore: patterns of their names that hold nothing a model needs.
    dropped: patterns of their names that llmjax has no place for; reading says so.
    skip: (their name, config) → whether this config leaves the tensor out.
    twins: name of a copy → its original, beside the head that may be a copy of the embedding.
    optional: patterns of our paths that a folder may lack.
    constants: name written beside ours → (value, name of the tensor whose shape it has).
    head_optional: a folder without a head is one of tied embeddings, whatever its config says.
    written: whether models are exported as this family.
  """

  name: str
  architecture: str
  keys: dict
  tensors: dict
  parts: tuple = ()
  fixed: dict = dataclasses.field(default_factory=dict)
  offset: float = 0.0
  aliases: tuple = ()
  ignore: tuple = ()
  dropped: tuple = ()
  skip: Callable[[str, ModelConfig], bool] = lambda name, config: False
  twins: dict = dataclasses.field(default_factory=dict)
  optional: tuple = ()
  constants: dict = dataclasses.field(default_factory=dict)
  head_optional: bool = False
  written: bool = True

  def name_of(self, path: str) -> str | None:
    """Their name of one of our weights."""
    return next((name for name, row in self.tensors.items() if row[1:] == (path,)), None)

  @property
  def copies(self) -> dict:
    """Name of a copy → its original; equal copies are dropped."""
    return self.twins | {self.name_of("embed/head_dv"): self.name_of("embed/token_vd")}


def read_config(family: Family, theirs: dict, quiet: bool = False) -> ModelConfig:
  """Translates a `config.json`, with a note of unknown keys unless `quiet`; arithmetic is fp32.

  Raises:
    UserError: a key is missing, or has a value that llmjax cannot compute with.
  """
  values = {"dtype": "float32", **read_values(family, theirs, quiet)}
  return configs.freeze(unflatten_dict(values, sep="."), ModelConfig, "model.")


def read_values(family: Family, theirs: dict, quiet: bool = False) -> dict:
  """Translates a `config.json` (or a section of one) into our dotted keys; see `read_config`."""
  values = dict(family.fixed)
  for name, key in family.keys.items():
    value = _value(family, name, key, theirs, values)
    if key.ours:
      values[key.ours] = configs.coerce(value, KINDS[key.ours], f"model.{key.ours}")
  for part in family.parts:
    try:
      values |= part.read(theirs, values)
    except (TypeError, AttributeError) as error:  # a list or a text where a number is meant
      keys = ", ".join(filter(None, part.keys))
      raise UserError(f"one of {keys} has a value of another kind: {error}") from error
  for key in filter(theirs.get, REFUSED):
    raise UserError(f"this {family.name} folder {REFUSED[key]} ({key}); not supported")
  known = HARMLESS.union(REFUSED, family.keys, *(part.keys for part in family.parts))
  known |= {key.other for key in family.keys.values()}
  unknown = [name for name in theirs if name not in known]
  if unknown and not quiet:
    note(f"config.json has keys that llmjax does not know and leaves out: {', '.join(unknown)}")
  return values


def _value(family: Family, name: str, key: Key, theirs: dict, values: dict):
  """Our value of one of their keys."""
  value = theirs.get(name, theirs.get(key.other, key.default))
  if value is None and key.null is not REQUIRED:
    value = key.null
  if value is None and callable(key.default):
    value = key.default
  if value is REQUIRED or (value is None and key.default is not None):
    raise UserError(f"config.json of this {family.name} model has no {name!r}")
  if callable(value):
    value = value(values)
  if key.values is None:
    return value
  if isinstance(key.values, tuple) and not isinstance(value, str | dict):
    return key.values[0](value, values)
  if isinstance(value, list | dict) or value not in key.values:
    words = key.values if isinstance(key.values, dict) else ("numbers",)
    known = ", ".join(repr(each) for each in words)
    raise UserError(f"{family.name} with {name}={value!r} is not supported; known: {known}")
  return key.values[value]


def write_config(family: Family, config: ModelConfig) -> dict:
  """Translates an architecture into a family's keys, `model_type` and `architectures` among them.

  Raises:
    UserError: the family has no word for a value.
  """
  flat = configs.flat(config)
  theirs = {"model_type": family.name, "architectures": [family.architecture]}
  for name, key in family.keys.items():
    value = flat[key.ours] if key.ours else None
    if isinstance(key.values, tuple):
      value = key.values[1](value, config)
    elif key.values is not None:
      words = [word for word, ours in key.values.items() if ours == value]
      if not words:
        raise UserError(f"{family.name} has no {key.ours}={value!r}")
      value = words[0]
    theirs[name] = None if value == key.null and key.ours else value
  for part in family.parts:
    theirs |= part.write(config)
  return theirs


def misfits(family: Family, config: ModelConfig) -> list[str]:
  """Says what of an architecture a family cannot hold: sentences, none if it holds all of it."""
  config, kind = canonical(config), family.fixed.get("kind", "decoder")
  if config.kind != kind:
    return [f"its kind is {kind}"] * 9
  try:
    back = canonical(read_config(family, write_config(family, config), quiet=True))
  except UserError as error:
    return [str(error)] * 2
  have, want = configs.flat(back), configs.flat(config)
  return [
    f"its {key} is {have[key]!r}, not {want[key]!r}"
    for key in want
    if have[key] != want[key] and key not in RUN_KEYS
  ]
