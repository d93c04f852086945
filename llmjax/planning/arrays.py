"""Arrays of one micro-batch on one device: what a layer makes, what is kept of it, what is alive.

From the shapes of what the model's code names and its products read; `memory` adds them to weights
and their kin. Tables of positions and copies that only change a layout are left out.
"""

import math

from llmjax.core.chips import Chip
from llmjax.nn.dropout import NAMES
from llmjax.nn.mlp import GATED
from llmjax.planning.traffic import DTYPE_BYTES
from llmjax.training.config import Config

_KEPT = {
  "full": ("stream",),
  "dots": (
    "stream", "query", "key", "value", "projected", "gate", "up", "expanded", "latents",
  ),
  "save_projections": ("stream", *NAMES),
}
_HEADS = ("query", "key", "value", "expanded", "attention")
_MORE = ("turned", "projected", "dispatched", "latents")
_HIDDEN = tuple(f"{kind}{name}" for kind in ("", "expert_") for name in ("gate", "up", "hidden"))
_LANES = 128  # a TPU's arrays are padded to so many numbers in their last dimension


def dispatched_bytes(config: Config, sizes: dict[str, int]) -> tuple[float, float, float]:
  """Counts the rows of one layer's experts on a device, of one micro-batch.

  Returns:
    Bytes of (rows where tokens are, room for them where experts are, one array of the room's rows
    as wide as an expert).
  """
  arrays, moe = Arrays(config, sizes, None), config.model.moe
  there, room = arrays.rooms()
  wide = (moe.width or config.model.mlp_width) / config.model.width / sizes["tensor"]
  return there, room, room * wide


