"""Flax modules from which models are made; each takes its own sub-config, the plan and rngs, none takes ModelConfig."""
