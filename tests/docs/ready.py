"""The folder in which pages' commands run: what they refer to by name, small and made up.

A finished run (`runs/quickstart`), a stand-in for a published model (`smollm2.gguf`, `smollm2/`),
some of the project's own folders, and the programs that are called.
"""

import os
import subprocess
import sys
from pathlib import Path

from tokenizers import pre_tokenizers

from tests.gguf_files import CONFIG, draw, llama_metadata, llama_tensors, write
from tests.runs import write_text

TEMPLATE = (
  "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Of programs that install, start or show something, the names alone.
_IDLE = ("make", "pip", "tensorboard", "git")


def prepare(folder: Path, root: Path) -> Path:
  """Fills a folder and returns it.

  Args:
    folder: where commands are to run.
    root: the project's folder.
  """
  for name in ("experiments", "docs", "llmjax", "README.md"):
    (folder / name).symlink_to(root / name)
  (folder / ".venv" / "bin").mkdir(parents=True)
  (folder / ".venv" / "bin" / "activate").touch()
  (folder / "bin").mkdir()
  _program(folder / "bin" / "llmjax", 'exec python -m tests.docs.shrunk "$@"')
  _program(folder / "bin" / "python", f'exec {sys.executable} "$@"')
  for name in _IDLE:
    _program(folder / "bin" / name, "exit 0")
  write_text(folder / "FOLDER")
  _write_gguf(folder / "smollm2.gguf")
  environment = os.environ | {"PYTHONPATH": str(root)}
  for command in (
    ["train", "--config=experiments/quickstart.py", "--workdir=runs/quickstart"],
    ["convert", "--from=smollm2.gguf", "--to=smollm2"],
  ):
    command = [sys.executable, "-m", "tests.docs.shrunk", *command]
    subprocess.run(command, cwd=folder, env=environment, check=True)
  return folder


def _program(path: Path, line: str):
  path.write_text(f"#!/bin/bash\n{line}\n")
  path.chmod(0o755)


def _write_gguf(path: Path):
  """Writes a tiny random Llama with a byte-level vocabulary and a chat template."""
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
  config = CONFIG | {"vocab_size": len(tokens), "max_position_embeddings": 256}
  vocabulary = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": tokens,
    "token_type": [3 if token in special else 1 for token in tokens],
    "merges": ["t h"],
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  metadata = {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items()}
  metadata |= llama_metadata(config) | {"tokenizer.chat_template": TEMPLATE}
  write(path, "llama", metadata, llama_tensors(draw(config), config))
