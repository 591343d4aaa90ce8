import dataclasses

import numpy as np
import pytest

from bd3_jax.config_dict import from_config_dict
from bd3_jax.sampling.stopping import Stop, StopRule
from bd3_jax.special_ids import SpecialIds
from configs import base

EOS = 0
VARIED = np.arange(1, 401)


def with_eos(*positions):
    tokens = VARIED.copy()
    tokens[list(positions)] = EOS
    return tokens


@pytest.mark.parametrize(
    ("tokens", "variable", "expected"),
    [
        (with_eos(0), True, None),
        (with_eos(0, 300), True, Stop("eos", 301)),
        (with_eos(0, 300, 310), True, Stop("eos", 301)),
        (with_eos(0, 300), False, None),
        (with_eos(10, 20), True, Stop("eos", 21)),  # where BOS is another id, two are needed; before 256 too
        (with_eos(0, 20)[:256], True, None),  # not looked at yet
        (with_eos(0, 20)[:257], True, Stop("eos", 21)),
        (np.where(np.arange(400) < 144, VARIED, 7), True, Stop("entropy", 144)),
        (np.where(np.arange(400) < 144, VARIED, 7), False, Stop("entropy", 144)),
        (np.where(np.arange(400) < 144, VARIED, EOS), True, Stop("entropy", 144)),  # both hold
        (np.where(np.arange(400) < 350, VARIED, 7), True, None),
    ],
)
def test_stops(tokens, variable, expected):
    assert StopRule(variable, 4.0, EOS)(tokens, given=1) == expected


@pytest.mark.parametrize(
    ("tokens", "given", "expected"),
    [
        (with_eos(0, 99), 301, None),
        (with_eos(0, 99, 300, 320), 301, Stop("eos", 321)),
        (with_eos(99, 320), 301, Stop("eos", 321)),  # one that is given counts
        (with_eos(320), 301, None),
        (np.where(np.arange(400) < 144, VARIED, 7), 144, Stop("entropy", 144)),
        (np.where(np.arange(400) < 144, VARIED, 7), 145, None),
        (np.full(400, 7), 400, None),
    ],
)
def test_nothing_stops_for_what_is_given(tokens, given, expected):
    assert StopRule(True, 4.0, EOS)(tokens, given) == expected


def test_no_minimum():
    assert StopRule(False, 0.0, EOS)(np.full(400, 7), given=1) is None


@pytest.mark.parametrize(
    ("min_entropy", "vocab_size", "expected"),
    [(-1, 50_258, 4), (-1, 30_522, 4), (-1, 2001, 0), (0, 50_258, 0), (3, 9, 3)],
)
def test_the_usual_minimum_depends_on_the_vocabulary(min_entropy, vocab_size, expected):
    c = from_config_dict(base.get_config()).sampling
    c = dataclasses.replace(c, min_entropy=float(min_entropy), variable_length=True)
    assert StopRule.of(c, SpecialIds(1, 2, 3, vocab_size)) == StopRule(True, expected, 2)
