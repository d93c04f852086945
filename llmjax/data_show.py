"""`data_show`: the documents of a training step's rows and which of their tokens the loss counts,
without a model. The batch is made by the functions that the training loop's loader calls."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmjax.core import config as configs
from llmjax.core import files
from llmjax.core.errors import UserError
from llmjax.data.loader import make_tokenizer, read_rows, read_split
from llmjax.data.pack import PackedRows
from llmjax.data.prepare import prepare, store_key
from llmjax.data.tasks import Task
from llmjax.run import check_workdir
from llmjax.serve.detokenize import Detokenizer
from llmjax.text.tokenizer import Tokenizer, from_state
from llmjax.training.config import Config
from llmjax.training.runnable import check_config
from llmjax.training.stored import check_text, newest_meta

_SHOWN = 4  # rows, unless the caller says which
_BEFORE = 16  # tokens before a piece of a document that decide how its first ones read
_CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


def data_show(
  config, workdir: str | Path = "", step: int = 1, rows: Sequence[int] | None = None
) -> dict:
  """Shows the rows of a training step: whose text they are, and what of it is predicted.

  Writes nothing. The tokenizer is that of the workdir's newest checkpoint; where there is none, it
  is trained as the run would train it.

  Args:
    config: the experiment, frozen (`Config`) or as `get_config()` returns it.
    workdir: folder of the run; "": a run that is to begin.
    step: as in `metrics.jsonl`, from 1.
    rows: rows of the batch, from 0; by default the first four.
  Returns:
    `step`, `steps`, `seed`, `data_key`, `task`, `batch_size` and `rows`. Each row has its `row`,
    its `number` in the run, `epoch`, `tokens` that are not `padding`, how many are `predicted`,
    `batch` (the arrays of `Batch` by name) and `documents`, one for each segment: `source` and
    `path` of its file, `index` among the training documents, its `positions` in the row, its
    `tokens` in the document and the document's `length`, each as [first, after the last];
    `pieces`, the text as [text, whether it is predicted], and `read`, what the model reads of it,
    where that is another text.
  Raises:
    UserError: no such workdir, step or row, or the workdir is of another config or text.
  """
  config = configs.frozen(config, Config)
  meta = None
  if workdir:
    files.check_exists("workdir", workdir, "folder")
    meta = newest_meta(Path(workdir))
  if meta:
    check_workdir(config, meta, Path(workdir))
  config = check_config(config)
  if not 1 <= step <= config.train.steps:
    raise UserError(f"step {step} is not one of the run's, 1 to {config.train.steps}")
  size = config.data.batch_size
  rows = range(min(_SHOWN, size)) if rows is None else rows
  if wrong := [row for row in rows if not 0 <= row < size]:
    raise UserError(f"row {wrong[0]} is not one of the batch's, 0 to {size - 1} (data.batch_size)")
  documents, _ = read_split(config.data)
  stored = meta and meta["tokenizer"]
  tokenizer = from_state(stored) if stored else make_tokenizer(config.tokenizer, documents)
  store = _store(config, workdir, documents, tokenizer)
  if meta:
    check_text(meta, store.key)
  task = config.task_of(tokenizer)
  packed = PackedRows(store, config.model.max_seq_len, config.seed)
  numbers = [(step - 1) * size + row for row in rows]
  shown = [
    {"row": row, **_row(packed, task, number, config.seed, documents, store, tokenizer)}
    for row, number in zip(rows, numbers, strict=True)
  ]
  return {
    "step": step, "steps": config.train.steps, "seed": config.seed, "data_key": store.key,
    "task": task.config.name, "batch_size": size, "rows": shown,
  }


def _store(config: Config, workdir, documents, tokenizer: Tokenizer):
  """The run's tokenized text, from its cache if it is there, else in memory."""
  cache = config.data.cache or (Path(workdir, "data") if workdir else "")
  found = cache and Path(cache, store_key(documents, tokenizer)).is_dir()
  return prepare(documents, tokenizer, cache if found else "")


