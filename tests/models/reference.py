"""Zamba2 in numpy, float64, one row, one token and one head at a time: written from the paper, not from the package.

Only where a parameter is found comes from the package.
"""

import math

import numpy as np


def array(parameter):
    return np.zeros(()) if parameter is None else np.asarray(parameter[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * array(scale)


def convolve(x, taps, bias):
    """Causal, depthwise; zeros before the row."""
    k = len(array(taps))
    padded = np.concatenate([np.zeros((k - 1, x.shape[1])), x])
    return np.stack([np.sum(padded[i : i + k] * array(taps), axis=0) for i in range(len(x))]) + array(bias)


def mamba(m, u, c):
    z = u @ array(m.in_z).T + array(m.in_z_bias)
    x = u @ array(m.in_x).T + array(m.in_x_bias)
    bc = u @ array(m.in_bc).T + array(m.in_bc_bias)
    dt = u @ array(m.in_dt).T + array(m.in_dt_bias) + array(m.dt_bias)
    dt = np.clip(np.log1p(np.exp(dt)), *c.time_step_limit)
    x = silu(convolve(x, m.conv_x, m.conv_x_bias)).reshape(len(u), c.mamba_heads, -1)
    bc = silu(convolve(bc, m.conv_bc, m.conv_bc_bias)).reshape(len(u), 2 * c.ngroups, c.d_state)
    y = np.empty_like(x)
    for head in range(c.mamba_heads):
        group = head // (c.mamba_heads // c.ngroups)
        state = np.zeros((x.shape[-1], c.d_state))
        for i in range(len(u)):
            B, C = bc[i, group], bc[i, c.ngroups + group]
            decay = np.exp(-np.exp(array(m.A_log)[head]) * dt[i, head])
            state = decay * state + dt[i, head] * np.outer(x[i, head], B)
            y[i, head] = state @ C + array(m.D)[head] * x[i, head]
    gated = (y.reshape(z.shape) * silu(z)).reshape(len(u), c.ngroups, -1)
    gated /= np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + 1e-5)
    return gated.reshape(z.shape) * array(m.norm) @ array(m.out).T + array(m.out_bias)


def rotate(x, position, theta):
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def attention(a, adapters, x, positions, c):
    def project(name):
        w = np.concatenate([array(getattr(a, f"{name}_residual")), array(getattr(a, f"{name}_embedded"))], axis=1)
        y = x @ w.T
        if adapters is not None:
            y += x @ array(getattr(adapters, f"{name}_a")).T @ array(getattr(adapters, f"{name}_b")).T
        y = y.reshape(len(x), -1, c.attention_head_dim)
        if c.use_rope and name != "v":
            y = np.stack([[rotate(head, i, c.rope_theta) for head in row] for row, i in zip(y, positions, strict=True)])
        return y

    q, k, v = map(project, "qkv")
    out = np.empty_like(q)
    for head in range(c.attention_heads):
        kv = head // (c.attention_heads // c.kv_heads)
        for i in range(len(x)):
            weights = np.exp(k[: i + 1, kv] @ q[i, head] / math.sqrt(c.attention_head_dim / 2))
            out[i, head] = weights / weights.sum() @ v[: i + 1, kv]
    return out.reshape(len(x), -1) @ array(a.o).T


def shared(block, call, h, embedded, positions, c):
    x = rms_norm(np.concatenate([h, embedded], axis=-1), block.norm, c.rms_norm_eps)
    x = rms_norm(attention(block.attention, call.attention, x, positions, c), block.mlp_norm, c.rms_norm_eps)
    mlp, adapter = block.mlp, call.mlp
    gate, up = x @ array(mlp.gate).T + array(mlp.gate_bias), x @ array(mlp.up).T + array(mlp.up_bias)
    if adapter is not None:
        low = x @ array(adapter.a).T
        gate, up = gate + low @ array(adapter.gate_b).T, up + low @ array(adapter.up_b).T
    return (gelu(gate) * up @ array(mlp.down).T + array(mlp.down_bias)) @ array(call.linear).T


def logits(model, tokens, positions):
    """Of one row of tokens [t]."""
    c, h, call = model.config, array(model.embed)[np.asarray(tokens)], 0
    embedded = h
    for i, layer in enumerate(model.layers):
        given = 0
        if i in c.hybrid_layer_ids:
            block = model.shared[call % c.num_shared_blocks]
            given, call = shared(block, model.calls[call], h, embedded, positions, c), call + 1
        h = h + mamba(layer.mamba, rms_norm(h + given, layer.norm, c.rms_norm_eps), c)
    head = array(model.embed if model.head is None else model.head)
    return rms_norm(h, model.norm, c.rms_norm_eps) @ head.T
