"""An objective bound to a network: what a checkpoint is a model of. Training, evaluation and sampling start from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.config import Config, NoiseConfig
from bd3_jax.diffusion import likelihood, objectives, orders, output_loss
from bd3_jax.diffusion.output_loss import Chunks, Output
from bd3_jax.models.network import Network, Params
from bd3_jax.special_ids import SpecialIds


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Static and hashable; the parameters are passed beside it.

    `batch_shards`: into how many parts devices split a batch. It bounds what each holds at a time, and no number
    depends on it. `noise_copies`: in training, so many noised copies of a row share its clean half.
    """

    objective: str
    block_size: int
    noise: NoiseConfig
    network: Network
    ids: SpecialIds
    batch_shards: int = 1
    noise_copies: int = 1

    @classmethod
    def from_config(cls, config: Config, ids: SpecialIds, batch_shards: int = 1) -> "LanguageModel":
        network = Network(
            config.model,
            ids.vocab_size,
            adaln=config.objective != "ar",
            time_conditioned=config.objective == "sedd",
        )
        copies = config.training.noise_copies
        return cls(config.objective, config.block_size, config.noise, network, ids, batch_shards, copies)

    @property
    def length(self) -> int:
        """L, the training context in tokens."""
        return self.network.model.length

    @property
    def is_exact(self) -> bool:
        """Whether evaluation gives the likelihood itself, with nothing drawn: AR, and BD3-LM at B = 1."""
        return self.objective == "ar" or (self.objective == "bd3lm" and self.block_size == 1)

    def hidden(
        self,
        params: Params,
        x0: Int[Array, "b L"],
        draw: likelihood.Draw | None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "n L d"]:
        """The network's pass for likelihoods: over x0 for AR, xt for MDLM and SEDD, [xt ; x0] for BD3-LM.

        The draw has b rows, or K b: K that follow each other for every row of x0.

        Where one block is the whole row the noised tokens see no clean one, so the clean stream is left out.

        Raises:
          ValueError: the network is conditioned on time, and every block of a row has a time of its own.
        """
        if draw is None:
            return self.network.apply(params, x0, 1, dropout_key=dropout_key)
        if self.network.time_conditioned and draw.sigma.shape[1] > 1:
            raise ValueError("a time-conditioned network is fed one sigma per row, but each block has its own")
        clean = x0 if self.block_size < x0.shape[1] else None
        return self.network.apply(
            params, draw.xt, self.block_size, clean=clean, sigma=draw.sigma[:, 0], dropout_key=dropout_key
        )

    def token_losses(
        self,
        params: Params,
        x0: Int[Array, "b L"],
        draw: likelihood.Draw | None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, "n L"]]:
        """Sum of the losses of all tokens given their draw (None for AR), and each of them, nats; see `hidden`."""
        hidden = self.hidden(params, x0, draw, dropout_key)
        x0 = jnp.repeat(x0, hidden.shape[0] // x0.shape[0], axis=0)
        output = Output(*self.network.output(params))
        return likelihood.token_losses(self.objective, hidden, output, x0, draw, self.ids.mask, self._chunks)

    @property
    def _chunks(self) -> Chunks:
        return Chunks(self.network.settled.max_logits, self.batch_shards)

    def most_chunks(self, rows: int) -> int:
        """In how many chunks `token_losses` computes the logits of so many rows, where every position counts."""
        n = rows // self.batch_shards * self.length
        return -(-n // self._chunks.size(n, self.ids.vocab_size))

    def training_loss(
        self,
        params: Params,
        x0: Int[Array, "b L"],
        key: PRNGKeyArray,
        low: Float[Array, ""] | float,
        high: Float[Array, ""] | float,
    ) -> tuple[Float[Array, ""], Float[Array, "n L"]]:
        """Mean loss in nats per token with dropout, t ~ U[low, high], and the loss of every token of every copy.

        With `ignore_bos` position 0 has loss 0 and is counted all the same; AR counts its L - 1 targets.
        """
        key_draw, key_dropout = jax.random.split(key)
        draw = None
        if self.objective != "ar":
            copies = jnp.repeat(x0, self.noise_copies, axis=0)
            draw = likelihood.draw_training(key_draw, copies, self.block_size, self.noise, low, high, self.ids.mask)
        total, losses = self.token_losses(params, x0, draw, key_dropout)
        count = losses.size - (losses.shape[0] if self.objective == "ar" else 0)
        return total / count, losses

    def eval_losses(
        self, params: Params, x0: Int[Array, "b L"], key: PRNGKeyArray, estimator: str
    ) -> Float[Array, "b L"]:
        """One estimate of every token's negative log-likelihood (bound), nats, without dropout.

        `estimator` is monte_carlo or low_variance, of the NELBO; or one of `orders.ORDERS`, exact for a sampler that
        unmasks in that order. The key and it are not used where `is_exact`.

        Raises:
          ValueError: any but monte_carlo, which draw no time, with a network that is conditioned on it.
        """
        args = (x0, self.block_size, self.noise, self.ids.mask)
        if self.objective != "ar" and estimator != "monte_carlo" and self.network.time_conditioned:
            raise ValueError(f"{estimator} draws no time, but the network is conditioned on it")
        if self.objective == "ar":
            draw = None
        elif self.is_exact:
            draw = likelihood.draw_all_masked(*args)
        elif estimator in orders.ORDERS:
            free = jnp.broadcast_to(self.counted(x0.shape[1]), x0.shape)
            return orders.token_losses(self._unmasking(estimator, params, x0), free, self.block_size).losses
        elif estimator == "low_variance":
            draw = likelihood.draw_low_variance(key, *args)
        else:
            draw = likelihood.draw_monte_carlo(key, *args)
        return self.token_losses(params, x0, draw)[1]

    def conditional(
        self,
        params: Params,
        x0: Int[Array, "b L"],
        free: Bool[Array, "b L"],
        keys: PRNGKeyArray,
        estimator: str,
        draws: int,
    ) -> tuple[Float[Array, "b"], Bool[Array, "b"]]:
        """-log p of the tokens at free positions given the others, nats, or its bound; and whether they are greedy.

        The given tokens stand unmasked in every call of the network, and free ones alone are masked and weighed. So the
        NELBO is that of a diffusion of the free tokens: Block Diffusion, eq. 8, with the m free positions of a block in
        place of its B (MDLM, eq. 10; SEDD, eq. 9, over them alone). It bounds the likelihood of a sampler that is given
        the others and draws the free ones in any order, as `first_hitting` does with a prompt; the network's joint
        distribution has other conditionals, which nobody can compute. SEDD is fed the time of the free tokens, at which
        in training as much of the context was masked: a bound still, but a loose one.

        Where the mask's id stands in x0 it stays: a token that is not known. AR does not look ahead of a token, BD3-LM
        not ahead of its block: what stands there is of no consequence.

        A text is greedy if always taking the likeliest token gives it: for AR from left to right, for masked models
        in the order that `estimator` names, else by confidence. SEDD, and whatever else is conditioned on time, has no
        greedy sampler, and no text is.

        Args:
          params: of the network.
          x0: tokens. Position 0 is given.
          free: at most L - 1 positions of every row.
          keys: one for each row, `[b]`; not used by what is exact.
          estimator: see `eval_losses`.
          draws: how many draws of the noise are averaged for a NELBO.
        """
        if self.objective == "ar":
            output = Output(*self.network.output(params))
            before = jnp.roll(self.hidden(params, x0, None), 1, axis=1)
            losses, shortfalls = (
                output_loss.summed(
                    functools.partial(loss, mask_id=self.ids.mask), self._chunks, before, output, (x0,), free
                )[1]
                for loss in (objectives.ar_loss, objectives.shortfall)
            )
            return losses.sum(1), (shortfalls == 0).all(1)
        order = estimator if estimator in orders.ORDERS else "most_confident"
        if estimator in orders.ORDERS or self.is_exact:
            texts = orders.token_losses(self._unmasking(order, params, x0), free, self.block_size)
            return texts.losses.sum(1), (texts.shortfalls == 0).all(1)
        draw = likelihood.draw_low_variance if estimator == "low_variance" else likelihood.draw_monte_carlo
        noised = likelihood.draw_copies(draw, keys, x0, self.block_size, self.noise, self.ids.mask, free, draws)
        # Rows of their own: copies that share a clean half are compiled one by one, and there are many.
        copies = jnp.repeat(x0, draws, axis=0)
        losses = self.token_losses(params, copies, noised)[1].sum(1).reshape(-1, draws).mean(1)
        if self.network.time_conditioned:
            return losses, jnp.zeros(len(x0), bool)
        return losses, orders.is_greedy(self._unmasking(order, params, x0), free)

    def _unmasking(self, order: str, params: Params, x0: Int[Array, "b L"]) -> orders.Step:
        hidden_of = lambda draw: self.hidden(params, x0, draw)
        output = Output(*self.network.output(params))
        return orders.unmasking(order, hidden_of, output, x0, self.block_size, self.ids.mask, self._chunks)

    def counted(self, length: int) -> Bool[Array, "L"]:
        """Positions that an evaluation counts: all but 0 for AR and with `ignore_bos`."""
        first = self.objective != "ar" and not self.noise.ignore_bos
        return (jnp.arange(length) > 0) | first
