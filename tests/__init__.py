"""Tests, one folder for each package; `tests.conftest` holds what they share."""
