"""`llmjax data show`: the batch that the loop's loader yields, told back as documents and text."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax.cli import main
from llmjax.data.loader import make_store, make_tokenizer, read_split
from llmjax.data_show import parse_rows
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.text.tokenizer import frame, train_tokenizer
from llmjax.training import loop
from llmjax.training.runnable import with_vocab
from tests.runs import tiny, write_text
from tests.test_cli import fails

pytestmark = pytest.mark.usefixtures("quick_module")
WHOLE = range(8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


def _train(config, workdir, tokenizer, monkeypatch) -> dict:
  """Runs the loop with a step that only counts; returns the batch that it got in each step."""
  seen = {}

  def step(state, batch):
    state = dataclasses.replace(state, step=state.step + 1)
    seen[int(state.step)] = batch
    return state, {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0, "tokens": 1.0}

  monkeypatch.setattr(loop, "make_step", lambda config, mesh: step)
  documents, _ = read_split(config.data)
  store = make_store(config.data, documents, tokenizer, workdir)
  loop.fit(with_vocab(config, tokenizer), workdir, tokenizer, store, make_mesh(MeshConfig()))
  return seen


def _same(result, batch):
  for row in result["rows"]:
    arrays = {name: a for name, a in vars(batch).items() if a is not None}
    assert row["batch"].keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(row["batch"][name], np.asarray(array)[row["row"]], name)


def test_a_step_shows_what_the_loop_trains_on_also_resumed(text, tmp_path, monkeypatch):
  # The run's tokenizer is another than the config would train here: the checkpoint's counts.
  config = tiny(text, steps=4)
  backwards = [document.text[::-1] for document in read_split(config.data)[0]]
  other = train_tokenizer(config.tokenizer, backwards)
  seen = _train(config, tmp_path, other, monkeypatch)
  longer = tiny(text, steps=7)
  resumed = _train(longer, tmp_path, other, monkeypatch)
  assert (list(seen), list(resumed)) == ([1, 2, 3, 4], [5, 6, 7])
  files = sorted(path for path in tmp_path.rglob("*"))
  for step, batch in (seen | resumed).items():
    _same(llmjax.data_show(longer, tmp_path, step, WHOLE), batch)
  assert sorted(path for path in tmp_path.rglob("*")) == files, "nothing is written"
  fresh = llmjax.data_show(longer, step=1)
  assert fresh["data_key"] != llmjax.data_show(longer, tmp_path, 1)["data_key"]
  (text / "more.txt").write_text("ka lo " * 300)
  with pytest.raises(llmjax.UserError, match="text or tokenizer changed since this run began"):
    llmjax.data_show(longer, tmp_path, 1)
  (text / "more.txt").unlink()
  with pytest.raises(llmjax.UserError, match=r"another config: seed \(0 there, 3 here\)"):
    llmjax.data_show(dataclasses.replace(longer, seed=3), tmp_path, 1)


def _filled(source, target, marks) -> list[int]:
  """The tokens that span_corruption has hidden, put back in place of its marks."""
  spans = {}
  for i in target:
    spans.setdefault(i, []) if i in marks else spans[list(spans)[-1]].append(i)
  return [j for i in source for j in (spans[i] if i in marks else [i])]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
  """Text of which several documents stand in a row."""
  return write_text(tmp_path_factory.mktemp("short"), files=60, words=20)


@pytest.mark.parametrize("task", ["language_model", "prefix_lm", "masked_lm", "span_corruption"])
def test_every_document_is_where_it_is_said_to_be(short, task):
  kinds = {"masked_lm": "encoder", "span_corruption": "encoder_decoder"}
  config = tiny(short, model__kind=kinds.get(task, "decoder"), model__max_seq_len=64)
  attention = config.model.attention
  if task == "prefix_lm":
    attention = dataclasses.replace(attention, mask="prefix")
    config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, attention=attention)
    )
  documents, _ = read_split(config.data)
  tokenizer = make_tokenizer(config.tokenizer, documents)
  marks = config.task_of(tokenizer).marks
  before, after = frame(tokenizer)
  rows = llmjax.data_show(config, step=2, rows=WHOLE)["rows"]
  assert max(len(row["documents"]) for row in rows) > 1
  for row in rows:
    arrays = {name: np.array(array) for name, array in row["batch"].items()}
    assert row["tokens"] + row["padding"] == arrays["segments_bt"].size
    assert row["predicted"] == arrays["loss_mask_bt"].sum()
    for segment, one in enumerate(row["documents"], 1):
      document = documents[one["index"]]
      assert (one["source"], one["path"]) == (document.source, document.path)
      assert document.text == Path(one["source"], one["path"]).read_text()
      ids = [before, *tokenizer.encode(document.text), after]
      assert one["length"] == len(ids)
      at = np.arange(*one["positions"])
      assert set(arrays["segments_bt"][at]) == {segment}
      tokens, targets, counts = (
        arrays[name][at].tolist() for name in ("tokens_bt", "targets_bt", "loss_mask_bt")
      )
      if task == "masked_lm":
        tokens = targets
      elif task == "span_corruption":
        source = arrays["source_bs"][arrays["source_segments_bs"] == segment].tolist()
        tokens = _filled(source, targets, marks)
      assert ids[slice(*one["tokens"])] == tokens
      whole = "".join(text for text, _ in one["pieces"])
      predicted = "".join(text for text, yes in one["pieces"] if yes)
      if task == "masked_lm":
        assert (predicted != "") == any(counts)
      elif task == "span_corruption":
        assert predicted == whole and one["read"].count("<extra_id_") == len(
          [i for i in source if i in marks]
        )
      else:  # what is not predicted stands first: the first token, or the prefix
        assert not one["pieces"][0][1] and whole.endswith(predicted)
        count = int(sum(counts))
        stop = one["tokens"][1] + (counts[-1] > 0)
        said = predicted.replace(tokenizer.special_names[after], "")
        assert said == tokenizer.decode(ids[: int(stop)])[-len(said) :] if said else count <= 1
        assert whole.replace("<s>", "").replace("</s>", "") in document.text


def test_characters_that_a_terminal_obeys_are_spelled_out(tmp_path, capsys):
  (tmp_path / "text").mkdir()
  for n in range(30):
    (tmp_path / "text" / f"{n}.txt").write_text(f"a\x1b[31mred {n} " * 9)
  (tmp_path / "config.py").write_text(
    "from pathlib import Path\nfrom tests.runs import tiny_values\n"
    f"get_config = lambda: tiny_values(Path({str(tmp_path / 'text')!r}), 4)\n"
  )
  more = [f"--config={tmp_path / 'config.py'}", "--config.tokenizer.kind=bytes"]
  more += ["--config.tokenizer.vocab_size=0"]
  assert main(["data", "show", *more, "--rows=1,3-4", "--json"]) == 0
  out = capsys.readouterr().out
  *lines, last = out.splitlines()
  assert "\x1b" not in out and any("\\x1b[31mred" in line for line in lines)
  assert [row["row"] for row in json.loads(last)["rows"]] == [1, 3, 4]
  assert [line.split()[1] for line in lines if line.startswith("row ")] == ["1", "3", "4"]
  more = ["data", "show", *more]
  for wrong, message in {
    "--step=5": "step 5 is not one of the run's, 1 to 4",
    "--step=0": "step 0 is not one of",
    "--step=x": "argument --step: invalid int value: 'x'",
    "--rows=8": "row 8 is not one of the batch's, 0 to 7 (data.batch_size)",
    "--rows=3-1": "--rows=3-1: 3-1 holds no row",
    "--rows=a": "--rows=a is not a list of rows such as 0-3,7",
    f"--workdir={tmp_path}/none": "none' does not exist",
    "--workdir=": "--workdir is empty",
  }.items():
    assert message in fails(capsys, *more, wrong)
  assert "data 'clean' is unknown" in fails(capsys, "data", "clean", *more[2:])


def test_row_numbers_are_read():
  assert parse_rows("0-3,7") == [0, 1, 2, 3, 7] and parse_rows("") is None