class Arrays:
  """Arrays of one micro-batch on one device, in bytes.

  `stream` is the residual stream as it lies between layers, `whole` as products read it: over
  `tensor` the first has its positions cut.
  """

  def __init__(self, config: Config, sizes: dict[str, int], chip: Chip | None):
    model, tensor = config.model, sizes["tensor"]
    self.config, self.sizes = config, sizes
    ways = sizes["data"] * sizes["fsdp"] * sizes["expert"] * config.train.grad_accum_steps
    self.rows = config.data.batch_size / ways
    self.length = model.max_seq_len / sizes["context"]
    self.number = DTYPE_BYTES[model.dtype]
    self.lanes = 1 if chip is None or not chip.sizes else _LANES
    self.whole = self.of(model.width)
    self.stream = self.whole / tensor
    self.short = chip is None and model.max_seq_len <= 1024

  def of(self, width: float, tensor: int = 1, number: float = 0) -> float:
    """An array of so many numbers a token."""
    return self.rows * self.length * width * (number or self.number) / tensor

  def layer_arrays(self, moe: bool) -> dict[str, float]:
    """What a layer's forward pass makes and its backward pass could read, by name."""
    model = self.config.model
    gates = ("gate", "up", "hidden") if model.activation in GATED else ("up", "hidden")
    norms = {"parallel_shared": 1}.get(model.block, 4 if model.norm.place == "sandwich" else 2)
    made = {"stream": self.stream, "normed": min(norms, 2) * self.whole}
    if model.block == "sequential":
      made["projected"] = self.whole  # each device's part of a sum over `tensor`
    made["norms"] = norms * 3 * self.stream * 4 / self.number  # in fp32
    made |= self._attention()
    made["norms"] += 3 * made.get("latents", 0) * 4 / self.number
    if moe:
      there, sent = self.rooms()
      made["dispatched"] = sent + there  # rows in, and what became of them
      width = (model.moe.width or model.mlp_width) / model.width / self.sizes["tensor"]
      made |= dict.fromkeys((f"expert_{name}" for name in gates), sent * width)
    wide = model.moe.shared * (model.moe.width or model.mlp_width) if moe else model.mlp_width
    made |= dict.fromkeys(gates, self.of(wide, self.sizes["tensor"]))
    return made if "gate" in made else made | {"slope": 2 * made["up"]}

  def _attention(self) -> dict[str, float]:
    model, tensor = self.config.model, self.sizes["tensor"]
    latent = model.attention.latent
    n, k, h = (model.dims[letter] for letter in "nkh")
    pad = lambda width: math.ceil(width / self.lanes) * self.lanes  # noqa: E731
    query, key = (self.of(heads * pad(h), tensor) for heads in (n, k))
    made = {"query": query, "key": key, "value": key, "attention": query}
    if latent.kv_rank:  # `key` is what a cache would hold; every head's are made of it
      made["key"], made["value"] = self.of(latent.kv_rank + latent.rope_dim), 0.0
      made["attention"] = self.of(n * latent.value_dim, tensor)
      made["expanded"] = self.of(n * latent.nope_dim, tensor) + made["attention"]
      made["latents"], made["joined"] = self.of(latent.query_rank), key
    if self.lanes > 1:
      made["attention"] = query  # a kernel's values are as wide as its keys
      made["turned"] = query  # attention's result once by heads for its kernel, once by positions
    if self.short:
      made["scores"] = self.of(n * self.length, tensor, 4 + self.number)
    return made

  def rooms(self) -> tuple[float, float]:
    """Bytes of rows for experts (where tokens are, room for them where experts are)."""
    moe, t, ways = self.config.model.moe, self.config.model.max_seq_len, self.sizes["expert"]
    most = min(1, moe.slots(t) / t or 1)  # of all tokens that one expert takes
    there = self.whole * min(moe.top_k, moe.experts * most)
    if ways == 1:
      return there, there
    return there, ways * self.whole * min(moe.top_k, moe.experts // ways * most)

  def kept(self, moe: bool) -> tuple[float, float]:
    """What one layer keeps for the backward pass: (on the device, on the host)."""
    made, remat = self.layer_arrays(moe), self.config.model.remat
    total = lambda names: sum(made.get(name, 0) for name in names)  # noqa: E731
    if remat == "offload":
      return made["stream"], total(NAMES)
    if remat == "none":
      return total(made.keys() - {"stream", "projected"}), 0.0
    return total(_KEPT.get(remat, ("stream", *remat.split("+")))), 0.0

  def layer(self, moe: bool) -> float:
    """What is alive inside one layer's backward pass beside what is kept."""
    made = self.layer_arrays(moe)
    total = lambda names: sum(made.get(name, 0) for name in names)  # noqa: E731
    apart = self._context(made)
    if self.config.model.remat == "none":
      return apart + max(total(_HEADS), total(_HIDDEN)) + 3 * self.stream
    return apart + total((*_HEADS, *_HIDDEN, *_MORE)) + self.stream

  def _context(self, made: dict[str, float]) -> float:
    """What attention takes more where positions are cut: gradients in fp32, and what it gathers.

    Of a ring those of queries, keys and values, summed and just made. Of gathered keys their
    gradients, and a strip's scores and weights with theirs.
    """
    model, ways = self.config.model, self.sizes["context"]
    pair = (made["key"] + made["value"]) / self.number  # numbers
    if ways == 1 or model.attention.context_parallel == "all_to_all":
      return 0.0
    if model.attention.context_parallel == "ring":
      return 2 * 4 * (pair + made["query"] / self.number)
    heads = self.rows * model.heads / self.sizes["tensor"]
    strip = heads * min(model.attention.block, self.length) * model.max_seq_len
    return ways * pair * (self.number + 4) + 4 * 4 * strip

  def head(self) -> float:
    """What is alive while logits are: the gathered head, a chunk of them twice, the stream."""
    model, tensor = self.config.model, self.sizes["tensor"]
    chunk = min(self.config.loss.chunk or self.length, self.length)
    logits = self.rows * chunk * model.vocab_size * 4 / tensor
    table = model.width * model.vocab_size / tensor
    return table * (self.number + 4) + 2 * logits + 3 * self.whole
