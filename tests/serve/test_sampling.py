"""The draw has the distribution that the logits and the cuts say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.serve.sampling import Sampling, filter_logits, sample

LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))


def counts(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    """Draw many rows of the same logits."""
    key = jax.random.key_data(jax.random.key(0))
    rows = jnp.arange(draws, dtype=jnp.uint32)
    drawn = sample(jnp.broadcast_to(LOGITS, (draws, 4)), sampling, key, rows)
    return np.bincount(np.asarray(drawn), minlength=4) / draws


def test_draws_follow_the_probabilities() -> None:
    # Three standard deviations of a frequency over 20,000 draws are at most 0.011.
    np.testing.assert_allclose(counts(Sampling()), [0.5, 0.25, 0.15, 0.1], atol=0.011)


def test_temperature_sharpens() -> None:
    p = np.asarray([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(counts(Sampling(temperature=0.5)), p / p.sum(), atol=0.011)


def test_temperature_zero_is_the_largest_logit() -> None:
    assert counts(Sampling(temperature=0.0)).tolist() == [1, 0, 0, 0]


def test_top_k_keeps_k_and_renormalises() -> None:
    np.testing.assert_allclose(counts(Sampling(top_k=2)), [2 / 3, 1 / 3, 0, 0], atol=0.011)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    assert int(jnp.isfinite(filter_logits(LOGITS, 0, top_p)).sum()) == kept


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)
