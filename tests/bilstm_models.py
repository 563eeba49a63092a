"""What the tests of the BiLSTM student share: tiny models, batches of uneven texts, and an LSTM written by hand."""

import torch

import hf_compress as hc


SIZES = {"vocab_size": 40, "embedding_size": 6, "hidden_size": 5, "dropout": 0.0}


def bilstm(seed=0, **options):
    """A model with weights large enough that every gate matters."""
    torch.manual_seed(seed)
    model = hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (1.0 if "embeddings" in name else 0.5))
    return model.double().eval()


def texts(lengths, seed=1, padding="right"):
    """Rows of random ids, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.int64),
        torch.zeros(len(lengths), width, dtype=torch.int64),
    )
    for row, length in enumerate(lengths):
        place = slice(0, length) if padding == "right" else slice(width - length, width)
        ids[row, place] = torch.randint(1, SIZES["vocab_size"], (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def states_by_hand(model, ids):
    """States [S, 2 H] of each layer for one text without padding: gates one by one, from the LSTM's formulas."""
    states = model.bilstm.embeddings.weight[ids]
    found = []
    for layer in model.bilstm.layers:
        halves = []
        for suffix, order in (("", range(len(ids))), ("_reverse", reversed(range(len(ids))))):
            weights = {
                name: getattr(layer, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            hidden = cell = states.new_zeros(layer.hidden_size)
            half = [None] * len(ids)
            for step in order:
                gates = weights["weight_ih"] @ states[step] + weights["bias_ih"]
                gates = gates + weights["weight_hh"] @ hidden + weights["bias_hh"]
                enter, forget, content, leave = gates.chunk(4)
                cell = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                half[step] = hidden
            halves.append(torch.stack(half))
        states = torch.cat(halves, dim=1)
        found.append(states)
    return found


def vector_by_hand(model, ids):
    """The largest value of each state; zeros for an empty text."""
    if not len(ids):
        return torch.zeros(2 * model.config.hidden_size, dtype=model.dtype)
    return states_by_hand(model, ids)[-1].amax(0)


def pair_by_hand(model, first, second):
    """Logits [C] of one pair."""
    u, v = vector_by_hand(model, first), vector_by_hand(model, second)
    return model.classifier(model.pair_projection(torch.cat([u, v, abs(u - v), u * v])))


def from_published(weights, config):
    """The state of our model from the published code's names; what our model lacks is left out."""
    renamed = {"bilstm.encoder.": "bilstm.layers.0.", "dense_map_for_sentence_pair.": "pair_projection."}
    state = {}
    for name, value in weights.items():
        if name.startswith("bilstm.pooler.") or (config.pair_mode == "joint" and name.startswith("dense_map")):
            continue
        prefix = next((old for old in renamed if name.startswith(old)), "")
        state[renamed.get(prefix, "") + name.removeprefix(prefix)] = value
    return state
