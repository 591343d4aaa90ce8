"""Many samples through few slots: stops, redraws and refills, on a model that says what the test wants."""

import itertools
import resource

import jax
import numpy as np
import pytest

from bd3_jax.errors import UserError
from bd3_jax.sampling import drawing, step_program, stopping
from bd3_jax.sampling.drawing import Slots, draw
from bd3_jax.sampling.sampler import Sampler, sequence_keys
from bd3_jax.sampling.statistics import entropy
from tests.sampling.settings import change, sampling_config


@pytest.fixture
def soon(monkeypatch):
    """Stops are looked at from 9 tokens on, and the entropy is that of the last 8."""
    monkeypatch.setattr(stopping, "WINDOW", 8)
    monkeypatch.setattr(drawing, "WINDOW", 8)


def tokens_of(sampler, params, count, batch, prompt=()):
    return [drawn.tokens.tolist() for drawn in draw(sampler, params, sampler.canvas([prompt])[0], count, batch)]


@pytest.mark.parametrize(
    ("objective", "block_size"),
    [("bd3lm", 4), *(pytest.param(other, 0, marks=pytest.mark.slow) for other in ("mdlm", "ar", "sedd"))],
)
def test_a_sample_depends_on_seed_and_index_only(make, objective, block_size):
    """Whatever the batch size."""
    sampler, params = make(objective, block_size)
    together = tokens_of(sampler, params, 5, 5, [3, 4])
    assert together == tokens_of(sampler, params, 5, 2, [3, 4])
    assert together[:1] == tokens_of(sampler, params, 1, 2, [3, 4])
    assert together != tokens_of(change(sampler, seed=1), params, 5, 5, [3, 4])  # compiled once for all seeds
    assert len({tuple(tokens) for tokens in together}) == 5


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), pytest.param("ar", 0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_prompt_read_at_once_is_as_good_as_one_read_bit_by_bit(make, objective, block_size, kv_cache):
    sampler, params = make(objective, block_size, kv_cache=kv_cache, max_length=32)
    prompt = [5, 1, 2, 6, 3, 3, 7, 9, 1]
    at_once = Slots(sampler, params, sampler.canvas([prompt])[0], 1, blocks_per_call=1)
    assert at_once.new(0).blocks == (10 if objective == "ar" else 2)
    bit_by_bit = Slots(sampler, params, sampler.canvas([prompt])[0], 1, blocks_per_call=1)
    bit_by_bit._blocks_given = lambda row: 0
    bit_by_bit._opening = (0, sampler.start(bit_by_bit._weights, bit_by_bit._rows[0], 0))
    rows = []
    for slots in (at_once, bit_by_bit):
        slots.begin({0: slots.new(0)})
        done = []
        while not done:
            done = slots.step()
        rows.append(done[0])
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert rows[0].nfe == rows[1].nfe == 32 - 10
    calls = [row.cache_calls for row in rows]
    assert (0 < calls[0] < calls[1]) if kv_cache else calls == [0, 0]


@pytest.mark.slow
def test_the_whole_canvas_in_one_call_gives_the_same(make):
    for objective, block_size in (("bd3lm", 4), ("mdlm", 0)):
        sampler, params = make(objective, block_size, max_length=27)
        canvas = sampler.canvas([[7]] * 3)
        filled = jax.jit(Sampler.__call__, static_argnums=0)(sampler, params, sequence_keys(0, np.arange(3)), canvas)
        drawn = list(draw(sampler, params, canvas[0], 3, 2))
        np.testing.assert_array_equal(filled.tokens[:, :27], [each.tokens for each in drawn])
        np.testing.assert_array_equal(filled.nfe.sum(1), [each.nfe for each in drawn])


@pytest.mark.parametrize("objective", ["bd3lm", "ar", "mdlm"])
def test_many_prompts(make, objective):
    """Sample i of its own row is the same that it is alone, whatever shares its batch; some end before the others."""
    sampler, params = make(objective, 4 if objective == "bd3lm" else 0, max_length=12)
    prompts = [[], [3, 4], [5, 1, 2, 6, 3, 3, 7], [9], [5, 1, 2, 6, 3, 3, 8]]
    rows = sampler.canvas(prompts)
    ends = lambda drawn: drawn.index == 1 and drawn.blocks * sampler.layout.stride >= 8
    together = list(draw(sampler, params, rows, 5, 2, ends=ends))
    for drawn, row, prompt in zip(together, rows, prompts, strict=True):
        alone = list(draw(sampler, params, row, drawn.index + 1, 1))[-1]
        assert drawn.tokens.tolist() == alone.tokens[: len(drawn.tokens)].tolist()
        assert drawn.tokens.tolist()[: len(prompt) + 1] == [0, *prompt]
        assert len(drawn.tokens) == 12 if drawn.index != 1 or objective == "mdlm" else 8 <= len(drawn.tokens) <= 12


@pytest.mark.parametrize(
    ("objective", "limits"),
    [("bd3lm", [13, 21, 15]), ("ar", [21, 13, 13]), ("mdlm", [5, 21, 10]), ("sedd", [5, 12, 7])],
)
def test_lengths_of_their_own(make, objective, limits):
    """A sample that is shorter than others in its batch is what it would be alone; within MDLM's one block as well."""
    sampler, params = make(objective, 4 if objective == "bd3lm" else 0, max_length=max(limits))
    prompts = [[3], [], [5, 1, 2]]
    together = list(draw(sampler, params, sampler.canvas(prompts), 3, 2, limits=limits))
    assert [len(drawn.tokens) for drawn in together] == limits
    for drawn, prompt, limit in zip(together, prompts, limits, strict=True):
        alone = change(sampler, max_length=limit)
        *_, expected = draw(alone, params, alone.canvas([prompt])[0], drawn.index + 1, 1)
        assert drawn.tokens.tolist() == expected.tokens.tolist()
        assert drawn.nfe == expected.nfe


def test_one_compiled_function_for_every_prompt_length_and_seed(make):
    sampler, params = make("bd3lm", 4, max_length=40)
    tokens_of(sampler, params, 2, 2)
    compiled = step_program.compiled_step.cache_info().misses
    for changed, prompt in (
        (change(sampler, seed=3), [1, 2]),
        (change(sampler, max_length=55, variable_length=True), [3] * 7),
        (change(sampler, num_samples=9, min_entropy=0.1), []),
    ):
        tokens_of(changed, params, 2, 2, prompt)
    assert step_program.compiled_step.cache_info().misses == compiled


def test_every_block_per_call_gives_the_same(make):
    sampler, params = make("bd3lm", 4, max_length=27)
    found = []
    for blocks in (1, 3):
        slots = Slots(sampler, params, sampler.canvas([[7]])[0], 2, blocks_per_call=blocks)
        slots.begin({slot: slots.new(slot) for slot in (0, 1)})
        done = list(itertools.chain.from_iterable(_until_free(slots)))
        found.append([(d.tokens.tolist(), d.nfe, d.cache_calls, d.drawn_at.tolist()) for d in done])
    assert found[0] == found[1]
    drawn_at = np.asarray(found[0][0][3])
    assert sorted(drawn_at) == [0, 0, *range(1, 27)]  # every call draws one token
    for block in range(1, 7):  # and calls go from block to block
        assert set(drawn_at[4 * block : 4 * block + 4]) == {*range(4 * block - 1, 4 * block + 3)}


def _until_free(slots):
    while len(slots.free) < len(slots.drawing):
        yield slots.step()


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("mdlm", 0), ("ar", 0)])
def test_variable_length(make, soon, objective, block_size):
    """Cut after the second EOS, as the same sample of full length says where it is; slots are refilled meanwhile."""
    sampler, params = make(objective, block_size, max_length=60, nucleus=1.0, temperature=3.0)
    whole = tokens_of(sampler, params, 9, 4)
    ended = list(draw(change(sampler, variable_length=True), params, sampler.canvas([[]])[0], 9, 4))
    assert [drawn.index for drawn in ended] == list(range(9))
    lengths = []
    for tokens, drawn in zip(whole, ended, strict=True):
        ends = [place for place, token in enumerate(tokens) if token == sampler.model.ids.eos]
        expected = tokens[: ends[1] + 1] if len(ends) > 1 else tokens
        assert drawn.tokens.tolist() == expected
        assert drawn.stopped == ("eos" if len(ends) > 1 else "")
        lengths.append(len(expected))
        if objective == "ar":
            assert drawn.nfe == max(len(expected), 9) - 1
    assert len(set(lengths)) > 3


