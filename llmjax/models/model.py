"""`Model`: a config, its parameters and a tokenizer, as `llmjax.load` returns them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.core.weight import cast, is_kind
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.depth import unstack_layers, views
from llmjax.models.inputs import Rows, check_ids, encode_inputs
from llmjax.models.pooling import Pooling
from llmjax.models.processor import Processor
from llmjax.models.states import attention_maps, hidden_states
from llmjax.nn.param import fp32_weights, roles
from llmjax.parallel.rules import weight_shardings
from llmjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
  """A model ready for use.

  Attributes:
    config: the architecture.
    parameters: the module, itself a tree of fp32 arrays.
    tokenizer: None where the checkpoint has none.
    pooling: how texts are embedded; None where the model's files do not say.
    processor: how images are preprocessed; likewise.
  """

  config: ModelConfig
  parameters: nnx.Module
  tokenizer: Tokenizer | None = None
  pooling: Pooling | None = None
  processor: Processor | None = None

  @functools.cached_property
  def mesh(self) -> Mesh | None:
    """The mesh of decoding: the parameters' with `context` merged into `data`, `stage` into `fsdp`.

    None: the parameters are not sharded.
    """
    shardings = (leaf.sharding for leaf in jax.tree.leaves(self.parameters))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    if mesh is None or mesh.size == 1:
      return None
    order = ("data", "context", "fsdp", "stage", "expert", "tensor")
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    data, context, fsdp, stage, expert, tensor = devices.shape
    sizes = {"data": data * context, "fsdp": fsdp * stage, "expert": expert, "tensor": tensor}
    shape = [sizes.get(axis, 1) for axis in mesh.axis_names]
    return Mesh(devices.reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)

  @functools.cached_property
  def decoding(self) -> nnx.Module:
    """The parameters as decoding reads them: layers unstacked, matrices in the compute dtype.

    Computed at the first use. On a single CPU device, weights that are not cast share their memory
    with `parameters`.
    """
    leaves = jax.tree.leaves(self.parameters)
    if {d for leaf in leaves for d in leaf.devices()} == {jax.devices("cpu")[0]}:
      return decoding_weights(self.parameters, views)
    weights = jax.jit(decoding_weights)(self.parameters)
    return weights if self.mesh is None else jax.device_put(
      weights, weight_shardings(self.mesh, weights)
    )

  def encode(self, inputs):
    """Encodes inputs as the model reads them, with the ids that stand around a text.

    Args:
      inputs: text, token ids (taken as they are) or chat messages, or a list of these.
    Returns:
      A list of ids, or a list of lists.
    Raises:
      UserError: no tokenizer or no chat template.
    """
    rows = encode_inputs(inputs, self.tokenizer, self.config.kind)
    return rows.ids[0] if rows.single else rows.ids

  def logits(self, inputs):
    """Scores the next token at every position; an encoder scores the token itself.

    Args:
      inputs: text, token ids or chat messages, or a list of these; each is one document from
        position 0.
    Returns:
      logits_btv, fp32, NaN after the end of shorter rows; logits_tv for one input.
    Raises:
      UserError: rows longer than the context, an id outside the vocabulary, or a kind of model
        that does not read tokens alone.
    """
    rows, batch = self._batch(inputs, "logits")
    return rows.unpad(_logits(self.parameters, batch), 1)

  def hidden(self, inputs, layers: Sequence[int] | None = None):
    """Computes the residual stream, at the end or between blocks.

    Args:
      inputs: as of `logits`.
      layers: 0 is the embedded tokens, i the result of block i, -1 that of the last one.
        `parameters.logits(parameters.final_norm(x))` reads each as the head would (the logit
        lens). None: what the head reads.
    Returns:
      x_lbtd for `layers`, x_btd for None, in the compute dtype, NaN after the end of shorter rows;
      of one input without `b`.
    Raises:
      UserError: as `logits`, or there is no such layer.
    """
    rows, batch = self._batch(inputs, "hidden")
    if layers is None:
      return rows.unpad(_hidden(self.parameters, batch), 1)
    return rows.unpad(hidden_states(self.parameters, batch, layers), 2, 1)

  def attention(self, inputs, layers: Sequence[int] | None = None):
    """Computes the weights with which each token attends to each.

    Args:
      inputs: as of `logits`.
      layers: blocks, from 0; None: all.
    Returns:
      weights_lbnts, fp32: [layers, b, heads, queries, keys], NaN for the queries after the end of
      shorter rows; of one input without `b`.
    Raises:
      UserError: as `logits`, or there is no such layer.
    """
    rows, batch = self._batch(inputs, "attention")
    longest = max(map(len, rows.ids))
    return rows.unpad(attention_maps(self.parameters, batch, layers)[..., :longest], 3, 1)

  def _batch(self, inputs, name: str) -> tuple[Rows, Batch]:
    """Inputs as rows and as a batch; `name` is of the function that wants them."""
    if self.config.kind in ("encoder_decoder", "vision"):
      raise UserError(f"{name} wants a decoder or an encoder, not model.kind={self.config.kind}")
    rows = encode_inputs(inputs, self.tokenizer, self.config.kind)
    tokens_bt, inside_bt = rows.pad(self.config.max_seq_len)
    check_ids(rows.ids, self.config.vocab_size)
    segments_bt = None if inside_bt.all() else inside_bt.astype(np.int32)
    return rows, Batch(tokens_bt, segments_bt=segments_bt)


def decoding_weights(model: nnx.Module, take=None) -> nnx.Module:
  """A model as decoding reads it: layers unstacked by `take`, matrices in the compute dtype."""
  return cast_weights(unstack_layers(model, take), model.config.dtype)


def cast_weights(model: nnx.Module, dtype) -> nnx.Module:
  """Casts the matrices and tables that every product casts anyway, which changes no result.

  Those that their module reads in fp32 stay fp32, and the codes of quantized ones stay codes.
  """
  role_of, read_in_fp32 = roles(model), fp32_weights(model)

  def cast_leaf(path, leaf):
    read_low = role_of[path] in ("matrix", "table") and path not in read_in_fp32
    return cast(leaf, dtype) if read_low else leaf

  return tree.map_with_path(cast_leaf, model, is_leaf=is_kind)


@jax.jit
def _hidden(model: nnx.Module, batch: Batch):
  return model.hidden(batch)[0]


@jax.jit
def _logits(model: nnx.Module, batch: Batch):
  return model.logits(model.hidden(batch)[0])
