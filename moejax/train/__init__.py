"""Training: state, loss, optimizer, step, loop and checkpoints; knows no command line."""
