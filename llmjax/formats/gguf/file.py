"""GGUF files, llama.cpp's format of metadata, tokenizer and (mostly quantized) tensors, which the
`gguf` package parses and dequantizes; here is which tensor becomes which weight."""

import functools
import re
from pathlib import Path

import gguf
import numpy as np

from llmjax.core.errors import UserError, note
from llmjax.formats.gguf.config import config_of
from llmjax.formats.gguf.rope import TENSORS
from llmjax.formats.hf.layout import Tensors, from_tensors
from llmjax.models import pooling
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model
from llmjax.text.gguf import from_gguf
from llmjax.text.tokenizer import Tokenizer

# Tensor → module, as in `hf.layout`; `@` is the stack's name.
_ROWS = {
  "token_embd.weight": ("vd", "embed/token_vd"),
  "token_embd_norm": "embed/norm",
  "position_embd.weight": ("td", "embed/position_td"),
  "token_types.weight": ("id", "embed/type_id"),
  "output.weight": ("vd", "embed/head_dv"),
  "output_norm": "@/norm",
  "blk.{l}.attn_{q,k,v}": "@/blocks/attention/{query,key,value}",
  "blk.{l}.attn_{q,k}_norm": "@/blocks/attention/{query,key}_norm",
  "blk.{l}.attn_output": "@/blocks/attention/out",
  "blk.{l}.ffn_{gate,up}": "@/blocks/mlp/{gate,up}",
  "blk.{l}.ffn_down": "@/blocks/mlp/down",
}
# Where norms stand in a block → their tensors and our norms.
_NORMS = {
  "pre": {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"},
  "post": {"attn_output_norm": "attention_norm", "layer_output_norm": "mlp_norm"},
  "output": {"post_attention_norm": "attention_norm", "post_ffw_norm": "mlp_norm"},
}
_NORMS["sandwich"] = _NORMS["pre"] | {
  "post_attention_norm": "attention_out_norm", "post_ffw_norm": "mlp_out_norm"
}
# What files of encoders come without: the head of masked tokens, the pooler.
_ABSENT = (r"^transform", r"^pooler", r"^embed/head_bias_v$")


def is_file(path) -> bool:
  """Tells a GGUF file by its first bytes, or a damaged one by its name."""
  path = Path(path)
  if not path.is_file():
    return False
  with path.open("rb") as file:
    return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def load_file(path) -> Model:
  """Loads a GGUF file; weights are dequantized to fp32.

  Args:
    path: of the file, or of the first where a model is split into several.
  Returns:
    The model, with the tokenizer the file describes; where that is not known here a note says why
    there is none.
  Raises:
    UserError: not a whole GGUF file, or an architecture, a key or a type of tensor that is not
      known here.
  Source: ggml's docs/gguf.md, and the names in llama.cpp's convert_hf_to_gguf.py.
  """
  values, stored = _read(path)
  shapes = {name: tuple(int(n) for n in reversed(each.shape)) for name, each in stored.items()}
  readers = {name: functools.partial(_dequantize, tensor) for name, tensor in stored.items()}
  factors = {name: readers.pop(name)() for name in TENSORS if name in readers}
  config = config_of(values, shapes, factors)
  if config.layers > len(shapes):
    raise UserError(f"{str(path)!r} says {config.layers} layers, but holds {len(shapes)} tensors")
  weights = from_tensors(config, Tensors(readers), _table(config, shapes), optional=_ABSENT)
  pooled = pooling.from_gguf(values.get(f"{values['general.architecture']}.pooling_type"))
  return Model(config, weights, _tokenizer(values, config.vocab_size), pooled)


def _tokenizer(values: dict, vocab_size: int) -> Tokenizer | None:
  """The tokenizer; an unknown one does not keep the weights from being used."""
  try:
    tokenizer = from_gguf(values)
    if tokenizer.vocab_size > vocab_size:
      raise UserError(f"it has {tokenizer.vocab_size:,} tokens, the embedding {vocab_size:,} rows")
    return tokenizer
  except UserError as error:
    note(f"the model has no tokenizer: {error}")
    return None


def _read(path) -> tuple[dict, dict]:
  values, tensors = _parse(path)
  count, wanted = values.get("split.count", 1), values.get("split.tensors.count", len(tensors))
  if count <= 1:
    return values, tensors
  name = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", Path(path).name)
  if not name:
    raise UserError(f"{str(path)!r} is one of {count} files, but not called …-00001-of-0000N.gguf")
  names = [Path(path).with_name(f"{name[1]}{i + 1:05}{name[2]}") for i in range(count)]
  if values.get("split.no", 0):
    raise UserError(f"{str(path)!r} is one of {count} files; load the first, {str(names[0])!r}")
  for i, other in enumerate(names[1:], 1):
    more, added = _parse(other)
    if (more.get("split.no"), more.get("split.count")) != (i, count):
      raise UserError(f"{str(other)!r} says that it is not file {i + 1} of {count}")
    tensors |= added
  if len(tensors) != wanted:
    raise UserError(f"the {count} files of {str(path)!r} hold {len(tensors)} tensors, not {wanted}")
  return values, tensors


def _parse(path) -> tuple[dict, dict]:
  try:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
  except OSError as error:
    raise UserError(f"GGUF file {str(path)!r}: {error.strerror or error}") from error
  except Exception as error:  # the reader takes bytes for what they may not be, and trips anywhere
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    raise UserError(
      f"{str(path)!r} is not a whole GGUF file, or of a later kind ({reason})"
    ) from error
  if reader.byte_order == "S":
    raise UserError(f"{str(path)!r} is a GGUF file for machines of the other byte order")
  return values, tensors


def _dequantize(tensor) -> np.ndarray:
  """A tensor in fp32, the dimension that is multiplied last."""
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    kind = tensor.tensor_type.name
    raise UserError(f"tensor {tensor.name!r} is of type {kind}, which is not known here") from error


def _table(config: ModelConfig, names) -> dict:
  norms = _NORMS[config.norm.place]
  rows = _ROWS | {f"blk.{{l}}.{name}": f"@/blocks/{norm}" for name, norm in norms.items()}
  if "blk.0.attn_qkv.weight" in names:
    rows["blk.{l}.attn_qkv"] = rows.pop("blk.{l}.attn_{q,k,v}")
  if "blk.0.ffn_gate.weight" not in names:
    rows["blk.{l}.ffn_up"] = rows.pop("blk.{l}.ffn_{gate,up}")
  stack = "encoder" if config.kind == "encoder" else "decoder"
  found = {name: row.replace("@", stack) for name, row in rows.items() if isinstance(row, str)}
  return rows | found
