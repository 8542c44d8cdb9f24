"""Mixture-of-experts language models in JAX: every router, every mesh, and a slow twin for every fast path."""
