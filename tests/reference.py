"""The published models once more: plain numpy in float64, straight from the papers, sharing no code with the package.

Writes folders of the layout of tests/golden with sizes of any kind. `test_reference_agrees_with_the_authors` in
tests/test_parity.py checks it against the authors' own numbers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

EPS, IMPOSSIBLE = 1e-3, -1e6
Tensors = dict[str, np.ndarray]


def config_json(objective: str, block_size: int, vocab_size: int, length: int, width: int, layers: int, heads: int,
                cond: int) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "bd3lm", "architectures": ["BD3LM"], "block_size": block_size, "vocab_size": vocab_size,
        "model_length": length, "cross_attn": objective == "bd3lm", "adaln": objective != "ar",
        "attn_backend": "sdpa", "causal": objective == "ar", "hidden_dim": width, "cond_dim": cond,
        "n_blocks": layers, "n_heads": heads, "dropout": 0.1, "time_conditioning": objective == "sedd",
        "var_min": objective == "bd3lm", "sampling_eps_min": 0.001, "sampling_eps_max": 1.0, "torch_dtype": "float32",
    }  # fmt: skip


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The authors' list of tensors."""
    d, c, v = config["hidden_dim"], config["cond_dim"], config["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"backbone.vocab_embed.embedding": (v, d)}
    if config["adaln"]:
        found |= {"backbone.sigma_map.mlp.0.weight": (c, 256), "backbone.sigma_map.mlp.0.bias": (c,)}
        found |= {"backbone.sigma_map.mlp.2.weight": (c, c), "backbone.sigma_map.mlp.2.bias": (c,)}
    for i in range(config["n_blocks"]):
        block = {
            "norm1.weight": (d,), "attn_qkv.weight": (3 * d, d), "attn_out.weight": (d, d), "norm2.weight": (d,),
            "mlp.0.weight": (4 * d, d), "mlp.0.bias": (4 * d,), "mlp.2.weight": (d, 4 * d), "mlp.2.bias": (d,),
        }  # fmt: skip
        if config["adaln"]:
            block |= {"adaLN_modulation.weight": (6 * d, c), "adaLN_modulation.bias": (6 * d,)}
        found |= {f"backbone.blocks.{i}.{name}": shape for name, shape in block.items()}
    found |= {"backbone.output_layer.norm_final.weight": (d,)}
    found |= {"backbone.output_layer.linear.weight": (v, d), "backbone.output_layer.linear.bias": (v,)}
    if config["adaln"]:
        found["backbone.output_layer.adaLN_modulation.weight"] = (2 * d, c)
        found["backbone.output_layer.adaLN_modulation.bias"] = (2 * d,)
    return found


def random_tensors(config: dict[str, Any], rng: np.random.Generator, scale: float = 0.2) -> Tensors:
    """U(-scale, scale), norms around 1; with the frequencies, and the interval where the model searched one."""
    tensors: Tensors = {}
    for name, shape in shapes(config).items():
        tensors[name] = rng.random(shape, np.float32) * np.float32(2 * scale) - np.float32(scale)
        if "norm" in name:
            tensors[name] += 1
    head_dim = config["hidden_dim"] // config["n_heads"]
    tensors["backbone.rotary_emb.inv_freq"] = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    if config["var_min"]:
        for name in ("sampling_eps_min", "sampling_eps_max"):
            tensors[name] = np.array(config[name], np.float32)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_folder(folder: Path, objective: str, block_size: int, *, vocab_size: int = 23, length: int = 12,
                 width: int = 24, layers: int = 3, heads: int = 3, cond: int = 10, seed: int = 0) -> Path:  # fmt: skip
    """A whole folder: checkpoint, and `io.npz` from the reference. A name ending in _loss_scale means what it says."""
    rng = np.random.default_rng(seed)
    config = config_json(objective, block_size, vocab_size, length, width, layers, heads, cond)
    tensors = random_tensors(config, rng)
    write_checkpoint(folder, config, tensors)
    np.savez(folder / "io.npz", **arrays(config, tensors, rng, folder.name.endswith("_loss_scale")))
    return folder


# ------------------------------------------------------------------------------------------------------- network


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _rotate(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x `[b, L, h, k]`: pairs (i, i + k/2) turned by position * 10000^(-2i/k)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def network(config: dict[str, Any], tensors: Tensors, ids: np.ndarray, positions: np.ndarray, sees: np.ndarray,
            sigma: np.ndarray) -> np.ndarray:  # fmt: skip
    """Logits of every token; `sees[i, j]`: whether token i attends to token j."""
    w = {name.removeprefix("backbone."): value.astype(np.float64) for name, value in tensors.items()}
    heads, adaln = config["n_heads"], config["adaln"]
    x = w["vocab_embed.embedding"][ids]
    b, n, d = x.shape

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    if adaln:
        angle = sigma[:, None] * np.exp(-np.log(10000) * np.arange(128) / 128)
        hidden = _silu(linear("sigma_map.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)], -1)))
        cond = _silu(linear("sigma_map.mlp.2", hidden))[:, None]
    for i in range(config["n_blocks"]):
        block = f"blocks.{i}."
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            np.split(linear(block + "adaLN_modulation", cond), 6, -1) if adaln else (0, 0, 1, 0, 0, 1)
        )
        h = _norm(x, w[block + "norm1.weight"]) * (1 + scale_a) + shift_a
        q, k, v = np.moveaxis(linear(block + "attn_qkv", h).reshape(b, n, 3, heads, d // heads), 2, 0)
        scores = np.einsum("bihk,bjhk->bhij", _rotate(q, positions), _rotate(k, positions)) / np.sqrt(d // heads)
        scores = np.where(sees, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("bhij,bjhk->bihk", weights / weights.sum(-1, keepdims=True), v).reshape(b, n, d)
        x = x + gate_a * linear(block + "attn_out", out)
        h = _norm(x, w[block + "norm2.weight"]) * (1 + scale_m) + shift_m
        x = x + gate_m * linear(block + "mlp.2", _gelu(linear(block + "mlp.0", h)))
    x = _norm(x, w["output_layer.norm_final.weight"])
    if adaln:
        shift, scale = np.split(linear("output_layer.adaLN_modulation", cond), 2, -1)
        x = x * (1 + scale) + shift
    return linear("output_layer.linear", x)


def logits(config: dict[str, Any], tensors: Tensors, xt: np.ndarray, x0: np.ndarray | None = None,
           sigma: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Of the pass that the model's likelihood uses; for BD3-LM without `x0`, of its block-causal sampling mode."""
    length = xt.shape[1]
    block = np.arange(length) // (1 if config["causal"] else config["block_size"] if config["cross_attn"] else length)
    sigma = np.zeros(len(xt)) if sigma is None or not config["time_conditioning"] else sigma
    causal = block[:, None] >= block[None, :]
    if x0 is None:
        return network(config, tensors, xt, np.arange(length), causal, sigma)
    noised_sees = np.concatenate([block[:, None] == block[None, :], block[:, None] > block[None, :]], 1)
    sees = np.concatenate([noised_sees, np.concatenate([np.zeros_like(causal), causal], 1)])
    positions = np.tile(np.arange(length), 2)
    return network(config, tensors, np.concatenate([xt, x0], 1), positions, sees, sigma)[:, :length]


# -------------------------------------------------------------------------------------------- arrays of a folder


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _without_mask(logits: np.ndarray) -> np.ndarray:
    """log p over all but the mask, the last id; the mask's is -1e6."""
    return np.concatenate([_log_softmax(logits[..., :-1]), np.full((*logits.shape[:-1], 1), IMPOSSIBLE)], -1)


def _subs(logits: np.ndarray, x: np.ndarray) -> np.ndarray:
    one_hot = np.where(np.arange(logits.shape[-1]) == x[..., None], 0, IMPOSSIBLE)
    return np.where((x == logits.shape[-1] - 1)[..., None], _without_mask(logits), one_hot)


def _nucleus(probs: np.ndarray, p: float) -> np.ndarray:
    kept = np.zeros_like(probs)
    for index in np.ndindex(probs.shape[:-1]):
        order = np.argsort(-probs[index], kind="stable")
        stays = np.cumsum(probs[index][order]) <= p
        stays[0] = True
        kept[index][order[stays]] = probs[index][order[stays]]
    return kept / kept.sum(-1, keepdims=True)


def _sigma(t: np.ndarray | float) -> np.ndarray:
    return np.minimum(-np.log1p(-np.asarray(t, np.float64)), -np.log(EPS))


def arrays(config: dict[str, Any], tensors: Tensors, rng: np.random.Generator, loss_scale: bool) -> dict[str, Any]:
    length, vocab_size = config["model_length"], config["vocab_size"]
    mask, batch = vocab_size - 1, 3
    x0 = rng.integers(0, mask, (batch, length)).astype(np.int32)
    if config["causal"]:
        raw = logits(config, tensors, x0)
        log_probs = _without_mask(raw)
        nlls = -np.take_along_axis(log_probs[:, :-1], x0[:, 1:, None], -1)[..., 0]
        return {"x0": x0, "logits": raw, "log_probs": log_probs, "nlls": nlls, "loss": nlls.mean()}

    two_streams, block_size = config["cross_attn"], config["block_size"]
    t = rng.uniform(0.05, 1, (batch, length // block_size)).astype(np.float32)
    chance = t * (1 - EPS) if loss_scale else t
    masked = rng.random((batch, length)) < np.repeat(chance, length // t.shape[1], 1)
    masked[:, 0] &= loss_scale
    xt = np.where(masked, mask, x0).astype(np.int32)
    sigma = _sigma(chance[:, 0])
    raw = logits(config, tensors, xt, x0 if two_streams else None, sigma)
    found = {"x0": x0, "xt": xt, "t": np.repeat(t, block_size, 1) if two_streams else t, "logits": raw}
    found["sigma"] = sigma[:, None].astype(np.float32)
    weight = np.repeat(1 / t.astype(np.float64), length // t.shape[1], 1)
    if config["time_conditioning"]:
        return found | _sedd(config, tensors, x0, xt, raw, sigma, weight)

    log_probs = _subs(raw, xt)
    at_x0 = np.take_along_axis(log_probs, x0[..., None], -1)[..., 0]
    found |= {"model_output": log_probs, "nll_per_token": np.where(masked, -weight * at_x0, 0)}
    x = xt
    if two_streams:
        last = np.arange(length) >= length - block_size
        x = np.where(last & (rng.random(x0.shape) < 0.7), mask, x0).astype(np.int32)
        found |= {"sample_x": x, "sample_model_output": _subs(logits(config, tensors, x), x)}
    p_x0 = np.exp(_subs(logits(config, tensors, x), x))
    filtered = _nucleus(p_x0, 0.8)
    q = filtered * (1 - 0.5 / 0.6)
    q[..., mask] = 0.5 / 0.6
    found |= {"ddpm_x": x, "ddpm_t": 0.6, "ddpm_dt": 0.1, "nucleus_p": 0.8}
    if two_streams:
        return found | {"ddpm_q_xs": q[:, length - block_size :]}
    return found | {"ddpm_p_x0": p_x0, "ddpm_p_x0_nucleus": filtered, "ddpm_q_xs": q}


def _sedd(config: dict[str, Any], tensors: Tensors, x0: np.ndarray, xt: np.ndarray, raw: np.ndarray,
          sigma: np.ndarray, weight: np.ndarray) -> dict[str, Any]:  # fmt: skip
    vocab_size = config["vocab_size"]
    mask, vocab = vocab_size - 1, np.arange(vocab_size)

    def log_score(raw: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        scaled = raw - np.log(np.expm1(sigma))[:, None, None] - np.log(vocab_size - 1)
        return np.where(vocab == xt[..., None], 0, scaled)

    output = log_score(raw, sigma)
    ratio = 1 / np.expm1(sigma)[:, None]
    at_x0 = np.take_along_axis(output, x0[..., None], -1)[..., 0]
    entropy = np.exp(output[..., :mask]).sum(-1) - ratio * at_x0 + ratio * (np.log(ratio) - 1)
    found = {"model_output": output, "nll_per_token": np.where(xt == mask, weight / ratio * entropy, 0)}

    def probs(t: float, dsigma: float, p: float) -> np.ndarray:
        noise = np.full(len(xt), _sigma(t))
        output = log_score(logits(config, tensors, xt, None, noise), noise)
        score = np.exp(output) if p == 1 else _nucleus(np.exp(_log_softmax(output)), p)
        staggered = score * np.exp(dsigma)
        staggered[..., mask] += (1 - np.exp(dsigma)) * score.sum(-1)
        transition = np.where(vocab == xt[..., None], np.exp(-dsigma), 0)
        return staggered * (transition + np.where(xt == mask, 1 - np.exp(-dsigma), 0)[..., None])

    found |= {"analytic_t": 0.6, "analytic_dt": 0.1, "denoiser_t": 0.05}
    for p in (1.0, 0.75):
        found[f"analytic_probs_nucleus{p}"] = probs(0.6, _sigma(0.6) - _sigma(0.5), p)
        final = probs(0.05, _sigma(0.05), p)
        final[..., mask] = 0
        found[f"denoiser_probs_nucleus{p}"] = final
    return found
