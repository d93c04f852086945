"""From raw text to batches: sources → prepare (tokenize, store) → pack → tasks → loader."""
