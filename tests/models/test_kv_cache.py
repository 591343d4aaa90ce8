import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.models.kv_cache import KVBlock, KVCache


def empty(capacity, batch=2):
    return KVCache(jnp.zeros((1, batch, 1, capacity, 1)), jnp.zeros((1, batch, 1, capacity, 1)), jnp.zeros(batch, int))


def block(values):
    """The same numbers for every sequence; values are the negated keys."""
    keys = jnp.broadcast_to(jnp.asarray(values, float)[:, None], (1, 2, 1, len(values), 1))
    return KVBlock(keys, -keys)


def contents(cache, row):
    """Stored keys in the order of the slots; checks that values go with them."""
    keys = np.asarray(cache.keys[0, row, 0, :, 0])[np.asarray(cache.valid[row])]
    np.testing.assert_array_equal(np.asarray(cache.values[0, row, 0, :, 0])[np.asarray(cache.valid[row])], -keys)
    return keys.tolist()


def test_every_sequence_has_a_place_of_its_own():
    cache = empty(6).append(block([1, 2]))
    cache = dataclasses.replace(cache, length=jnp.array([2, 0])).append(block([3, 4]))
    assert contents(cache, 0) == [1, 2, 3, 4]
    assert contents(cache, 1) == [3, 4]
    assert cache.length.tolist() == [4, 2]


def test_the_oldest_block_is_overwritten():
    cache, append = dataclasses.replace(empty(6), length=jnp.array([0, 2])), jax.jit(KVCache.append)
    for n in range(5):
        cache = append(cache, block([2 * n, 2 * n + 1]))
    assert contents(cache, 0) == [6, 7, 8, 9, 4, 5]
    assert contents(cache, 1) == [4, 5, 6, 7, 8, 9]
    assert cache.length.tolist() == [10, 12]


def test_no_capacity_keeps_nothing():
    cache = empty(0).append(block([1, 2]))
    assert cache.valid.shape == (2, 0)
    assert cache.length.tolist() == [2, 2]


def test_a_block_that_would_wrap_around_is_refused():
    with pytest.raises(ValueError, match="4 must divide the cache's capacity 6"):
        empty(6).append(block([1, 2, 3, 4]))
