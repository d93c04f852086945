"""Who may look at whom, decided one pair of positions at a time."""


def sees(
  query,
  key,
  *,
  causal=False,
  window=0,
  sparse_block=0,
  sparse_local=1,
  sparse_global=0,
  sparse_stride=0,
):
  """Whether a query at one position of a document sees the key at another; both are numbers."""
  if causal and key > query:
    return False
  if window and abs(query - key) >= window:
    return False
  if not sparse_block:
    return True
  mine, other = query // sparse_block, key // sparse_block
  if mine < sparse_global or other < sparse_global:
    return True
  near = range(mine - sparse_local + 1, mine + sparse_local)
  return other in near or (sparse_stride > 0 and (mine - other) % sparse_stride == 0)


def keys_of(q_positions_bt, k_positions_bs, rule, q_segments=None, k_segments=None, prefix=None):
  """Lists, by row and query, the numbers of the keys it sees; `rule` holds keywords of `sees`."""
  table = []
  for row, queries in enumerate(q_positions_bt):
    table.append([])
    for t, query in enumerate(queries):
      seen = []
      for s, key in enumerate(k_positions_bs[row]):
        if q_segments is not None and q_segments[row][t] != k_segments[row][s]:
          continue
        if sees(int(query), int(key), **rule) or (prefix is not None and prefix[row][s]):
          seen.append(s)
      table[row].append(seen)
  return table
