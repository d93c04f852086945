"""`Model`: a config, its parameters and a tokenizer, as `llmjax.load` returns them."""

import dataclasses
import functools

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
from llmjax.models.pooling import Pooling
from llmjax.models.processor import Processor
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

  def logits(self, tokens_bt):
    """Scores the next token at every position.

    Args:
      tokens_bt: int ids, each row one document from position 0.
    Returns:
      logits_btv, fp32.
    Raises:
      UserError: rows longer than the context, an id outside the vocabulary, or a kind of model
        that does not read tokens alone.
    """
    if self.config.kind in ("encoder_decoder", "vision"):
      raise UserError(f"logits wants a decoder or an encoder, not model.kind={self.config.kind}")
    tokens_bt = np.asarray(tokens_bt, np.int32)
    if tokens_bt.ndim != 2:
      raise UserError(f"tokens_bt has rank {tokens_bt.ndim}; logits wants [batch, positions]")
    if tokens_bt.shape[1] > self.config.max_seq_len:
      raise UserError(
        f"{tokens_bt.shape[1]} tokens are more than the context of {self.config.max_seq_len}"
      )
    if tokens_bt.size and not 0 <= tokens_bt.min() <= tokens_bt.max() < self.config.vocab_size:
      raise UserError(
        f"token ids run from {tokens_bt.min()} to {tokens_bt.max()}, "
        f"the vocabulary from 0 to {self.config.vocab_size - 1}"
      )
    return _logits(self.parameters, Batch(tokens_bt))


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
def _logits(model: nnx.Module, batch: Batch):
  return model.logits(model.hidden(batch)[0])
