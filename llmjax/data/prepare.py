"""Tokenized text on disk: one ArrayRecord a corpus, one record a document.

A store's folder is named by a hash of its content and renamed into place when it is complete, so
the same text is never tokenized twice."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llmjax.core.lock import identity, is_alive
from llmjax.data.sources import Document
from llmjax.text.tokenizer import Tokenizer, fingerprint, frame

_FORMAT = 1
_CHUNK = 256  # documents encoded as one batch
_DTYPE = np.dtype("<u4")
_OWNER = "owner.json"  # who is writing


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """Tokenized documents, each `BOS … EOS` (EOS for BOS where there is none), in any order.

  Attributes:
    key: hash of the texts and the tokenizer.
    lengths: int64, tokens of each document, BOS and EOS counted.
    size_bytes: UTF-8 bytes of all documents together.
    records: random access to the documents' raw records.
  """

  key: str
  lengths: np.ndarray
  size_bytes: int
  records: Sequence[bytes]

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> np.ndarray:
    """Reads document `index` as int32 ids."""
    return np.frombuffer(self.records[int(index)], _DTYPE).astype(np.int32)


def store_key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
  """Hashes what a store holds: 16 hex digits."""
  digest = hashlib.sha256(f"{_FORMAT} {fingerprint(tokenizer)}".encode())
  for document in documents:
    digest.update(f"\0{document.source}\0{document.path}\0".encode())
    digest.update(hashlib.sha256(document.text.encode()).digest())
  return digest.hexdigest()[:16]


def composition_of(name: str, documents: Sequence[Document], store: TokenStore) -> list[dict]:
  """Counts what a text is made of: all of it, then each of its sources if there are several.

  Args:
    name: which text it is, such as training.
    store: of the documents.
  Returns:
    Rows of `text` (the name), `source`, `documents` and `tokens`; of all of it also `bytes`.
  """
  whole = {"text": name, "source": "all", "documents": len(store)}
  rows = {}
  for document, tokens in zip(documents, store.lengths.tolist(), strict=True):
    row = {"text": name, "source": document.source, "documents": 0, "tokens": 0}
    row = rows.setdefault(document.source, row)
    row["documents"] += 1
    row["tokens"] += tokens
  parts = list(rows.values()) if len(rows) > 1 else []
  return [whole | {"tokens": int(store.lengths.sum()), "bytes": store.size_bytes}, *parts]


def prepare(
  documents: Sequence[Document], tokenizer: Tokenizer, cache: str | Path = ""
) -> TokenStore:
  """Tokenizes documents, numbered in this order, into `cache/<key>/`, or finds them there.

  Without a cache they stay in memory.
  """
  key = store_key(documents, tokenizer)
  if not cache:
    rows = list(_encoded(documents, tokenizer))
    lengths = np.asarray([len(row) // _DTYPE.itemsize for row in rows], np.int64)
    return TokenStore(key, lengths, _size_bytes(documents), rows)
  folder = Path(cache, key)
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent)
    _make(documents, tokenizer, folder)
  meta = json.loads((folder / "meta.json").read_text())
  return TokenStore(
    key=key,
    lengths=np.load(folder / "lengths.npy"),
    size_bytes=meta["size_bytes"],
    records=grain.sources.ArrayRecordDataSource(str(folder / "tokens.array_record")),
  )


def _remove_stale(cache: Path):
  """Removes what killed processes of this machine left; those of another may still be at work."""
  for owner in cache.glob(f".*-*/{_OWNER}"):
    with contextlib.suppress(OSError, ValueError):
      if is_alive(json.loads(owner.read_text())) is False:
        shutil.rmtree(owner.parent, ignore_errors=True)


def _make(documents: Sequence[Document], tokenizer: Tokenizer, folder: Path):
  partial = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
  partial.mkdir()  # `tempfile` would make a folder that nobody else may read
  try:
    (partial / _OWNER).write_text(json.dumps(identity()))
    _write(documents, tokenizer, partial)
    (partial / _OWNER).unlink()
    os.rename(partial, folder)
  except OSError:
    if not folder.is_dir():  # else: another process finished the same store first
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[bytes]:
  """Each document's record: the bytes of its ids."""
  before, after = frame(tokenizer)
  for start in range(0, len(documents), _CHUNK):
    texts = [document.text for document in documents[start : start + _CHUNK]]
    for ids in tokenizer.encode_batch(texts):
      yield np.asarray([before, *ids, after], _DTYPE).tobytes()


def _size_bytes(documents: Sequence[Document]) -> int:
  return sum(document.size_bytes for document in documents)


def _write(documents: Sequence[Document], tokenizer: Tokenizer, folder: Path):
  writer = ArrayRecordWriter(str(folder / "tokens.array_record"), "group_size:1")
  lengths = []
  for row in _encoded(documents, tokenizer):
    lengths.append(len(row) // _DTYPE.itemsize)
    writer.write(row)
  writer.close()
  np.save(folder / "lengths.npy", np.asarray(lengths, np.int64))
  size_bytes = _size_bytes(documents)
  meta = {"documents": len(lengths), "size_bytes": size_bytes, "tokens": int(sum(lengths))}
  (folder / "meta.json").write_text(json.dumps(meta))
