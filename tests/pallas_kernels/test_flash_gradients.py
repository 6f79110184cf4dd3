"""flash_attention_gradients: gradients over parts of the keys add up to those of the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, flash_attention_gradients

IMPLEMENTATIONS: list[dict[str, Any]] = [
    {"implementation": "reference"},
    {"implementation": "xla"},
    {"implementation": "pallas_tpu", "interpret": True},
]
T, SPLIT = 24, 12  # parts of one length: one compiled program


def arrays(dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (2, T, 4, 16), (2, T, 2, 16), (2, T, 2, 24), (2, T, 4, 24)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def whole(q: Any, k: Any, v: Any, d_out: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Output, log-sum-exp and gradients of the definition over all keys."""

    @jax.jit
    def results(*operands: Any) -> Any:
        def attend(*operands: Any) -> tuple[Any, Any]:
            return flash_attention(*operands, return_lse=True, implementation="reference", **options)

        (out, lse), pull = jax.vjp(attend, *operands)
        return out, lse, pull((d_out, jnp.zeros_like(lse)))

    return results(q, k, v)


@pytest.mark.parametrize("how", IMPLEMENTATIONS, ids=lambda how: how["implementation"])
@pytest.mark.parametrize(("window", "segmented"), [(None, False), (7, True)])
def test_gradients_over_two_parts_of_the_keys_add_up(how: dict[str, Any], window: int | None, segmented: bool) -> None:
    q, k, v, d_out = arrays()
    ids = jnp.asarray(np.repeat([[0, 1, 2], [3, 3, 4]], 8, axis=1), jnp.int32) if segmented else None
    out, lse, expected = whole(q, k, v, d_out, window=window, segment_ids=ids, scale=-0.3)
    delta = (d_out * out).sum(-1)

    @jax.jit
    def part(k: Any, v: Any, ids_of_keys: Any, offset: Any) -> Any:
        pair = None if ids is None else (ids, ids_of_keys)
        return flash_attention_gradients(
            q, k, v, d_out, lse, delta, window=window, segment_ids=pair, query_offset=offset, scale=-0.3, **how
        )

    old, new = slice(0, SPLIT), slice(SPLIT, T)
    dq_old, *older = part(k[:, old], v[:, old], None if ids is None else ids[:, old], 0)
    dq_new, *newer = part(k[:, new], v[:, new], None if ids is None else ids[:, new], -SPLIT)
    found = (dq_old + dq_new, *(jnp.concatenate(pair, 1) for pair in zip(older, newer, strict=True)))
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()) * 4)


def test_a_log_sum_exp_of_the_part_alone_gives_other_gradients() -> None:
    q, k, v, d_out = arrays()
    out, _, (_, dk, _) = whole(q, k, v, d_out)
    k, v = k[:, :SPLIT], v[:, :SPLIT]

    @jax.jit
    def by_own_sum() -> Any:
        _, own = flash_attention(q, k, v, return_lse=True, implementation="reference")
        return flash_attention_gradients(q, k, v, d_out, own, (d_out * out).sum(-1), implementation="reference")

    assert np.abs(by_own_sum()[1] - dk[:, :SPLIT]).max() > 0.1


def test_no_keys_add_nothing_in_the_dtype_of_the_operands() -> None:
    q, k, v, d_out = arrays(jnp.bfloat16)
    rows = jnp.zeros(q.shape[:3])
    found = flash_attention_gradients(q, k[:, :0], v[:, :0], d_out, rows, rows)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k[:, :0], v[:, :0])]
    assert not found[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": jnp.zeros((2, T, 4, 16))}, r"d_out has shape \(2, 24, 4, 16\): expected \(2, 24, 4, 24\)"),
        ({"d_out": jnp.zeros((2, T, 4, 24), jnp.bfloat16)}, "d_out is bfloat16, q is float32"),
        ({"implementation": "cudnn"}, "implementation='cudnn': expected one of auto, reference, xla"),
        ({"window": 0}, "window=0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    q, k, v, d_out = arrays()
    rows = jnp.zeros(q.shape[:3])
    given = {"q": q, "k": k, "v": v, "d_out": d_out, "lse": rows, "delta": rows, **change}
    call: Any = getattr(flash_attention_gradients, "__wrapped__", flash_attention_gradients)
    with pytest.raises(ValueError, match=message):
        call(**given)
