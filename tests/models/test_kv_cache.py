import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.models.kv_cache import KVBlock, KVCache


def empty(capacity, lengths=(0, 0)):
    keys = jnp.zeros((1, len(lengths), 1, capacity, 1))
    return KVCache(keys, keys, jnp.array(lengths), jnp.array(0))


def block(values, batch=2):
    """The same numbers for every sequence; values are the negated keys."""
    keys = jnp.broadcast_to(jnp.asarray(values, float)[:, None], (1, batch, 1, len(values), 1))
    return KVBlock(keys, -keys)


def contents(cache, row):
    """Keys that a sequence sees, the oldest first; checks that values go with them."""
    keys, values, valid = (
        np.roll(np.ravel(slots), -int(cache.end))
        for slots in (cache.keys[0, row], cache.values[0, row], cache.valid[row])
    )
    np.testing.assert_array_equal(values[valid], -keys[valid])
    return keys[valid].tolist()


def test_a_sequence_sees_what_it_has_stored_since_it_began():
    cache = empty(6, lengths=(0, -2)).append(block([1, 2])).append(block([3, 4]))
    assert contents(cache, 0) == [1, 2, 3, 4]
    assert contents(cache, 1) == [3, 4]
    assert cache.length.tolist() == [4, 2]


def test_the_oldest_block_is_overwritten():
    cache, append = empty(6, lengths=(0, -6)), jax.jit(KVCache.append)
    for n in range(5):
        cache = append(cache, block([2 * n, 2 * n + 1]))
    assert contents(cache, 0) == [4, 5, 6, 7, 8, 9]
    assert contents(cache, 1) == [6, 7, 8, 9]
    assert cache.length.tolist() == [10, 4]


@pytest.mark.parametrize("before", [0, 1, 2, 4])
def test_a_sequence_may_take_the_place_of_another(before):
    """Wherever the ring stands when it comes."""
    cache, other = empty(6), empty(6, lengths=(0,)).begin(block([1, 2, 3, 4, 0, 0], batch=1), jnp.array([4]))
    assert contents(other, 0) == [1, 2, 3, 4]
    for n in range(before):
        cache = cache.append(block([20 + n, 30 + n]))
    alone = contents(cache, 0)
    cache = cache.select(jnp.array([False, True]), other)
    assert contents(cache, 0) == alone
    assert contents(cache, 1) == [1, 2, 3, 4]
    cache = cache.append(block([5, 6])).append(block([7, 8]))
    assert contents(cache, 0) == [*alone, 5, 6, 7, 8][-6:]
    assert contents(cache, 1) == [3, 4, 5, 6, 7, 8]


def test_queries_further_on_see_no_more_than_s_tokens_before_their_block():
    cache = empty(6, lengths=(0, -4))
    for n in range(3):
        cache = cache.append(block([2 * n + 1, 2 * n + 2]))
    keys, visible = cache.keys[0, :, 0, :, 0], cache.visible(np.array([0, 2, 4, 6]))
    seen = [[np.sort(keys[row][each]).tolist() for each in visible[row]] for row in (0, 1)]
    assert seen[0] == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6], [5, 6], []]
    assert seen[1] == [[5, 6], [5, 6], [5, 6], []]


def test_no_capacity_keeps_nothing():
    cache = empty(0).append(block([1, 2]))
    assert cache.valid.shape == (2, 0)
    assert cache.length.tolist() == [2, 2]


def test_a_block_that_would_wrap_around_is_refused():
    with pytest.raises(ValueError, match="4 must divide the cache's capacity 6"):
        empty(6).append(block([1, 2, 3, 4]))
