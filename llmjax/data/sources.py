"""Where text comes from: folders, files, and the running interpreter's standard library.

`stdlib` is real text that is on every machine: the source and documentation of Python's library.
Documents have a fixed order; a stable hash of their text decides which are held out."""

import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llmjax.core.errors import UserError
from llmjax.data.text_files import NotText, read_texts
from llmjax.parallel.multihost import say

_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_SKIPPED = {"__pycache__"}
_STDLIB_SKIPPED = _SKIPPED | {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_LARGEST_HELD_OUT_SHARE = 1 / 20


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from.

  Attributes:
    source: the entry of the source spec that it belongs to.
    path: relative to the source, with `/`; of a record, with its line.
    text: its content, decoded from UTF-8, line ends as they are on disk.
  """

  source: str
  path: str
  text: str

  @property
  def size_bytes(self) -> int:
    """Length of the text in UTF-8."""
    return len(self.text.encode())


def read_sources(
  spec: str, text_field: str = "text", not_text: str = "skip"
) -> list[Document]:
  """Reads every document of a source spec, empty ones left out.

  A file that is named twice, by two entries or by links, is read once, and that is said.

  Args:
    spec: comma-separated `stdlib`, files, and folders, which are walked, links followed; hidden
      names and `__pycache__` are skipped.
    text_field: the field of a JSON Lines record that is its text.
    not_text: what becomes of files in a folder that are not UTF-8 text: `skip` leaves them out and
      names them in a note, `refuse` raises.
  Returns:
    Documents ordered by source, then path. The path of a record ends in its line, `a.jsonl:3`.
  Raises:
    UserError: something named or found cannot be read, is neither folder nor file, is a link back
      to a folder that it is in, or is not UTF-8 text; a record is not JSON or lacks its text; or a
      source holds no text.
  """
  entries = [entry.strip() for entry in spec.split(",") if entry.strip()]
  if not entries:
    raise UserError("data.sources is empty; name a folder, a file or 'stdlib'")
  documents, again, skipped, seen = [], [], [], set()
  for entry in entries:
    read, repeated, unread = _read_entry(entry, text_field, not_text == "skip", seen)
    if not read and not repeated:
      why = f"what is in it is not text: {_list(unread)}" if unread else "no file in it has any"
      raise UserError(f"source {entry!r} holds no text: {why}")
    documents, again, skipped = documents + read, again + repeated, skipped + unread
  if again:
    say(f"llmjax: warning: {len(again)} files named again are read once, the first {again[0]}")
  if skipped:
    say(
      f"llmjax: note: files that are not text are skipped (data.not_text=refuse refuses them): "
      f"{_list(skipped)}"
    )
  return documents


def _read_entry(entry: str, text_field: str, skip: bool, seen: set) -> tuple[list, list, list]:
  """Reads the files of one entry that are not in `seen`: (documents, those that are, not text)."""
  documents, again, skipped = [], [], []
  named = entry != "stdlib" and os.path.isfile(os.path.expanduser(entry))
  for path, name, identity in _files_of(entry):
    if identity in seen:
      again.append(f"{name!r} of source {entry!r}")
      continue
    seen.add(identity)
    try:
      texts = read_texts(path, text_field)
    except UserError as error:
      if entry == "stdlib":  # a few of its encodings' own sample files are not UTF-8
        continue
      if named or not skip or not isinstance(error, NotText):
        raise
      skipped.append(f"{name!r} ({error.reason})")
      continue
    documents += [Document(entry, name + place, text) for place, text in texts if text]
  return documents, again, skipped


def _list(names: list[str]) -> str:
  """The first of many names, and how many more there are."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def _files_of(entry: str) -> Iterator[tuple[Path, str, tuple]]:
  """The files of one entry, in order: (path, name relative to the entry, identity)."""
  stdlib = entry == "stdlib"
  root = Path(sysconfig.get_paths()["stdlib"] if stdlib else os.path.expanduser(entry))
  if not os.path.lexists(root):
    raise UserError(f"source {entry!r} does not exist; name a folder, a file or 'stdlib'")
  for path, identity in _files(root, _STDLIB_SKIPPED if stdlib else _SKIPPED, not stdlib):
    if not stdlib or path.suffix in _STDLIB_SUFFIXES:
      yield path, path.relative_to(root).as_posix() if path != root else root.name, identity


def _files(path: Path, skipped: set, strict: bool, above=()) -> Iterator[tuple[Path, tuple]]:
  """Yields the files at or below a path in order, with their (device, inode); one that cannot be
  read is an error if `strict`, else left out."""
  try:
    identity, names = _stat(path, above)
  except UserError:
    if strict:
      raise
    return
  if names is None:
    yield path, identity
  for name in names or ():
    if name not in skipped and not name.startswith("."):
      yield from _files(path / name, skipped, strict, (*above, identity))


def _stat(path: Path, above) -> tuple[tuple, list[str] | None]:
  """(device, inode) of a path, links followed, and the names in it; None where it is a file."""
  shown = repr(str(path))  # surrogates, which stand for what is not UTF-8, are escaped in it
  try:
    str(path).encode()
    found = path.stat()
    names = sorted(os.listdir(path)) if stat.S_ISDIR(found.st_mode) else None
  except UnicodeEncodeError as error:
    raise UserError(f"the file name {shown} is not UTF-8: rename it") from error
  except OSError as error:
    to = f" (it is a link to {os.readlink(path)!r})" if path.is_symlink() else ""
    raise UserError(f"{shown} cannot be read: {error.strerror}{to}") from error
  if names is None and not stat.S_ISREG(found.st_mode):
    kind = "a FIFO" if stat.S_ISFIFO(found.st_mode) else "a socket or device"
    raise UserError(f"{shown} is {kind}, neither a folder nor a file")
  identity = found.st_dev, found.st_ino
  if identity in above:
    raise UserError(f"{shown} is a link to {os.path.realpath(path)!r}, a folder that it is in")
  return identity, names


def text_hash(text: str) -> float:
  """Maps a text to [0, 1), the same on every machine."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
  """Divides documents into training and held-out ones.

  A document is held out when the hash of its text falls below `share`, unless it is, with its exact
  copies, more than a twentieth of all text: the measurement would be of that one text. Where that
  leaves a side empty (a handful of files), the last `share` of each document is held out, cut at a
  line end. Copies of a text are kept (to repeat a text is a way to weigh it) and divided alike.

  Args:
    share: about how much to hold out, in (0, 1).
  Returns:
    (training, held-out) documents, both non-empty.
  Raises:
    UserError: there is too little text to hold anything out.
  """
  sizes_bytes = Counter()
  for document in documents:
    sizes_bytes[document.text] += document.size_bytes
  copies = len(documents) - len(sizes_bytes)
  if copies:
    say(
      f"llmjax: note: {copies} of {len(documents)} documents repeat another's text; they are kept, "
      "and copies are never divided between training and held-out text"
    )
  most_bytes = _LARGEST_HELD_OUT_SHARE * sizes_bytes.total()
  chosen = {
    text for text, size in sizes_bytes.items() if text_hash(text) < share and size <= most_bytes
  }
  if chosen and len(chosen) < len(sizes_bytes):
    return (
      [document for document in documents if document.text not in chosen],
      [document for document in documents if document.text in chosen],
    )
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
