"""The vision transformer, with a class head or as the image tower of a decoder."""

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.dot import dot
from llmjax.data.batch import Batch
from llmjax.models.config import ModelConfig
from llmjax.models.stack import Stack
from llmjax.nn.attention.config import AttentionConfig
from llmjax.nn.dropout import dropout
from llmjax.nn.embed import EmbedConfig
from llmjax.nn.mlp import PLAIN
from llmjax.nn.norm import Norm, NormConfig
from llmjax.nn.param import constant, fan_in, normal, param
from llmjax.nn.position import PositionConfig
from llmjax.parallel.rules import shard


class Tower(nnx.Module):
  """Encodes patches of images.

  Source: Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 1 to 4.
  """

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key, 3)
    vision = config.vision
    dims = config.dims | {"i": vision.patch_numbers, "t": vision.patches + vision.class_token}
    self.config = config
    param(self, keys[0], "patch_id", dims, fan_in(dims, "i"), "table")
    if vision.patch_bias:
      param(self, keys[0], "patch_bias_d", dims, constant(0.0), "bias")
    if vision.class_token:
      param(self, keys[0], "class_d", dims, normal(0.02), "table")
    param(self, keys[0], "position_td", dims, normal(0.02), "table")
    if config.embed.norm:
      self.input_norm = Norm(keys[1], dims, config.norm)
    self.encoder = Stack(keys[2], config, causal=False)

  def __call__(self, patches_bsi, key=None):
    """Encodes one image a row: x_btd, with the class token's vector first where there is one."""
    keys = [None, None] if key is None else jax.random.split(key)
    dtype = jnp.dtype(self.config.dtype)
    x_btd = dot("bsi,id->bsd", patches_bsi.astype(dtype), self.patch_id)
    if self.config.vision.patch_bias:
      x_btd += self.patch_bias_d.astype(dtype)
    if self.config.vision.class_token:
      first = jnp.broadcast_to(self.class_d.astype(dtype), (len(x_btd), 1, x_btd.shape[-1]))
      x_btd = jnp.concatenate([first, x_btd], axis=1)
    x_btd = shard(x_btd + self.position_td.astype(dtype), "btd")
    if self.config.embed.norm:
      x_btd = self.input_norm(x_btd)
    x_btd = dropout(x_btd, self.config.dropout, keys[0])
    positions_bt = jnp.broadcast_to(jnp.arange(x_btd.shape[1]), x_btd.shape[:2])
    inputs = self.encoder.layer_inputs(Batch(positions_bt=positions_bt), keys[1])
    return self.encoder(x_btd, inputs)[0]

  def features(self, patches_bsi, key=None):
    """Encodes any number of images a row: x_bsd, without class tokens."""
    patches = self.config.vision.patches
    b, s, i = patches_bsi.shape
    x_btd = self(patches_bsi.reshape(b * s // patches, patches, i), key)
    return x_btd[:, int(self.config.vision.class_token) :].reshape(b, s, -1)


class Vision(nnx.Module):
  """Classifies images by the class token (or the mean); `vocab_size` is the number of classes."""

  def __init__(self, key, config: ModelConfig):
    keys = jax.random.split(key)
    self.config = config
    self.vision = Tower(keys[0], config)
    self.head = ClassHead(keys[1], config.dims)

  def hidden(self, batch: Batch, cache: None = None, key=None):
    """Runs everything before the head: (x_btd of one position, None, None)."""
    x_btd = self.vision(batch.patches_bsi, key)
    if self.config.vision.class_token:
      return x_btd[:, :1], None, None
    return x_btd.mean(axis=1, keepdims=True), None, None

  def logits(self, x_btd):
    """Scores every class: logits_btv, fp32."""
    return self.head.logits(x_btd)


class ClassHead(nnx.Module):
  """The output head of `Vision`."""

  def __init__(self, key, dims):
    param(self, key, "head_dv", dims, fan_in(dims, "d"), "table")
    param(self, key, "head_bias_v", dims, constant(0.0), "bias")

  def logits(self, x_btd):
    return shard(dot("btd,dv->btv", x_btd, self.head_dv, jnp.float32) + self.head_bias_v, "btv")


class Projector(nnx.Module):
  """Two layers from the tower's width to the decoder's.

  Source: Liu et al. 2023, arXiv:2310.03744, sec. 3.3.
  """

  def __init__(self, key, config: ModelConfig):
    dims = {"i": config.vision.width, "f": config.width, "d": config.width}
    keys = jax.random.split(key)
    param(self, keys[0], "up_if", dims, fan_in(dims, "i"))
    param(self, keys[0], "up_bias_f", dims, constant(0.0), "bias")
    param(self, keys[1], "down_fd", dims, fan_in(dims, "f"))
    param(self, keys[1], "down_bias_d", dims, constant(0.0), "bias")

  def __call__(self, x_bsi):
    hidden_bsf = dot("bsi,if->bsf", x_bsi, self.up_if) + self.up_bias_f.astype(x_bsi.dtype)
    y_bsd = dot("bsf,fd->bsd", PLAIN["gelu"](hidden_bsf), self.down_fd)
    return y_bsd + self.down_bias_d.astype(x_bsi.dtype)


def tower_config(config: ModelConfig) -> ModelConfig:
  """The architecture of a decoder's tower; its last block has no norm after it, as in CLIP."""
  vision = config.vision
  of_tower = ("layers", "width", "heads", "mlp_width", "activation")
  of_decoder = ("dropout", "dtype", "scan", "remat", "vision")
  return ModelConfig(
    **{key: getattr(vision, key) for key in of_tower},
    **{key: getattr(config, key) for key in of_decoder}, kind="vision", mlp_bias=True,
    attention=AttentionConfig(bias="all", kernel=config.attention.kernel),
    position=PositionConfig(kind="learned"),
    norm=NormConfig(kind="layer", bias=True, eps=vision.eps, final=False),
    embed=EmbedConfig(norm=vision.input_norm),
  )


def patchify(images: jax.Array, patch: int):
  """Splits images into patches, row by row, each patch as channels × rows × columns.

  Args:
    images: [b, side, side, channels].
    patch: side of a patch, a divisor of `side`.
  Returns:
    patches_bsi, s = (side / patch)², i = channels · patch².
  """
  b, side, _, channels = images.shape
  n = side // patch
  patches = images.reshape(b, n, patch, n, patch, channels).transpose(0, 1, 3, 5, 2, 4)
  return patches.reshape(b, n * n, channels * patch * patch)
