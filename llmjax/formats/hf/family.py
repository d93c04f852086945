"""A family of published models: tables of its config keys and tensor names. A family holds a
`ModelConfig` if writing it as `config.json` and reading that gives it back."""

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
  """What one key of a `config.json` means.

  Attributes:
    field: dotted key of `ModelConfig`; empty for a key that is only checked.
    default: its value where it is absent, that of the family's config class in transformers; or a
      function of the `ModelConfig` values read so far.
    values: value in `config.json` → value of the field, the first of several being written; None:
      the same. Or two functions: of the value and the fields read so far, of the field and the
      `ModelConfig`.
    null: what null means, and what is written as null; by default null is refused where the default
      is a value.
    other: another name of the key, read where the first is absent.
  """

  field: str
  default: object = REQUIRED
  values: dict | tuple | None = None
  null: object = REQUIRED
  other: str = ""


def only(*values) -> Key:
  """A key that has to have one of these values, the first of which is its default."""
  return Key("", values[0], dict.fromkeys(values))


@dataclasses.dataclass(frozen=True)
class Codec:
  """What a table of keys cannot say.

  Attributes:
    keys: keys of `config.json` that `read` looks at.
    read: (`config.json`, fields read so far) → more fields by dotted key.
    write: `ModelConfig` → keys of `config.json`; raises `UserError` where none express it.
  """

  keys: tuple
  read: Callable[[dict, dict], dict] = lambda raw, fields: {}
  write: Callable[[ModelConfig], dict] = lambda config: {}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models in transformers.

  Attributes:
    name: `model_type`.
    architecture: the class that transformers builds.
    keys: key of `config.json` → `Key`.
    tensors: name of tensors → our module, or (letters, path or paths); see `hf.layout`.
    codecs: what the table of keys cannot say.
    fixed: dotted key of `ModelConfig` → the value that the family implies.
    offset: norm scales are stored less this number.
    aliases: (pattern, replacement): other spellings of tensor names.
    ignore: patterns of tensor names that hold nothing a model needs.
    dropped: patterns of tensor names that llmjax has no use for; reading says so.
    skip: (tensor name, config) → whether this config leaves the tensor out.
    twins: name of a copy → its original, beside the head that may be a copy of the embedding.
    optional: patterns of our paths that a folder may lack.
    constants: tensor written beside ours → (value, name of the tensor whose shape it has).
    head_optional: a folder without a head is one of tied embeddings, whatever its config says.
    written: whether models are exported as this family.
  """

  name: str
  architecture: str
  keys: dict
  tensors: dict
  codecs: tuple = ()
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
    """The name of the tensor that holds one of our weights."""
    return next((name for name, row in self.tensors.items() if row[1:] == (path,)), None)

  @property
  def copies(self) -> dict:
    """Name of a copy → its original; equal copies are dropped."""
    return self.twins | {self.name_of("embed/head_dv"): self.name_of("embed/token_vd")}


def read_config(family: Family, raw: dict, quiet: bool = False) -> ModelConfig:
  """Translates a `config.json`, with a note of unknown keys unless `quiet`; arithmetic is fp32.

  Raises:
    UserError: a key is missing, or has a value that llmjax cannot compute with.
  """
  fields = {"dtype": "float32", **read_fields(family, raw, quiet)}
  return configs.freeze(unflatten_dict(fields, sep="."), ModelConfig, "model.")


def read_fields(family: Family, raw: dict, quiet: bool = False) -> dict:
  """Translates a `config.json` (or a section of one) into dotted keys; see `read_config`."""
  fields = dict(family.fixed)
  for name, key in family.keys.items():
    value = _read_key(family, name, key, raw, fields)
    if key.field:
      fields[key.field] = configs.coerce(value, KINDS[key.field], f"model.{key.field}")
  for codec in family.codecs:
    try:
      fields |= codec.read(raw, fields)
    except (TypeError, AttributeError) as error:  # a list or a text where a number is meant
      keys = ", ".join(filter(None, codec.keys))
      raise UserError(f"one of {keys} has a value of another kind: {error}") from error
  for key in filter(raw.get, REFUSED):
    raise UserError(f"this {family.name} folder {REFUSED[key]} ({key}); not supported")
  known = HARMLESS.union(REFUSED, family.keys, *(codec.keys for codec in family.codecs))
  known |= {key.other for key in family.keys.values()}
  unknown = [name for name in raw if name not in known]
  if unknown and not quiet:
    note(f"config.json has keys that llmjax does not know and leaves out: {', '.join(unknown)}")
  return fields


def _read_key(family: Family, name: str, key: Key, raw: dict, fields: dict):
  value = raw.get(name, raw.get(key.other, key.default))
  if value is None and key.null is not REQUIRED:
    value = key.null
  if value is None and callable(key.default):
    value = key.default
  if value is REQUIRED or (value is None and key.default is not None):
    raise UserError(f"config.json of this {family.name} model has no {name!r}")
  if callable(value):
    value = value(fields)
  if key.values is None:
    return value
  if isinstance(key.values, tuple) and not isinstance(value, str | dict):
    return key.values[0](value, fields)
  if isinstance(value, list | dict) or value not in key.values:
    known = key.values if isinstance(key.values, dict) else ("numbers",)
    known = ", ".join(map(repr, known))
    raise UserError(f"{family.name} with {name}={value!r} is not supported; known: {known}")
  return key.values[value]


def write_config(family: Family, config: ModelConfig) -> dict:
  """Translates an architecture into a family's keys, `model_type` and `architectures` among them.

  Raises:
    UserError: the family cannot express a value.
  """
  flat = configs.flat(config)
  raw = {"model_type": family.name, "architectures": [family.architecture]}
  for name, key in family.keys.items():
    value = flat[key.field] if key.field else None
    if isinstance(key.values, tuple):
      value = key.values[1](value, config)
    elif key.values is not None:
      spellings = [spelling for spelling, meaning in key.values.items() if meaning == value]
      if not spellings:
        raise UserError(f"{family.name} has no {key.field}={value!r}")
      value = spellings[0]
    raw[name] = None if value == key.null and key.field else value
  for codec in family.codecs:
    raw |= codec.write(config)
  return raw


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
