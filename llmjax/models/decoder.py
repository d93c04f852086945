"""The decoder: one function for training, scoring, prefill and decoding."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.models.block import Block
from llmjax.models.config import ModelConfig
from llmjax.models.stack import run_layers
from llmjax.nn.cache import KVCache
from llmjax.nn.embed import Embed
from llmjax.nn.mask import cache_mask, causal_mask
from llmjax.nn.norm import RmsNorm
from llmjax.nn.position import rope_angles


class Decoder(nnx.Module):
  """A causal language model.

  Args:
    key: PRNG key of the whole model.
    config: the architecture, `vocab_size` filled in.
  """

  def __init__(self, key, config: ModelConfig):
    embed_key, blocks_key, norm_key = jax.random.split(key, 3)
    self.config = config
    self.embed = Embed(embed_key, config.dims, config.tie_embeddings)
    self.blocks = nnx.data(
      jax.vmap(lambda key: Block(key, config))(jax.random.split(blocks_key, config.layers))
    )
    self.norm = RmsNorm(norm_key, config.dims, config.norm_eps)

  def __call__(self, tokens_bt, segments_bt=None, positions_bt=None, cache: KVCache | None = None):
    """Scores the next token at every position.

    Args:
      tokens_bt: int32 ids.
      segments_bt: int32 documents of a packed row, 0 for padding; one document by default.
      positions_bt: int32 places within the document; 0, 1, 2 … by default.
      cache: keys and values so far, stacked over layers; new ones go to slot `positions_bt`.
    Returns:
      (logits_btv in fp32, the cache with these positions in it or None).
    """
    config = self.config
    if positions_bt is None:
      positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    if segments_bt is None:
      segments_bt = jnp.ones_like(tokens_bt)
    if cache is None:
      mask_bts = causal_mask(segments_bt, positions_bt)
    else:
      mask_bts = cache_mask(positions_bt, cache.key_bskh.shape[2])
    x_btd, cache = run_layers(
      self.blocks,
      self.embed(tokens_bt, jnp.dtype(config.dtype)),
      cache,
      scan=config.scan,
      remat=config.remat,
      rope=rope_angles(positions_bt, config.dims["h"], config.rope_theta),
      mask_bts=mask_bts,
      positions_bt=positions_bt,
    )
    return self.embed.logits(self.norm(x_btd)), cache

  def empty_cache(self, batch: int, length: int) -> KVCache:
    """Makes a cache of `length` slots for `batch` rows, in the compute dtype."""
    dims = self.config.dims
    shape = (dims["l"], batch, length, dims["k"], dims["h"])
    zeros = jnp.zeros(shape, jnp.dtype(self.config.dtype))
    return KVCache(zeros, zeros)


def abstract(config: ModelConfig) -> Decoder:
  """Builds the model's tree of shapes without making an array, whatever its size."""
  return jax.eval_shape(lambda: Decoder(jax.random.key(0), config))


def count_parameters(config: ModelConfig) -> int:
  """Counts the weights of a config, from their declarations."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))
