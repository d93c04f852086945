"""DeepSeek-V3 on 1,024 chips of v5p: 4 rows of 4,096 tokens a chip.

  llmjax plan --config=experiments/deepseek_v3.py --topology=v5p:8x8x16
  llmjax train --config=experiments/deepseek_v3.py --workdir=runs/deepseek \\
    --config.data.sources=FOLDER --config.model.vocab_size=0

`plan` and `check` need no file. A run wants `tokenizer.json` of
huggingface.co/deepseek-ai/DeepSeek-V3 where `tokenizer.path` says; it has fewer tokens than the
model's 129,280 ids, a number rounded up, so that a run leaves `model.vocab_size` to it. Rates,
balance and the 14.8 T tokens are those of DeepSeek-AI 2024, arXiv:2412.19437, sec. 4.2; their rate
stayed at its peak longer, and their batch was 3,072 to 15,360 rows. The layer that predicts one
token further is not in the model.

The compiler's estimate: 59 of 95 GiB, 51 s a step of which 13 wait for links, 18 % MFU, 3,608
dollars a billion tokens at the list price: its rooms for rows that come are eight times what comes
on average, and all of them are read and written.
"""

from llmjax.core.config import defaults, editable
from llmjax.formats.presets import preset
from llmjax.training.config import Config


def get_config():
  """Returns the config of 1,024 chips with 95 GiB each."""
  config = defaults(Config)
  config.tokenizer.kind = "bpe"
  config.tokenizer.path = "tokenizers/deepseek/tokenizer.json"
  config.model = editable(preset("DeepSeek-V3"))
  config.model.max_seq_len = 4096
  config.data.batch_size = 4096
  config.train.steps = 14_800_000_000_000 // (4096 * 4096)

  # Experts cut eight ways: 9 GB of state a chip. Cut more ways there is less to gather, but room
  # for a chip that all tokens choose is then more than there is, unless a capacity bounds it.
  config.mesh.data = 1
  config.mesh.fsdp = 128
  config.mesh.expert = 8
  config.model.remat = "full"
  config.train.grad_accum_steps = 2  # all four rows at once want 102 GiB, says the compiler

  config.loss.moe_aux = 0.0
  config.loss.sequence_balance = 1e-4
  config.optim.bias_rate = 1e-3
  config.optim.learning_rate = 2.2e-4
  config.optim.warmup = 2000
  config.train.grad_reduce_dtype = "bfloat16"  # as MaxText sums; half as much on the links
  config.train.vmem_mib = 48  # slower to compile, half a percent faster
  config.loss.chunk = 512  # its gradient of the head is added up fewer times
  return config
