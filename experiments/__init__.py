"""Things to run: `python -m experiments.NAME --model M --mesh G --out DIR`; each reads top to bottom."""
