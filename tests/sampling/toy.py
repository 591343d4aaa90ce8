"""A vocabulary of three tokens and a mask, four positions: all 256 states, so that distributions can be enumerated.

Everything here is NumPy in float64 and shares no code with the package.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

V, L, MASK = 4, 4, 3
STATES = np.stack(np.unravel_index(np.arange(V**L), (V,) * L), axis=-1)  # [256, 4]
INDEX = V ** np.arange(L)[::-1]  # tokens @ INDEX is the number of a state


def random_table(seed: int) -> np.ndarray:
    """Some p(x0_i | state) `[256, 4, V]`, 0 at the mask: any function of the state, as a network is."""
    logits = 0.8 * np.random.default_rng(seed).normal(size=(V**L, L, V - 1))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.concatenate([probs, np.zeros((V**L, L, 1))], axis=-1)


def conditionals(joint: np.ndarray) -> np.ndarray:
    """p(x0_i = y | unmasked tokens of the state) `[256, 4, V]` of a joint distribution over all states."""
    table = np.zeros((V**L, L, V))
    for number, state in enumerate(STATES):
        agrees = ((state == STATES) | (state == MASK)).all(1)
        for position in range(L):
            mass = np.bincount(STATES[:, position], weights=joint * agrees, minlength=V)
            table[number, position] = mass / max(mass.sum(), 1e-300)
    return table


def random_joint(seed: int) -> np.ndarray:
    """A distribution over the 81 states without a mask, far from independent."""
    weights = np.random.default_rng(seed).gamma(0.3, size=V**L) * (STATES != MASK).all(1)
    return weights / weights.sum()


def nucleus(probs: np.ndarray, p: float) -> np.ndarray:
    """By sorting (stable, descending): inclusive cumulative probability <= p, the first always, renormalised."""
    if p == 1:
        return probs
    order = np.argsort(-probs, axis=-1, kind="stable")
    keep = np.cumsum(np.take_along_axis(probs, order, -1), -1) <= p
    keep[..., 0] = True
    kept = np.zeros_like(probs)
    np.put_along_axis(kept, order, np.take_along_axis(probs, order, -1) * keep, -1)
    return kept / kept.sum(-1, keepdims=True)


def transitions(positions: np.ndarray) -> np.ndarray:
    """Probabilities `[256, 256]` of the next state, from those of its independent positions `[256, 4, V]`."""
    return np.einsum("na,nb,nc,nd->nabcd", *np.moveaxis(positions, 1, 0)).reshape(V**L, V**L)


def start_at(canvas: list[int]) -> np.ndarray:
    return np.eye(V**L)[np.dot(canvas, INDEX)]


def move(positions: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Transitions that draw from `positions` `[256, 4, V]` at the masked positions in `where` and leave the others."""
    moving = (STATES == MASK) & where
    return transitions(np.where(moving[..., None], positions, np.eye(V)[STATES]))


def first_hitting(table: np.ndarray, canvas: list[int], block_size: int) -> np.ndarray:
    """Exact distribution over states: block after block, one uniformly chosen masked position a step."""
    distribution = start_at(canvas)
    for start in range(0, L, block_size):
        block = range(start, start + block_size)
        count = np.maximum((STATES == MASK)[:, block].sum(1), 1)
        # Choosing an unmasked position, where all are, changes nothing.
        chosen = [(STATES[:, i] == MASK) / count for i in block]
        chosen[0] = chosen[0] + ((STATES != MASK)[:, block]).all(1)
        step = sum(share[:, None] * move(table, np.arange(L) == i) for share, i in zip(chosen, block, strict=True))
        distribution = distribution @ np.linalg.matrix_power(step, block_size)
    return distribution


def ancestral(table: np.ndarray, canvas: list[int], block_size: int, num_steps: int) -> np.ndarray:
    """Exact distribution over states with T steps a block: stay masked with p(t - dt) / p(t), p(t) = t."""
    distribution = start_at(canvas)
    times = 1 - np.arange(num_steps + 1) / num_steps
    for start in range(0, L, block_size):
        block = (np.arange(L) >= start) & (np.arange(L) < start + block_size)
        for stay in times[1:] / times[:-1]:
            distribution = distribution @ move((1 - stay) * table + stay * np.eye(V)[MASK], block)
    return distribution


def by_candidates(
    table: np.ndarray, drawn_from: np.ndarray, canvas: list[int], block_size: int, choose: Callable[..., np.ndarray]
) -> np.ndarray:
    """Exact distribution over states: every masked position draws a candidate, `choose` says which are kept.

    Candidates come from `drawn_from`; confidence (the candidate's) and entropy, -inf and inf where nothing is masked,
    are those of `table`, both `[256, 4, V]`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = -np.nansum(table * np.log(table), axis=-1)
    distribution = start_at(canvas)
    for start in range(0, L, block_size):
        step = np.zeros((V**L, V**L))
        for number, state in enumerate(STATES):
            masked = (state == MASK) & (np.arange(L) // block_size == start // block_size)
            if not masked.any():
                step[number, number] = 1
                continue
            cases = STATES[(STATES[:, ~masked] == state[~masked]).all(1) & (STATES[:, masked] != MASK).all(1)]
            at = lambda probs, cases=cases, number=number: probs[number, np.arange(L), cases]
            chosen = choose(
                np.where(masked, at(table), -np.inf),
                np.where(masked, np.broadcast_to(entropies[number], cases.shape), np.inf),
            )
            after = np.where(masked & ~chosen, MASK, cases) @ INDEX
            np.add.at(step[number], after, np.where(masked, at(drawn_from), 1).prod(1))
        distribution = distribution @ np.linalg.matrix_power(step, block_size)
    return distribution


def remasking(table: np.ndarray, canvas: list[int], num_steps: int, eta: float, taken: int) -> np.ndarray:
    """Exact distribution over states of ReMDM-conf in one block, for a table that is the same in every state.

    `taken`: how many of the T steps.
    """
    distribution, given = start_at(canvas), np.asarray(canvas) != MASK
    ours = (STATES != MASK) & ~given
    psi = np.take_along_axis(table, STATES[..., None], -1)[..., 0]
    weights = np.where(ours, np.exp(-psi), 0)
    share = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    for step in range(taken):
        alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
        unmask = (alpha_s - alpha_t) / (1 - alpha_t)
        sigma = eta * min(1, (1 - alpha_s) / alpha_t) if alpha_t else 0.0
        back = (sigma * share)[..., None]
        masked = (STATES == MASK)[..., None]
        stay = np.eye(V)[STATES]
        positions = np.where(
            masked, unmask * table + (1 - unmask) * np.eye(V)[MASK], (1 - back) * stay + back * np.eye(V)[MASK]
        )
        distribution = distribution @ transitions(positions)
    return distribution


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)


def assert_drawn_from(tokens: np.ndarray, distribution: np.ndarray) -> None:
    """Chi-square test of sequences `[n, 4]` against a distribution over states."""
    expected = distribution * len(tokens)
    observed = np.bincount(np.asarray(tokens) @ INDEX, minlength=V**L)
    assert observed[distribution == 0].sum() == 0
    # The rarest states are pooled until 5 or more are expected together.
    order = np.argsort(expected)[(distribution == 0).sum() :]
    pooled = 1 + int(np.searchsorted(np.cumsum(expected[order]), 5))
    observed, expected = (np.append(x[order[pooled:]], x[order[:pooled]].sum()) for x in (observed, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3
