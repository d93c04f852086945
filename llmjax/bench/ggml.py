"""llama.cpp as a peer of decoding, through its C interface: a GGUF file of the same weights, one
batch of sequences that advance together, the highest score taken with numpy.
"""

from pathlib import Path

import gguf
import llama_cpp as api
import numpy as np
from safetensors.numpy import load_file

from llmjax.bench.sizes import (
  NEW_TOKENS,
  NORM_EPS,
  PROMPT_TOKENS,
  ROPE_THETA,
  SIZES,
  Size,
  prepare_decode,
)
from llmjax.bench.workers import Spec

_SEQUENCES = 8


def write_gguf(size: Size, tensors: dict, dtype: str, path: Path) -> None:
  """Writes a Llama as a GGUF file without a vocabulary, matrices in `dtype`."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(size.layers)
  writer.add_context_length(PROMPT_TOKENS + NEW_TOKENS)
  writer.add_embedding_length(size.width)
  writer.add_feed_forward_length(size.mlp_width)
  writer.add_head_count(size.heads)
  writer.add_head_count_kv(size.heads)
  writer.add_rope_dimension_count(size.width // size.heads)
  writer.add_rope_freq_base(ROPE_THETA)
  writer.add_layer_norm_rms_eps(NORM_EPS)
  writer.add_vocab_size(size.vocab_size)
  writer.add_tokenizer_model("no_vocab")

  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.layers)
  for theirs, array in tensors.items():
    name, kind = names.get_name(theirs, [".weight"]), None
    if name.endswith(("attn_q.weight", "attn_k.weight")):
      array = _interleave_halves(array, size.heads)
    if array.ndim == 2 and dtype == "bfloat16":
      kind = gguf.GGMLQuantizationType.BF16
      array = gguf.quants.quantize(array, kind)
    writer.add_tensor(name, array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _interleave_halves(array, heads: int):
  """Reorders a head's rows from rotary halves (i, i + h/2) to llama.cpp's pairs (2i, 2i + 1)."""
  rows, width = array.shape
  return array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def decode(spec: Spec):
  """Prepares llama.cpp's `llama_decode` with up to eight sequences."""
  size = SIZES[spec.size]
  path = Path(spec.folder, f"{spec.dtype}.gguf")
  write_gguf(size, load_file(Path(spec.folder, "model.safetensors")), spec.dtype, path)
  context = _open(path, spec.cores)
  batch = api.llama_batch_init(_SEQUENCES * PROMPT_TOKENS, 0, 1)

  def step(rows, start: int) -> list[int]:
    """Feeds each sequence its tokens from position `start`; returns the best next ones."""
    place, wanted = 0, []
    for number, row in enumerate(rows):
      for offset, token in enumerate(row):
        batch.token[place] = token
        batch.pos[place] = start + offset
        batch.n_seq_id[place] = 1
        batch.seq_id[place][0] = number
        batch.logits[place] = offset == len(row) - 1
        place += 1
      wanted.append(place - 1)
    batch.n_tokens = place
    if api.llama_decode(context, batch):
      raise RuntimeError("llama_decode failed")
    scores = [api.llama_get_logits_ith(context, at) for at in wanted]
    return [int(np.ctypeslib.as_array(row, (size.vocab_size,)).argmax()) for row in scores]

  def run(rows, new_tokens: int) -> list[list[int]]:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    made = [step(rows, 0)]
    for done in range(new_tokens - 1):
      made.append(step([[token] for token in made[-1]], PROMPT_TOKENS + done))
    return [list(column) for column in zip(*made, strict=True)]

  return prepare_decode(size, run)


def _open(path: Path, cores: int):
  api.llama_backend_init()
  model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
  wanted = api.llama_context_default_params()
  wanted.n_ctx = _SEQUENCES * (PROMPT_TOKENS + NEW_TOKENS)
  wanted.n_batch = wanted.n_ubatch = _SEQUENCES * PROMPT_TOKENS
  wanted.n_seq_max = _SEQUENCES
  wanted.n_threads = wanted.n_threads_batch = cores
  context = api.llama_init_from_model(model, wanted)
  if not context:
    raise RuntimeError(f"llama.cpp cannot open {path}")
  return context
