"""Initializes a run from another model's weights; a dense model may become one with experts. Every
expert starts as a copy of the dense layer, so with `renormalize`, `scale` 1 and no dropped token
the result equals the dense model's, whatever the new router chooses."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.core.choices import check_fields
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.kinds import apply_kinds, merged
from llmjax.models.model import Model
from llmjax.nn.mlp import Dense


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Weights that a run is initialized from.

  Attributes:
    checkpoint: a workdir, checkpoint, Hugging Face folder or GGUF file; "" for random weights.
    drop: share of each upcycled expert's width that is reinitialized.
  """

  checkpoint: str = ""
  drop: float = 0.0

  def __post_init__(self):
    check_fields("init", self, drop="[0, 1]")
    if self.drop and not self.checkpoint:
      raise UserError(f"init.drop={self.drop} changes nothing without init.checkpoint")


def init_from(model: Model, config: ModelConfig, fresh: nnx.Module, drop: float, seed: int):
  """Fits a model's weights into an architecture.

  Args:
    config: the architecture; its experts are copies of a dense model's layers.
    fresh: random weights of that architecture, which routers keep; the result is sharded likewise.
    drop: share of each expert's width that is reinitialized, with the mean and deviation of what it
      replaces (Drop-Upcycling); 0 copies.
  Raises:
    UserError: a weight is missing, has another shape, or is unknown to the architecture.
  Source: Komatsuzaki et al. 2022, arXiv:2212.05055; Nakamura et al. 2025, arXiv:2502.19261, sec. 3.
  """
  adapted = config.weights != model.config.weights
  parameters = merged(model.parameters) if adapted else model.parameters
  theirs = {path: np.asarray(leaf) for path, leaf in tree.flatten(parameters).items()}
  upcycled = config.moe.used and not model.config.moe.used
  if upcycled and config.weights:
    raise UserError("model.weights cannot change experts that are made of a dense model's layers")
  plain = abstract(dataclasses.replace(config, weights=())) if adapted else abstract(config)
  ours, kept = tree.flatten(plain), set()
  if upcycled:
    theirs = _with_experts(theirs, config, drop, np.random.default_rng(seed))
    layer = f"{config.kind}/blocks/{config.moe.name}/"
    kept = {path for path in ours if path.startswith(layer)} - theirs.keys()
  elif drop:
    raise UserError("init.drop changes nothing: the weights are not a dense model's made experts")
  unknown = sorted(theirs.keys() - ours.keys())
  if unknown:
    raise UserError(f"init.checkpoint has weights that the model lacks: {', '.join(unknown[:3])}")

  for path, leaf in ours.items():
    if path not in kept and (path not in theirs or theirs[path].shape != leaf.shape):
      there = f"of shape {theirs[path].shape}" if path in theirs else "not there"
      raise UserError(f"{path!r} is {leaf.shape} here and {there} in init.checkpoint")
  if adapted:
    change = jax.jit(apply_kinds, static_argnums=1)
    changed = change(tree.unflatten(plain, theirs), config.weights, jax.random.key(seed))
    theirs = {path: np.asarray(leaf) for path, leaf in tree.flatten(changed).items()}

  def take(path, leaf):
    if path in kept:
      return leaf
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, theirs[path].__getitem__)

  return tree.map_with_path(take, fresh)


def _with_experts(theirs: dict, config: ModelConfig, drop: float, rng) -> dict:
  """A dense model's weights under the paths of one with experts, each a copy of the dense layer."""
  moe, stack = config.moe, config.kind
  if moe.shared:
    raise UserError("shared experts cannot be made of a dense model: set model.moe.shared to 0")
  prefix, dense, chosen_lef = f"{stack}/blocks/", f"{Dense.name}/", None
  layers = {path: leaf for path, leaf in theirs.items() if path.startswith(prefix)}
  fitted = {path: leaf for path, leaf in theirs.items() if path not in layers}
  for group, start, end, kind in config.groups(config.layers):
    for path, leaf in layers.items():
      path, leaf = path.removeprefix(prefix), leaf[start:end]
      if kind is moe and path.startswith(dense):
        name, letters = path.removeprefix(dense).rsplit("_", 1)
        if len(letters) == 1:
          raise UserError(f"experts have no {name + '_' + letters!r}, which the dense model has")
        path = f"{moe.name}/{name}_e{letters}"
        leaf = np.repeat(leaf[:, None], moe.experts, axis=1)
        channels_lefd = np.moveaxis(leaf, 2 + letters.index("f"), 2)
        if chosen_lef is None:
          chosen_lef = _choose(channels_lefd.shape[:3], drop, rng)
        _reinitialize(channels_lefd, chosen_lef, rng)
      fitted[f"{stack}/{group}/{path}"] = leaf
  return fitted


def _choose(shape, drop: float, rng):
  chosen_lef = np.zeros(shape, bool)
  for chosen_f in chosen_lef.reshape(-1, shape[-1]):
    chosen_f[rng.permutation(shape[-1])[: round(drop * shape[-1])]] = True
  return chosen_lef


def _reinitialize(channels_lefd, chosen_lef, rng):
  for layer, expert in np.argwhere(chosen_lef.any(-1)):
    channels_fd, chosen_f = channels_lefd[layer, expert], chosen_lef[layer, expert]
    old = channels_fd[chosen_f]
    channels_fd[chosen_f] = rng.normal(old.mean(), old.std(), old.shape)
