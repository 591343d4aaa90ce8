"""The yardstick: a plain PyTorch network of the authors' shape, with its training step, likelihood and samplers.

What a competent user would write without further thought: attention by `scaled_dot_product_attention` with a dense
mask over [xt ; x0], the output layer over all L positions, AdamW. Parameters have the names of the published
checkpoints, so that `bd3_jax.checkpoints.pytorch.to_tensors` fills it from ours.
"""

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUCLEUS = 0.9
MIN_TIME = 1e-3


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the network and its objective are: `vocab_size` is V, the mask is its last id."""

    objective: str
    block_size: int
    length: int
    width: int
    num_layers: int
    num_heads: int
    cond_dim: int
    dropout: float
    vocab_size: int

    @property
    def mask(self) -> int:
        return self.vocab_size - 1


def attention_mask(shape: Shape) -> Tensor | None:
    """True where a query (row) sees a key: [2L, 2L] for BD3-LM, [L, L] for AR, None where all see all."""
    block = torch.arange(shape.length) // shape.block_size
    query, key = block[:, None], block[None, :]
    if shape.objective == "bd3lm":
        noised = torch.cat([query == key, query > key], dim=1)
        return torch.cat([noised, torch.cat([torch.zeros_like(query == key), query >= key], dim=1)])
    return query >= key if shape.objective == "ar" else None


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions on `[b, h, L, k]`, halves of a head rotated against each other."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = positions[:, None] * frequencies
    cos, sin, (a, b) = angles.cos(), angles.sin(), x.split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight)


class TimeEmbedding(nn.Module):
    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.width
        self.heads, self.dropout = shape.num_heads, shape.dropout
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(shape.cond_dim, 6 * width) if shape.objective != "ar" else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cond: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x `[b, n, d]`; with a cache of earlier keys and values these come first. Returns keys and values too."""
        batch, count, width = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = 0.0, 0.0, 1.0, 0.0, 0.0, 1.0
        if self.adaLN_modulation is not None:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale_a) + shift_a
        q, k, v = self.attn_qkv(y).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, positions), _rotate(k, positions)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, count, width)
        x = x + gate_a * F.dropout(self.attn_out(y), self.dropout, self.training)
        y = self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)
        return x + gate_m * F.dropout(y, self.dropout, self.training), (k, v)


class Output(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.norm_final = Norm(shape.width)
        self.linear = nn.Linear(shape.width, shape.vocab_size)
        self.adaLN_modulation = nn.Linear(shape.cond_dim, 2 * shape.width) if shape.objective != "ar" else None

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
            x = x * (1 + scale) + shift
        return self.linear(x)


class VocabEmbedding(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        bound = shape.width**-0.5
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.width).uniform_(-bound, bound))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class Model(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.vocab_embed = VocabEmbedding(shape)
        self.sigma_map = TimeEmbedding(shape.cond_dim) if shape.objective != "ar" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.output_layer = Output(shape)
        mask = attention_mask(shape)
        self.register_buffer("mask", mask, persistent=False)

    @classmethod
    def filled(cls, shape: Shape, tensors: dict[str, np.ndarray]) -> "Model":
        """With the tensors of a published checkpoint, which may carry the authors' prefix."""
        model = cls(shape)
        state = {name.removeprefix("backbone."): torch.tensor(np.asarray(value)) for name, value in tensors.items()}
        model.load_state_dict(state)
        return model

    def _cond(self, sigma: Tensor) -> Tensor | None:
        return None if self.sigma_map is None else self.sigma_map(sigma)

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Logits `[b, L, V]` of L tokens, or of the noised half of [xt ; x0]; sigma `[b]`, 0 for MDLM and BD3-LM."""
        length, cond = self.shape.length, self._cond(sigma)
        x, positions = self.vocab_embed(tokens), torch.arange(tokens.shape[1]) % length
        for block in self.blocks:
            x, _ = block(x, positions, self.mask, cond, None)
        return self.output_layer(x[:, :length], cond)

    def decode(
        self, tokens: Tensor, start: int, cache: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of tokens at `start` onwards, which see all of themselves and the cache, and the longer cache."""
        cond, x = self._cond(torch.zeros(1)), self.vocab_embed(tokens)
        positions, longer = torch.arange(start, start + tokens.shape[1]), []
        for index, block in enumerate(self.blocks):
            x, pair = block(x, positions, None, cond, None if cache is None else cache[index])
            longer.append(pair)
        return self.output_layer(x, cond), longer


def token_losses(model: Model, x0: Tensor, xt: Tensor, weight: Tensor, sigma: Tensor) -> Tensor:
    """Losses `[b, L]` in nats given the noised tokens, the weight of each token and, for SEDD, the noise of each row.

    AR has 0 at position 0 and uses none of xt, weight and sigma.
    """
    shape = model.shape
    if shape.objective == "ar":
        logits = model(x0, sigma)
        logits[..., shape.mask] = -math.inf
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), x0[:, 1:], reduction="none")
        return F.pad(losses, (1, 0))
    fed = sigma if shape.objective == "sedd" else torch.zeros_like(sigma)
    logits = model(torch.cat([xt, x0], dim=1) if shape.objective == "bd3lm" else xt, fed)
    masked = xt == shape.mask
    if shape.objective != "sedd":
        logits[..., shape.mask] = -math.inf
        log_probs = logits.log_softmax(-1)
        return torch.where(masked, -weight * log_probs.gather(-1, x0[..., None])[..., 0], 0.0)
    noise = torch.expm1(sigma)[:, None]
    log_score = logits - noise.log()[..., None] - math.log(shape.vocab_size - 1)
    positive = log_score[..., : shape.mask].exp().sum(-1)
    picked = log_score.gather(-1, x0[..., None])[..., 0]
    entropy = positive - picked / noise - (noise.log() + 1) / noise
    return torch.where(masked, weight * noise * entropy, 0.0)


