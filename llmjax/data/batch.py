"""`Batch`: the one struct that training, evaluation and every later task hand to the model."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of packed documents.

  Attributes:
    tokens_bt: int32 input ids.
    targets_bt: int32 ids to predict at each position.
    loss_mask_bt: float32, 1 where the prediction counts.
    segments_bt: int32, which document of the row a position belongs to; 0 is padding.
    positions_bt: int32, place within the segment, from 0.
  """

  tokens_bt: jax.Array
  targets_bt: jax.Array
  loss_mask_bt: jax.Array
  segments_bt: jax.Array
  positions_bt: jax.Array
