"""The keys of a GGUF file: read, known to change nothing, or refused because they would."""

import math
from collections.abc import Mapping

import numpy as np

from llmjax.core.errors import UserError, note

# Keys of an architecture that change no number: of another kind of norm, position or scaling, or of
# experts where there are none.
_HARMLESS = (
  "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "classifier.output_labels",
  "context_length", "interleave_moe_layer_step", "leading_dense_block_count", "moe_every_n_layers",
  "pooling_type", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
  "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
  "vocab_size",
)
# Keys that change the result and are not read: the values with which they would not.
_ZERO = (
  "attention.clamp_kqv", "attention.max_alibi_bias", "attention.shared_kv_layers",
  "attention.temperature_length", "attention.temperature_scale", "embedding_length_per_layer_input",
  "n_deepstack_layers", "nextn_predict_layers", "rope.scaling.alpha",
  "rope.scaling.yarn_log_multiplier", "swin_norm", "use_parallel_residual",
)
_FACTORS = ("attention.output_scale", "attention.value_scale", "logit_scale", "residual_scale")
_NEUTRAL = dict.fromkeys(_ZERO, (0,)) | dict.fromkeys(_FACTORS, (0, 1)) | {
  "hidden_activation": (),
  "rope.dimension_sections": (),
  "rope.scaling.yarn_attn_factor": (1,),
  "rope.scaling.yarn_ext_factor": (-1, 1),
  "tensor_data_layout": ("Meta AI original pth", "reference"),
}
# Prefixes of keys that other code reads (the tokenizer, the reader of files) or that only describe.
_ELSEWHERE = ("GGUF.", "general.", "quantize.", "split.", "tokenizer.")


class Metadata:
  """A file's keys and values, those of its architecture without prefix, and which were read.

  Raises:
    UserError: no model, or an architecture that is not in `known`.
  """

  def __init__(self, values: Mapping, known: Mapping):
    self.values = values
    self.name = values.get("general.architecture")
    self._asked = set()
    kind = values.get("general.type", "model")
    if kind != "model":
      raise UserError(f"this GGUF file holds no model: its general.type is {kind!r}")
    if self.name not in known:
      raise UserError(f"GGUF architecture {self.name!r} is not one of {', '.join(sorted(known))}")

  def get(self, key: str, default=None):
    """The value of a key, or a default; 32-bit floats as they were written, 1e-5 as 1e-5.

    Raises:
      UserError: the default is a number, and the value is not a finite one.
    """
    self._asked.add(key)
    value = self.values.get(f"{self.name}.{key}")
    if value is None:
      return default
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(default, (int, float)) and not is_number:
      raise UserError(f"GGUF key '{self.name}.{key}' is {value!r}, not a finite number")
    return float(str(np.float32(value))) if isinstance(value, float) else value

  def count(self, key: str, default: int | None = None) -> int:
    """A count, the same for all layers; without a default it must be there."""
    value = self.get(key)
    value = default if value is None else value
    if isinstance(value, list) and len(set(value)) == 1:
      value = value[0]
    if not isinstance(value, int):
      found = "missing" if value is None else f"{value!r}, not one whole number"
      raise UserError(f"GGUF key '{self.name}.{key}' is {found}")
    return value

  def check_rest(self):
    """Names unknown keys that were not read in a note; `UserError` if one changes the result."""
    unknown = []
    for name, value in self.values.items():
      key = name.removeprefix(f"{self.name}.")
      if key in self._asked or key in _HARMLESS or key.startswith("expert"):
        continue
      if key in _NEUTRAL and value not in _NEUTRAL[key]:
        raise UserError(
          f"GGUF key {name!r} is {value!r}, which changes the result and is not supported"
        )
      if key not in _NEUTRAL and not name.startswith(_ELSEWHERE):
        unknown.append(name)
      if name.startswith("general.sampling."):
        unknown.append(name)
    if unknown:
      note(f"nothing reads these keys of the GGUF file: {', '.join(unknown)}")
