"""The alphabet: one letter a dimension, in the names of arrays and weights (`up_df`), in einsums
and in sharding rules. Partition specs, adapters and moments read a weight's letters off its
path."""

from llmjax.core.errors import UserError

LETTERS = {
  "b": "batch",
  "t": "query positions",
  "s": "key positions",
  "d": "residual width",
  "n": "query heads",
  "k": "key/value heads",
  "g": "query heads per key/value head",
  "h": "head width",
  "f": "feed-forward width",
  "i": "rows of a small table, or input features (pixels of a patch)",
  "v": "vocabulary",
  "e": "experts",
  "j": "experts of a token",
  "c": "expert capacity",
  "l": "layers",
  "r": "low rank of latent attention",
  "p": "cache page",
  "a": "rank of an adapter",
  "q": "queries of a key/value head (g · t)",
  "u": "positions before inputs and targets are separated (t + 1)",
}


def letters_of(path: str, ndim: int) -> str:
  """Reads the letters of the array at a tree path: `blocks/mlp/up_df` of rank 3 is `ldf`.

  Args:
    path: tree path, parts joined by `/`; the last part ends in `_letters`.
    ndim: rank of the array; a stacked one has a leading `l` that its name leaves out.
  Returns:
    One letter a dimension; the empty string for a scalar.
  Raises:
    UserError: the name carries no letters, or not as many as the array has dimensions.
  """
  if ndim == 0:
    return ""
  suffix = path.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
  unknown = set(suffix) - LETTERS.keys()
  if unknown or len(suffix) not in (ndim, ndim - 1):
    raise UserError(
      f"array {path!r} of rank {ndim} is not named by its letters: {suffix!r} should be {ndim} "
      f"(or, stacked over layers, {ndim - 1}) of {''.join(LETTERS)}"
    )
  return suffix if len(suffix) == ndim else "l" + suffix