def flat(params, token):
    """The model says one token, whatever it reads."""
    zeros = jax.tree.map(np.zeros_like, params)
    zeros["output"]["bias"] = np.where(np.arange(11) == token, 50.0, 0.0).astype(np.float32)
    return zeros


def test_low_entropy_is_drawn_anew_or_cut_off(make, soon):
    sampler, params = make("bd3lm", 4, max_length=40, min_entropy=1.0)
    degenerate = flat(params, 7)
    with pytest.raises(UserError, match=r"sample 0 was discarded 10 times \(the entropy of 8 tokens fell below 1.0"):
        tokens_of(sampler, degenerate, 3, 2)
    cut = list(draw(change(sampler, variable_length=True), degenerate, sampler.canvas([[1, 2, 3, 4, 5]])[0], 2, 2))
    assert [(drawn.stopped, drawn.tokens.tolist()) for drawn in cut] == [("entropy", [0, 1, 2, 3, 4, 5, 7, 7])] * 2
    # Samples that are not degenerate are those of a run without the rule; the others have had other draws.
    sampler, params = make("bd3lm", 4, max_length=24, nucleus=1.0, temperature=3.0)
    free = tokens_of(sampler, params, 8, 4)
    lowest = [min(entropy(tokens[end - 8 : end]) for end in range(12, 25, 4)) for tokens in free]
    sampler = change(sampler, min_entropy=min(lowest) + 1e-3)
    held = list(draw(sampler, params, sampler.canvas([[]])[0], 8, 4))
    rejected = [drawn.rejected for drawn in held]
    assert 0 < sum(count > 0 for count in rejected) < 8
    for tokens, drawn in zip(free, held, strict=True):
        assert (drawn.tokens.tolist() == tokens) == (drawn.rejected == 0)