def _row(packed: PackedRows, task: Task, number: int, seed, documents, store, tokenizer) -> dict:
  batch = read_rows(packed, task, [number], seed)
  arrays = {name: a[0] for name, a in vars(batch).items() if a is not None}
  pieces, segments_u = packed.pieces(number), packed[number][1]
  names = _names(task, tokenizer)
  shown = []
  for segment, (start, stop) in enumerate(task.segment_ranges(segments_u), 1):
    which = int(segments_u[start])
    document, first, _ = pieces[which - 1]
    begin = first + start - int(np.flatnonzero(segments_u == which)[0])
    at = np.flatnonzero(arrays["segments_bt"] == segment)
    before = store[document][max(0, begin - _BEFORE) : begin]
    shown.append({
      "source": documents[document].source, "path": documents[document].path, "index": document,
      "positions": [int(at[0]), int(at[-1]) + 1], "tokens": [begin, begin + stop - start],
      "length": int(store.lengths[document]),
      **_texts(arrays, segment, at, before, tokenizer, names, task.config.name),
    })
  padding = int((arrays["segments_bt"] == 0).sum())
  return {
    "number": number, "epoch": number // packed.rows_per_epoch,
    "tokens": arrays["segments_bt"].size - padding, "padding": padding,
    "predicted": int(arrays["loss_mask_bt"].sum()), "documents": shown,
    "batch": {name: array.tolist() for name, array in arrays.items()},
  }


def _texts(arrays: dict, segment: int, at, before, tokenizer, names: dict, task: str) -> dict:
  """What is predicted of a segment at positions `at`, and what is read where it is not the same."""
  tokens, targets, counts = (arrays[n][at] for n in ("tokens_bt", "targets_bt", "loss_mask_bt"))
  text = lambda ids, flags: _pieces(ids, flags, before, tokenizer, names)  # noqa: E731
  if task in ("masked_lm", "span_corruption"):
    read = tokens
    if "source_bs" in arrays:
      read = arrays["source_bs"][arrays["source_segments_bs"] == segment]
    return {"pieces": text(targets, counts), "read": text(read, np.zeros(len(read)))[0][0]}
  # Position i predicts the token of position i + 1; of a row's last one only the target is there.
  ids, flags = [*tokens, targets[-1]], [0, *counts]
  return {"pieces": text(ids, flags) if counts[-1] else text(ids[:-1], flags[:-1])}


def _names(task: Task, tokenizer: Tokenizer) -> dict[int, str]:
  """Spellings of the ids that stand for no text."""
  marks = {mark: f"<extra_id_{n}>" for n, mark in enumerate(task.marks)}
  if task.config.name == "masked_lm":
    marks = dict.fromkeys(task.marks, "[MASK]")
  return marks | tokenizer.special_names


def _pieces(ids, flags, before, tokenizer: Tokenizer, names: dict) -> list[tuple[str, bool]]:
  """Decodes ids as runs of equal flags; a character of several runs is in the last of them."""
  reader = Detokenizer(tokenizer, before)
  texts = []
  for i in map(int, ids):
    reader.add([i])
    texts.append(reader.piece() + names.get(i, ""))
  reader.finish()
  texts.append(reader.piece())
  flags = [bool(flag > 0) for flag in flags]
  pairs = zip(texts, [*flags, flags[-1]], strict=True)
  return [
    ("".join(text for text, _ in run), flag)
    for flag, run in itertools.groupby(pairs, key=lambda pair: pair[1])
  ]


def parse_rows(text: str) -> list[int] | None:
  """Reads row numbers such as `0-3,7`; None of an empty text.

  Raises:
    UserError: it is something else.
  """
  if not text:
    return None
  if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text, re.ASCII):
    raise UserError(f"--rows={text} is not a list of rows such as 0-3,7")
  ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
  if wrong := next((one for one in ranges if one[-1] < one[0]), None):
    raise UserError(f"--rows={text}: {wrong[0]}-{wrong[1]} holds no row")
  return [row for one in ranges for row in range(one[0], one[-1] + 1)]


def show_rows(result: dict) -> str:
  """Writes what `data_show` returns as lines for a terminal."""
  rows = result["rows"]
  lines = [
    f"step {result['step']} of {result['steps']}: {len(rows)} of {result['batch_size']} rows, "
    f"task {result['task']}, seed {result['seed']}; ⟦text⟧ is not predicted"
  ]
  for row in rows:
    lines += [
      "",
      f"row {row['row']} (number {row['number']} of the run, epoch {row['epoch']}): "
      f"{row['tokens']} tokens, {row['predicted']} predicted, {row['padding']} padding",
    ]
    for one in row["documents"]:
      (first, after), (begin, end) = one["positions"], one["tokens"]
      lines.append(
        f"  positions {first}–{after - 1}: tokens {begin}–{end - 1} of {one['length']} of "
        f"{one['path']} in {one['source']}, document {one['index']}"
      )
      if "read" in one:
        lines += ["    read:", *_indented(one["read"]), "    predicted:"]
      lines += _indented("".join(t if predicted else f"⟦{t}⟧" for t, predicted in one["pieces"]))
  # A terminal would obey control characters of a text or of a file's name.
  return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", "\n".join(lines))


def _indented(text: str) -> list[str]:
  return [f"    │ {line}" for line in text.split("\n")]
