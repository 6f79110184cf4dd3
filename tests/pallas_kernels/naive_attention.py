"""Attention as a textbook would loop it, in numpy float64: the judge of every implementation, sharing no code."""

from __future__ import annotations

import numpy as np


def attend_one(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: list[int], scale: float
) -> tuple[np.ndarray, float]:
    """One query [H] over the keys [S, H] that it sees; zeros and -inf where it sees none."""
    if not seen:
        return np.zeros(values.shape[-1]), -np.inf
    scores = keys[seen].astype(np.float64) @ q.astype(np.float64) * scale
    top = scores.max()
    weights = np.exp(scores - top)
    return weights @ values[seen].astype(np.float64) / weights.sum(), top + np.log(weights.sum())


def seen_from(position: int, n_keys: int, window: int | None) -> list[int]:
    """Key positions that a query at `position` sees: `0 <= position - j < window`."""
    reach = range(n_keys) if window is None else range(max(position - window + 1, 0), n_keys)
    return [j for j in reach if j <= position]


def naive_flash(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    window: int | None = None,
    segments: tuple[np.ndarray, np.ndarray] | None = None,
    offset: int = 0,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, T, N, Hv] and log-sum-exp [B, T, N] of whole sequences q [B, T, N, H] over k [B, S, K, H]."""
    (B, T, N, H), S, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
    for b, t, n in np.ndindex(B, T, N):
        seen = seen_from(offset + t, S, window)
        if segments is not None:
            seen = [j for j in seen if segments[1][b, j] == segments[0][b, t]]
        keys, values = k[b, :, n // group], v[b, :, n // group]
        out[b, t, n], lse[b, t, n] = attend_one(q[b, t, n], keys, values, seen, scale or H**-0.5)
    return out, lse


def naive_paged(
    q: np.ndarray,
    sequences: list[tuple[np.ndarray, np.ndarray]],
    counts: list[int],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Packed queries [T, N, H], the last `counts[b]` positions of each sequence of keys and values [S, K, H]."""
    T, N, H = q.shape
    out, lse = np.zeros((T, N, sequences[0][1].shape[-1])), np.full((T, N), -np.inf)
    row = 0
    for (keys, values), count in zip(sequences, counts, strict=True):
        for position in range(len(keys) - count, len(keys)):
            for n in range(N):
                head = n // (N // keys.shape[1])
                seen = seen_from(position, len(keys), window)
                out[row, n], lse[row, n] = attend_one(q[row, n], keys[:, head], values[:, head], seen, scale or H**-0.5)
            row += 1
    return out, lse
