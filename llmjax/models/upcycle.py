"""A run begins from another model's weights; a dense model becomes one with experts on the way.

Every expert starts as a copy of its layer's dense one. Where the chosen experts' weights sum to 1
(`renormalize`, `scale` 1) and no token is refused, the model then is the dense one, whatever the
new router says.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from llmjax.core import tree
from llmjax.core.errors import UserError
from llmjax.models.build import abstract
from llmjax.models.config import ModelConfig
from llmjax.models.model import Model


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Weights that a run begins from.

  Attributes:
    checkpoint: a workdir, checkpoint, Hugging Face folder or GGUF file; "" draws weights anew.
    drop: of a dense model's experts: share of each expert's width that is drawn anew.
  """

  checkpoint: str = ""
  drop: float = 0.0

  def __post_init__(self):
    if not 0 <= self.drop <= 1:
      raise UserError(f"init.drop {self.drop} is not in [0, 1]")
    if self.drop and not self.checkpoint:
      raise UserError(f"init.drop={self.drop} changes nothing without init.checkpoint")


def init_from(model: Model, config: ModelConfig, fresh: nnx.Module, drop: float, seed: int):
  """Fits a model's weights into an architecture.

  Args:
    model: where weights come from.
    config: the architecture; with experts where the model is dense they are made of its layers.
    fresh: weights of that architecture, which routers keep; their shardings are the result's.
    drop: share of each expert's width that is drawn anew, with the mean and deviation of what it
      replaces (Drop-Upcycling); 0 copies.
    seed: of that draw.
  Returns:
    The tree of weights.
  Raises:
    UserError: a weight that the model lacks, has in another shape, or that has no place.
  Source: Komatsuzaki et al. 2022, arXiv:2212.05055; Nakamura et al. 2025, arXiv:2502.19261, sec. 3.
  """
  theirs = {path: np.asarray(leaf) for path, leaf in tree.flatten(model.parameters).items()}
  upcycled = config.moe.experts and not model.config.moe.experts
  if upcycled:
    theirs = _with_experts(theirs, config, drop, np.random.default_rng(seed))
  elif drop:
    raise UserError("init.drop changes nothing: the weights are not a dense model's made experts")
  ours = tree.flatten(abstract(config))
  left = sorted(theirs.keys() - ours.keys())
  if left:
    raise UserError(f"init.checkpoint has weights that the model lacks: {', '.join(left[:3])}")

  def take(path, leaf):
    if path not in theirs and upcycled and "/moe/" in path:
      return leaf
    if path not in theirs or theirs[path].shape != leaf.shape:
      there = f"of shape {theirs[path].shape}" if path in theirs else "not there"
      raise UserError(f"{path!r} is {leaf.shape} here and {there} in init.checkpoint")
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, theirs[path].__getitem__)

  return tree.map_with_path(take, fresh)


def _with_experts(theirs: dict, config: ModelConfig, drop: float, rng) -> dict:
  """Renames a dense model's weights, its feed-forward layers e times over."""
  moe = config.moe
  if moe.shared:
    raise UserError("shared experts cannot be made of a dense model: set model.moe.shared to 0")
  made, dealt = {}, {}
  for path, leaf in theirs.items():
    if "/blocks/" not in path:
      made[path] = leaf
      continue
    if moe.first_k_dense:
      made[path.replace("/blocks/", "/first/")] = leaf[: moe.first_k_dense]
    rest = leaf[moe.first_k_dense :]
    name = path.rsplit("/", 1)[-1]
    if path.endswith(("mlp/gate_df", "mlp/up_df", "mlp/down_fd")):
      dealt[path.replace("mlp/", "moe/").replace("_df", "_edf").replace("_fd", "_efd")] = rest
    elif "/mlp/" in path:
      raise UserError(f"experts have no {name!r}, which the dense model has")
    else:
      made[path] = rest
  layers, width = next(leaf for path, leaf in dealt.items() if path.endswith("_efd")).shape[:2]
  anew = np.zeros((layers, moe.experts, width), bool)
  for row in anew.reshape(-1, width):
    row[rng.permutation(width)[: round(drop * width)]] = True
  return made | {path: _copies(path, leaf, anew, rng) for path, leaf in dealt.items()}


def _copies(path: str, leaf, anew, rng):
  """A dense matrix [l, …] for every expert [l, e, …], the channels in `anew` [l, e, f] redrawn."""
  copies = np.repeat(leaf[:, None], anew.shape[1], axis=1)
  for layer, expert in np.argwhere(anew.any(-1)):
    here = copies[layer, expert].T if path.endswith("_edf") else copies[layer, expert]
    old = here[anew[layer, expert]]
    here[anew[layer, expert]] = rng.normal(old.mean(), old.std(), old.shape)
  return copies
