"""GGUF files, llama.cpp's: one file of metadata, tokenizer and (mostly quantized) tensors.

Parsing and dequantizing are the `gguf` package's; here is which tensor becomes which weight.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.gguf_config import Metadata, config_of, with_divisors
from llmjax.models.hf_layout import from_tensors
from llmjax.models.model import Model
from llmjax.nn.mlp import GATED
from llmjax.text.gguf import from_gguf

# Their name → (their letters, our path or paths), as in `hf_layout`; `@` is the stack's name.
_ROWS = {
  "token_embd.weight": ("vd", "embed/token_vd"),
  "token_embd_norm.weight": ("d", "embed/norm/scale_d"),
  "token_embd_norm.bias": ("d", "embed/norm/bias_d"),
  "position_embd.weight": ("td", "embed/position_td"),
  "token_types.weight": ("id", "embed/type_id"),
  "output.weight": ("vd", "embed/head_dv"),
  "output_norm.weight": ("d", "@/norm/scale_d"),
  "output_norm.bias": ("d", "@/norm/bias_d"),
}
_BLOCK_ROWS = {
  "attn_q.weight": ("(nh)d", "attention/query_dnh"),
  "attn_k.weight": ("(kh)d", "attention/key_dkh"),
  "attn_v.weight": ("(kh)d", "attention/value_dkh"),
  "attn_q.bias": ("(nh)", "attention/query_bias_nh"),
  "attn_k.bias": ("(kh)", "attention/key_bias_kh"),
  "attn_v.bias": ("(kh)", "attention/value_bias_kh"),
  "attn_qkv.weight": (
    "(nh+kh+kh)d", ("attention/query_dnh", "attention/key_dkh", "attention/value_dkh")
  ),
  "attn_qkv.bias": (
    "(nh+kh+kh)", ("attention/query_bias_nh", "attention/key_bias_kh", "attention/value_bias_kh")
  ),
  "attn_output.weight": ("d(nh)", "attention/out_nhd"),
  "attn_output.bias": ("d", "attention/out_bias_d"),
  "ffn_gate.weight": ("fd", "mlp/gate_df"),
  "ffn_up.weight": ("fd", "mlp/up_df"),
  "ffn_up.bias": ("f", "mlp/up_bias_f"),
  "ffn_down.weight": ("df", "mlp/down_fd"),
  "ffn_down.bias": ("d", "mlp/down_bias_d"),
}
_QK_NORMS = {
  "head": {"attn_q_norm": ("h", "query_norm/scale_h"), "attn_k_norm": ("h", "key_norm/scale_h")},
  "all": {
    "attn_q_norm": ("(nh)", "query_norm/scale_nh"), "attn_k_norm": ("(kh)", "key_norm/scale_kh")
  },
  "none": {},
}
# Where norms stand in a block → our norms by the names of theirs.
_NORMS = {
  "pre": {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"},
  "post": {"attn_output_norm": "attention_norm", "layer_output_norm": "mlp_norm"},
  "output": {"post_attention_norm": "attention_norm", "post_ffw_norm": "mlp_norm"},
}
_NORMS["sandwich"] = _NORMS["pre"] | {
  "post_attention_norm": "attention_out_norm", "post_ffw_norm": "mlp_out_norm"
}
# What files of encoders come without: the head of masked tokens, the pooler.
_ABSENT = (
  "transform_id", "transform_bias_d", "transform_norm/scale_d", "transform_norm/bias_d",
  "pooler_id", "pooler_bias_d", "embed/head_bias_v",
)


class Tensors(Mapping):
  """A file's tensors by name, dequantized to fp32 when asked for."""

  def __init__(self, reader: gguf.GGUFReader):
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      kind = tensor.tensor_type.name
      raise UserError(f"tensor {name!r} is of type {kind}, which is not known here") from error

  def __iter__(self):
    return iter(self._tensors)

  def __len__(self):
    return len(self._tensors)

  def shapes(self) -> dict[str, tuple]:
    """Shapes of what comes out, the dimension that is multiplied last."""
    return {
      name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()
    }

  def pop(self, name: str) -> np.ndarray | None:
    """Takes a tensor out, if it is there."""
    if name not in self._tensors:
      return None
    array = self[name]
    del self._tensors[name]
    return array


def is_file(path) -> bool:
  """Tells a GGUF file by its first bytes, or by its name where it is damaged."""
  path = Path(path)
  if not path.is_file():
    return False
  with path.open("rb") as file:
    return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def load_file(path) -> Model:
  """Loads a GGUF file; weights are dequantized to fp32.

  Args:
    path: of the file.
  Returns:
    The model, with the tokenizer the file describes, if it does.
  Raises:
    UserError: not a whole GGUF file, or an architecture, a type of tensor or a tokenizer that is
      not known here.
  Source: ggml's docs/gguf.md, and the names in llama.cpp's convert_hf_to_gguf.py.
  """
  values, tensors = _read(path)
  config = config_of(Metadata(values), tensors.shapes())
  divisors = tensors.pop("rope_freqs.weight")
  if divisors is not None:
    position = with_divisors(config.position, config.dims["h"], divisors.astype(np.float64))
    config = dataclasses.replace(config, position=position)
  made = from_tensors(config, tensors, _table(config, tensors), optional=_ABSENT)
  tokenizer = from_gguf(values) if "tokenizer.ggml.model" in values else None
  return Model(config, made, tokenizer)


def _read(path) -> tuple[dict, Tensors]:
  """Parses a file: (metadata, tensors)."""
  try:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, Tensors(reader)
  except OSError as error:
    raise UserError(f"GGUF file {str(path)!r}: {error.strerror or error}") from error
  except Exception as error:  # the reader takes bytes for what they may not be, and trips anywhere
    reason = " ".join(str(error).split())[:100]
    raise UserError(
      f"{str(path)!r} is not a whole GGUF file ({type(error).__name__}: {reason})"
    ) from error


def _table(config: ModelConfig, names) -> dict:
  """The rows of this architecture that its file has."""
  block = dict(_BLOCK_ROWS)
  if config.activation in GATED and "blk.0.ffn_gate.weight" not in names:
    block["ffn_up.weight"] = ("(f+f)d", ("mlp/gate_df", "mlp/up_df"))
  for theirs, ours in _NORMS[config.norm.place].items():
    block[f"{theirs}.weight"] = ("d", f"{ours}/scale_d")
    block[f"{theirs}.bias"] = ("d", f"{ours}/bias_d")
  for theirs, (letters, path) in _QK_NORMS[config.attention.qk_norm].items():
    block[f"{theirs}.weight"] = (letters, f"attention/{path}")
  stack = "encoder" if config.kind == "encoder" else "decoder"
  table = {name: (letters, path.replace("@", stack)) for name, (letters, path) in _ROWS.items()}
  for name, (letters, paths) in block.items():
    paths = (paths,) if isinstance(paths, str) else paths
    table[f"blk.{{l}}.{name}"] = (letters, tuple(f"{stack}/blocks/{path}" for path in paths))
  # Of attn_q and attn_qkv a file has one; what else it lacks is reported by our own path.
  held = {name: row for name, row in table.items() if name.format(l=0) in names}
  return held | {f"(none for {path})": ("", path) for path in _ABSENT}
