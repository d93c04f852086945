"""Where text comes from: folders, files, and the running interpreter's standard library.

A source spec is a comma-separated list. `stdlib` is the source and documentation text of Python's
own library: real text that is on every machine. Documents come in a fixed order (source, path), and
a stable hash of their path decides which are held out.
"""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmjax.core.errors import UserError

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_SKIPPED = {"__pycache__"}
_STDLIB_SKIPPED = _SKIPPED | {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_LARGEST_HELD_OUT_SHARE = 1 / 20


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from.

  Attributes:
    source: the entry of the source spec that it belongs to.
    path: its place within the source, parts joined by `/`.
    text: its content, decoded from UTF-8, line ends as they are on disk.
  """

  source: str
  path: str
  text: str

  @property
  def size_bytes(self) -> int:
    """Length of the text in UTF-8."""
    return len(self.text.encode())


def read_sources(spec: str) -> list[Document]:
  """Reads every document of a source spec, empty files left out.

  Args:
    spec: comma-separated `stdlib`, files, and folders, which are walked; hidden names and
      `__pycache__` are skipped.
  Returns:
    Documents ordered by source, then path.
  Raises:
    UserError: a folder or file is missing, holds no text, or is not UTF-8 text.
  """
  entries = [entry.strip() for entry in spec.split(",") if entry.strip()]
  if not entries:
    raise UserError("data.sources is empty; name a folder, a file or 'stdlib'")
  documents = []
  for entry in entries:
    found = [document for document in _read_entry(entry) if document.text]
    if not found:
      raise UserError(f"source {entry!r} holds no text: there is no non-empty file in it")
    documents += found
  return documents


def _read_entry(entry: str) -> Iterator[Document]:
  if entry == "stdlib":
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in _files_below(root, _STDLIB_SKIPPED) if p.suffix in _STDLIB_SUFFIXES]
  else:
    root = Path(entry).expanduser()
    if not root.exists():
      raise UserError(f"source {entry!r} does not exist; name a folder, a file or 'stdlib'")
    paths = _files_below(root, _SKIPPED) if root.is_dir() else [root]
  for path in paths:
    name = path.relative_to(root).as_posix() if path != root else root.name
    try:
      yield Document(entry, name, _read_text(path))
    except UserError:
      if entry != "stdlib":  # a few of its encodings' own sample files are not UTF-8
        raise


def _files_below(root: Path, skipped: set) -> list[Path]:
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    found += [Path(folder, name) for name in files if not name.startswith(".")]
  return sorted(found)


def _read_text(path: Path) -> str:
  data = path.read_bytes()
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{str(path)!r} is not text: byte {error.start} is not UTF-8") from error
  if "\0" in text:
    raise UserError(f"{str(path)!r} is not text: byte {data.index(0)} is NUL")
  return text


def path_hash(document: Document) -> float:
  """Maps a document's source-relative path to [0, 1), the same on every machine."""
  digest = hashlib.sha256(document.path.encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
  """Divides documents into training and held-out ones.

  A document is held out when the hash of its path falls below `share`, unless it alone is more than
  a twentieth of all text: the measurement would be of that one file. Where that leaves a side
  empty (a handful of files), the last `share` of each document is held out, cut at a line end.

  Args:
    share: about how much to hold out, in (0, 1).
  Returns:
    (training, held-out) documents, both non-empty.
  Raises:
    UserError: there is too little text to hold anything out.
  """
  most_bytes = _LARGEST_HELD_OUT_SHARE * sum(document.size_bytes for document in documents)
  chosen = [path_hash(doc) < share and doc.size_bytes <= most_bytes for doc in documents]
  if any(chosen) and not all(chosen):
    both = list(zip(documents, chosen, strict=True))
    return [doc for doc, out in both if not out], [doc for doc, out in both if out]
  pairs = [_cut(document, share) for document in documents]
  train = [head for head, _ in pairs if head.text]
  held_out = [tail for _, tail in pairs if tail.text]
  if not train or not held_out:
    total = sum(len(document.text) for document in documents)
    raise UserError(f"{total} characters of text are too few to hold a part out")
  return train, held_out


def _cut(document: Document, share: float) -> tuple[Document, Document]:
  at = int(len(document.text) * (1 - share))
  line_end = document.text.find("\n", at) + 1
  at = line_end if 0 < line_end < len(document.text) else at
  head, tail = document.text[:at], document.text[at:]
  return dataclasses.replace(document, text=head), dataclasses.replace(document, text=tail)
