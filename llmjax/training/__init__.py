"""Training: state, loss, optimizer, step, checkpoints, metrics, and the loop that calls them."""
