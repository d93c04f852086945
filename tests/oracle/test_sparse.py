"""transformers' config classes judge what we take keys to mean that a `config.json` does not have.

With LLMJAX_WRITE_GOLDEN=1 `tests/golden/defaults.json` is written; else it must be what they say.
"""

import copy
import dataclasses
import json
import os
import random

import pytest

from llmjax.formats.hf import folder as hf
from llmjax.formats.hf.family import HARMLESS, REFUSED
from llmjax.formats.hf.vision import CLIP
from tests import golden
from tests.formats.test_hf import older
from tests.formats.test_hf_sparse import DEFAULTS, outcome, thinned

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers", reason="make test-oracle installs transformers")
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING


def whole(theirs: dict) -> dict:
  """What transformers makes of a config, every key said."""
  config = CONFIG_MAPPING[theirs["model_type"]](**copy.deepcopy(theirs))
  return json.loads(config.to_json_string(use_diff=False))


def told_of(theirs: dict) -> dict:
  """The keys that are read, in sections as well."""
  return {
    key: told_of(value) if key in ("text_config", "vision_config") else value
    for key, value in theirs.items()
    if key not in HARMLESS or key in ("model_type", "id2label")
  }


def test_the_golden_defaults_are_those_of_the_classes():
  said = {name: told_of(whole({"model_type": name})) for name in hf.FAMILIES}
  if os.environ.get("LLMJAX_WRITE_GOLDEN"):
    lines = [f" {json.dumps(name)}: {json.dumps(each)}" for name, each in said.items()]
    (golden.FOLDER / "defaults.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
  assert said == DEFAULTS


@pytest.mark.parametrize("name", [*hf.FAMILIES, CLIP.name])
def test_every_key_of_a_class_is_known(name):
  family = hf.FAMILIES.get(name, CLIP)
  config_class = CONFIG_MAPPING[name]
  known = HARMLESS.union(REFUSED, family.keys, *(codec.keys for codec in family.codecs))
  known |= {key.other for key in family.keys.values()}
  keys = {field.name for field in dataclasses.fields(config_class)}
  assert keys | set(config_class.attribute_map) | set(whole({"model_type": name})) <= known


@pytest.mark.parametrize("case", golden.CASES)
def test_a_sparse_config_means_what_transformers_takes_it_to_mean(case):
  full = json.loads((golden.FOLDER / case / "config.json").read_text())
  rng, compared = random.Random(case), 0
  for _ in range(30):
    sparse = thinned(rng.choice([full, older(full)]), rng)
    try:
      want = outcome(whole(sparse))
    except (StrictDataclassError, ValueError, KeyError, TypeError, ZeroDivisionError):
      continue  # transformers does not take it
    found = outcome(sparse)
    assert found == want or (isinstance(found, str) and isinstance(want, str)), sparse
    compared += not isinstance(found, str)
  assert compared >= 5
