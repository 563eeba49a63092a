"""What the tests of linear attention share: converted models, padded states, attention written as a loop."""

import math

import torch
from transformers.masking_utils import create_bidirectional_mask


HEADS, SIZE, WIDTH = 4, 8, 32
NEAR = {"rtol": 0, "atol": 1e-12}
SHARES = ["none", "kv", "layer"]


def states_of(size, length, seed=0):
    return torch.randn(size, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def run(attention, states, live=None, **kwargs):
    """The module called with the mask that transformers would give it."""
    mask = create_bidirectional_mask(attention.config, states, None if live is None else live.long())
    return attention(states, attention_mask=mask, **kwargs)[0]


def project(linear, states):
    return states @ linear.weight.T + linear.bias


def fill(projection, block):
    """Let E and F begin with a matrix and be zero elsewhere."""
    for matrix in (projection.keys, projection.values):
        matrix.data.zero_()
        matrix.data[: block.shape[0], : block.shape[1]] = block


def gap(a, b):
    return float((a - b).detach().abs().max())


@torch.no_grad()
def dense(attention, states, live):
    """Softmax attention over the live tokens, one example and one head after the other."""
    context = torch.empty_like(states)
    for b, tokens in enumerate(live):
        query = project(attention.query, states[b])
        key, value = (project(x, states[b])[tokens] for x in (attention.key, attention.value))
        for h in range(HEADS):
            part = slice(h * SIZE, (h + 1) * SIZE)
            scores = query[:, part] @ key[:, part].T / math.sqrt(SIZE)
            context[b, :, part] = scores.softmax(-1) @ value[:, part]
    return context


@torch.no_grad()
def slow(attention, states, live, slot_mask=False, length_scaling=True):
    """The specification, section 1.2: gather the tokens, sum over them one by one, never fold."""
    projection = attention.attention_core.projection
    keys, values = projection.keys, projection.keys if projection.values is None else projection.values
    context = torch.zeros_like(states)
    for b, tokens in enumerate(live):
        count = int(tokens.sum())
        query = project(attention.query, states[b])
        key, value = (project(x, states[b])[tokens] for x in (attention.key, attention.value))
        scale = 1 / math.sqrt(max(count, 1)) if length_scaling else 1.0
        short_key, short_value = torch.zeros(2, keys.shape[1], WIDTH, dtype=states.dtype)
        for t in range(count):
            short_key += scale * torch.outer(keys[t], key[t])
            short_value += scale * torch.outer(values[t], value[t])
        if slot_mask:
            short_key, short_value = short_key[: max(count, 1)], short_value[: max(count, 1)]
        for h in range(HEADS):
            part = slice(h * SIZE, (h + 1) * SIZE)
            scores = query[:, part] @ short_key[:, part].T / math.sqrt(SIZE)
            context[b, :, part] = scores.softmax(-1) @ short_value[:, part]
    return context
