"""The keys of a GGUF file: read, known to change nothing, or refused because they would.

`Metadata` remembers what was asked for, so that what a file says beyond that can be told.
"""

import math
from collections.abc import Mapping

import numpy as np

from llmjax.core.errors import UserError, note

# Keys of an architecture that change no number: of another kind of norm, position or scaling, or of
# experts where there are none.
_HARMLESS = (
  "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "classifier.output_labels",
  "context_length", "interleave_moe_layer_step", "leading_dense_block_count", "moe_every_n_layers",
  "pooling_type",
  "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.finetuned",
  "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "vocab_size",
)
# Keys that change the result and are not read: the values with which they would not.
_NEUTRAL = {
  "attention.clamp_kqv": (0,),
  "attention.max_alibi_bias": (0,),
  "attention.output_scale": (0, 1),
  "attention.shared_kv_layers": (0,),
  "attention.temperature_length": (0,),
  "attention.temperature_scale": (0,),
  "attention.value_scale": (0, 1),
  "embedding_length_per_layer_input": (0,),
  "hidden_activation": (),
  "logit_scale": (0, 1),
  "n_deepstack_layers": (0,),
  "nextn_predict_layers": (0,),
  "residual_scale": (0, 1),
  "rope.dimension_sections": (),
  "rope.scaling.alpha": (0,),
  "rope.scaling.yarn_attn_factor": (1,),
  "rope.scaling.yarn_ext_factor": (-1, 1),
  "rope.scaling.yarn_log_multiplier": (0,),
  "swin_norm": (False,),
  "tensor_data_layout": ("Meta AI original pth", "reference"),
  "use_parallel_residual": (False,),
}
# Groups of keys that others read (the tokenizer, the reader of files) or that only describe.
_ELSEWHERE = ("GGUF.", "general.", "quantize.", "split.", "tokenizer.")


class Metadata:
  """A file's keys; those of its architecture are asked for without their prefix.

  Args:
    values: the file's keys with their values.
    known: architectures.
  Raises:
    UserError: no model, or one of another architecture.
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
    if isinstance(default, (int, float)) and not _is_number(value):
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
    """Looks at the keys that nobody asked for, and names those that are not known in a note.

    Raises:
      UserError: one of them changes the result.
    """
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


def _is_number(value) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)
