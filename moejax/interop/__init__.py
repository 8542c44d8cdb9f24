"""Checkpoints of others: open weights in, open weights out."""
