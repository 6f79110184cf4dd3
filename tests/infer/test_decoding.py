"""The device's own account of which sequences are over, apart from any model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from infer.decoding import DecodeState, Ends, _take
from infer.sampling import SamplingParams, batch_arrays, batch_mode, start_history


def test_a_sequence_ends_on_the_device_at_its_stop_token_and_at_its_limit() -> None:
    """Of four sequences that all choose token 3: one goes on, one stops there, one reaches its limit, one had ended."""
    params = [SamplingParams(frequency_penalty=1.0)] * 4
    mode = batch_mode(params)
    state = DecodeState(
        tokens=jnp.zeros(4, jnp.int32),
        lengths=jnp.full(4, 9, jnp.int32),
        produced=jnp.full(4, 2, jnp.int32),
        active=jnp.array([True, True, True, False]),
        history=start_history([[0]] * 4, 5, mode),
    )
    ends = Ends(jnp.array([[-1, 4], [3, -1], [-1, -1], [-1, -1]], jnp.int32), jnp.array([5, 5, 3, 5], jnp.int32))
    logits = jnp.zeros((4, 5)).at[:, 3].set(2.0)
    after, choice = _take(logits, state, ends, batch_arrays(params), mode)
    assert choice.tokens.tolist() == after.tokens.tolist() == [3, 3, 3, 3]
    assert after.active.tolist() == [True, False, False, False]
    assert after.produced.tolist() == [3, 3, 3, 2]
    np.testing.assert_array_equal(after.history.counts[:, 3], [1, 1, 1, 0])
    assert after.lengths.tolist() == [9] * 4