def draw(shape: Shape, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xt, weight 1/t of each token and sigma of each row, with one time per block; position 0 stays clean."""
    batch, blocks = x0.shape[0], x0.shape[1] // shape.block_size
    t = (torch.randperm(batch * blocks).view(batch, blocks) + torch.rand(batch, blocks)) / (batch * blocks)
    t = MIN_TIME + (1 - MIN_TIME) * t
    per_token = t.repeat_interleave(shape.block_size, dim=1)
    masked = torch.rand(x0.shape) < per_token
    masked[:, 0] = False
    sigma = (-torch.log1p(-t[:, 0])).clamp(max=-math.log(MIN_TIME))
    return torch.where(masked, shape.mask, x0), 1 / per_token, sigma


def train_step(model: Model, optimizer: torch.optim.Optimizer, x0: Tensor) -> float:
    """One update; the loss in nats per token."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = token_losses(model, x0, *draw(model.shape, x0)).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def likelihood(model: Model, x0: Tensor) -> Tensor:
    """Summed losses of every row, nats, without dropout."""
    model.eval()
    return token_losses(model, x0, *draw(model.shape, x0)).sum(-1)


def _pick(logits: Tensor, mask: int) -> Tensor:
    """A token for each row of logits `[n, V]`, from its nucleus."""
    logits[..., mask] = -math.inf
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
    keep = probs.cumsum(-1) <= NUCLEUS
    keep[..., 0] = True
    return order.gather(-1, (probs * keep).multinomial(1))[..., 0]


@torch.no_grad()
def sample(model: Model, bos: int, length: int) -> Tensor:
    """One sequence `[length]` with cached keys and values: AR token by token, BD3-LM by first-hitting in each block."""
    model.eval()
    size, mask, cache = model.shape.block_size, model.shape.mask, None
    tokens = torch.full((length,), mask)
    tokens[0] = bos
    for start in range(0, length, size):
        block = tokens[start : start + size][None]
        if model.shape.objective == "ar":
            logits, cache = model.decode(block, start, cache)
            if start + 1 < length:
                tokens[start + 1] = _pick(logits[0, -1:], mask)[0]
            continue
        while (masked := (block[0] == mask).nonzero()[:, 0]).numel():
            # As the authors do: all positions are drawn, and one of them is kept.
            logits, _ = model.decode(block, start, cache)
            place = masked[torch.randint(masked.numel(), ())]
            block[0, place] = _pick(logits[0], mask)[place]
        _, cache = model.decode(block, start, cache)
    return tokens
