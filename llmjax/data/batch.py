"""`Batch`: the one struct that training, evaluation and every later task hand to the model."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of packed documents. What a task does not need is None.

  Attributes:
    tokens_bt: int32 input ids.
    targets_bt: int32 ids to predict at each position.
    loss_mask_bt: float32, 1 where the prediction counts.
    segments_bt: int32, which document of the row a position belongs to; 0 is padding. None: one.
    positions_bt: int32, position within the segment, from 0. None: 0, 1, 2 …
    prefix_bt: bool, tokens that their whole document sees (prefix-LM).
    types_bt: int32 token types (BERT's first and second text).
    source_bs: int32 ids that an encoder reads; a decoder's segment n looks at the source's n.
    source_segments_bs: int32 documents of the source; 0 is padding. None: one.
    source_positions_bs: int32 position within the source's segment. None: 0, 1, 2 …
    patches_bsi: float32 images as patches, one image after another, in the order of the row's
      image tokens; of a vision model, one image a row.
  """

  tokens_bt: jax.Array | None = None
  targets_bt: jax.Array | None = None
  loss_mask_bt: jax.Array | None = None
  segments_bt: jax.Array | None = None
  positions_bt: jax.Array | None = None
  prefix_bt: jax.Array | None = None
  types_bt: jax.Array | None = None
  source_bs: jax.Array | None = None
  source_segments_bs: jax.Array | None = None
  source_positions_bs: jax.Array | None = None
  patches_bsi: jax.Array | None = None
