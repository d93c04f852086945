"""`python -m llmjax` is `llmjax`."""

import sys

from llmjax.cli import main

sys.exit(main())