def test_what_is_given_neither_stops_a_sample_nor_discards_it(make, soon):
    sampler, params = make("bd3lm", 4, max_length=24, variable_length=True)
    text = [3, 0, 5, None, 0, 1, *[7] * 12, None, None, 0, 2, 4]
    for drawn in draw(sampler, params, sampler.canvas([text])[0], 2, 2):
        assert (drawn.stopped, len(drawn.tokens)) == ("", 24)
    sampler, params = make("bd3lm", 4, max_length=16, min_entropy=1.5, nucleus=1.0, temperature=3.0)
    assert [drawn.rejected for drawn in draw(sampler, params, sampler.canvas([[7] * 10])[0], 2, 2)] == [0, 0]


def test_an_eos_within_may_be_drawn_often(make, soon, monkeypatch):
    """Where most samples of SEDD hold one; and where all do."""
    sampler, params = make("sedd", variable_length=True, num_steps=2, nucleus=1.0)
    params = jax.tree.map(np.zeros_like, params)
    params["output"]["bias"] = np.where(np.arange(11) == 0, np.log(2.25), 0.0).astype(np.float32)
    held = list(draw(sampler, params, sampler.canvas([[]])[0], 16, 16))
    assert max(drawn.rejected for drawn in held) >= 10
    assert all((drawn.tokens == 0).sum() == 1 for drawn in held)
    monkeypatch.setitem(stopping.DRAWS, "eos", 12)
    message = r"discarded 12 times \(EOS within, .*\); allowed are samples without: lower config.sampling.max_length"
    with pytest.raises(UserError, match=message):
        tokens_of(sampler, flat(params, 0), 2, 16)


def test_sedd_samples_that_would_stop_are_discarded(make, soon):
    sampler, params = make("sedd", variable_length=True, num_steps=4, nucleus=1.0)
    # Nearly all tokens alike, EOS one in 25: a third of the samples holds one.
    params = jax.tree.map(np.zeros_like, params)
    params["output"]["bias"] = np.where(np.arange(11) == 0, -1.0, 0.0).astype(np.float32)
    held = list(draw(sampler, params, sampler.canvas([[]])[0], 32, 16))
    assert any(drawn.rejected for drawn in held)
    for drawn in held:
        assert (drawn.tokens == 0).sum() == 1
        assert len(drawn.tokens) == 12


def test_no_network_call_once_all_are_finished(make, soon, monkeypatch):
    """EOS all along: every sample stops as soon as stops are looked at."""
    sampler, params = make("bd3lm", 4, max_length=400, variable_length=True)
    calls = []
    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda self: calls.append(1) or step(self))
    ended = list(draw(sampler, flat(params, 0), sampler.canvas([[]])[0], 4, 2))
    assert [drawn.tokens.tolist() for drawn in ended] == [[0, 0]] * 4
    assert len(calls) == 2  # of 8 blocks each, once for each pair of samples
    assert [drawn.nfe for drawn in ended] == [11] * 4  # the three blocks before the first look


@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_memory_does_not_grow_with_the_length(make, objective):
    sampler, params = make(objective, 4 if objective == "bd3lm" else 0, max_length=100)
    longer = change(sampler, max_length=100_000)
    sizes = []
    for each in (sampler, longer):
        slots = Slots(each, params, each.canvas([[]])[0], 2)
        sizes.append([leaf.shape for leaf in jax.tree.leaves((slots._memory, slots._inputs()))])
    assert sizes[0] == sizes[1]


def test_a_row_that_is_given_whole(make):
    sampler, params = make("bd3lm", 4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    (drawn,) = draw(sampler, params, sampler.canvas([prompt])[0], 1, 2)
    assert drawn.tokens.tolist() == [0, *prompt]
    assert drawn.nfe == 0


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 16), ("ar", 0)])
def test_100_000_tokens_from_a_context_of_128(toy_lm, random_params, objective, block_size):
    lm = toy_lm(objective, block_size, length=128)
    config = sampling_config(objective, max_length=100_000)
    sampler, params = Sampler(lm, config), random_params(lm)
    slots = Slots(sampler, params, sampler.canvas([[]])[0], 1)
    slots.begin({0: slots.new(0)})
    for _ in range(10):
        slots.step()
    held = lambda: sum(array.nbytes for array in jax.live_arrays())
    process = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before = held(), process()
    (drawn,) = next(filter(None, iter(slots.step, None)))
    assert held() == before[0]
    assert process() - before[1] < 64  # MiB
    assert len(drawn.tokens) == 100_000
    assert drawn.nfe >= 99_999
    # The end is as varied as the beginning, but for the BOS.
    assert set(drawn.tokens[-2000:]) == set(drawn.tokens[1:2000])
