"""Decoders whose layers have unequal sizes or lost a sublayer: generation with every cache, training, files."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.core.record import append_step
from hf_compress.core.surgery import resize_
from tests.conftest import ALIKE, ARCHITECTURES
from tests.rounding import assert_equal_to_rounding


DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "opt")
# Heads and neurons of each layer; of grouped queries there are two units.
SIZES = {"unequal": ([1, 2], [24, 40]), "without sublayers": ([0, 1], [40, 0])}
# No model makes this word.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 99}

every_decoder = pytest.mark.parametrize(
    "decoder", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in DECODERS]
)
every_size = pytest.mark.parametrize("sizes", list(SIZES))
# Layers of unequal sizes train in the contract tests.
without_sublayers = pytest.mark.parametrize("sizes", ["without sublayers"])


def resized(dense, sizes):
    for block, units, neurons in zip(layers_of(dense), *SIZES[sizes], strict=True):
        resize_(block, units, neurons)
    step = hc.StructuredPruningConfig(heads_per_layer=SIZES[sizes][0], neurons_per_layer=SIZES[sizes][1])
    append_step(dense.config, "structured_pruning", step)
    return dense


@pytest.fixture
def dense(model, decoder):
    # In double precision no two words are equally likely but for rounding.
    return model(decoder, "causal_lm").double()


@pytest.fixture
def pruned(dense, sizes):
    return resized(copy.deepcopy(dense), sizes)


def prompts(config):
    """Two prompts, the shorter one padded on the left."""
    ids = torch.tensor([[5, 17, 40, 8, 71], [0, 0, 33, 12, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    return {"input_ids": ids.where(mask.bool(), config.pad_token_id), "attention_mask": mask}


@every_decoder
@every_size
def test_generation_does_not_depend_on_the_cache(pruned):
    batch = prompts(pruned.config)
    expected = pruned.generate(**batch, **GREEDY, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(pruned.generate(**batch, **GREEDY, **cache), expected)
    # What stands to the left of a prompt changes nothing.
    alone = pruned.generate(batch["input_ids"][1:, 2:], **GREEDY)
    assert torch.equal(alone[0, 3:], expected[1, 5:])
    beams = [pruned.generate(**batch, **GREEDY, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    assert not torch.equal(expected[0, 5:], expected[1, 5:])


@every_decoder
@every_size
def test_assisted_generation(dense, pruned):
    """As the model that proposes words, as the one that checks them, and with proposals from the prompt."""
    ids = torch.tensor([[5, 17, 40, 8, 5, 17, 40]])
    for model, helper in ((dense, {"assistant_model": pruned}), (pruned, {"assistant_model": dense})):
        assert torch.equal(model.generate(ids, **GREEDY, **helper), model.generate(ids, **GREEDY))
    expected = pruned.generate(ids, **GREEDY)
    assert torch.equal(pruned.generate(ids, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert not torch.equal(expected, dense.generate(ids, **GREEDY))


# The name that every transformers of this major version has; the newest announce another.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_enable)?. is deprecated:FutureWarning")
@every_decoder
@without_sublayers
def test_gradient_checkpointing(pruned):
    batch = prompts(pruned.config)
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(pruned).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (saved, recomputed) = results
    assert_equal_to_rounding(saved, plain)
    assert gradients.keys() == recomputed.keys()
    assert any(name.endswith("k_proj.weight") or "c_attn" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_equal_to_rounding(recomputed[name], gradient)


@every_decoder
@every_size
@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_words(decoder, sizes, tied, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[decoder](tie_word_embeddings=tied)).eval()
    resized(model, sizes).save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = reloaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [(block.num_units, block.num_neurons) for block in layers_of(reloaded)] == list(
        zip(*SIZES[sizes], strict=True)
    )
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) == tied
    assert hc.count_cost(reloaded).params == hc.count_cost(model).params


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@every_decoder
@without_sublayers
def test_a_step_of_the_stock_trainer(pruned, sizes, tmp_path):
    model = pruned.float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 99, (4, 12))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, use_cpu=True,
        report_to="none", save_strategy="no", gradient_checkpointing=True, lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    after = model.state_dict()
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    moved = {name for name, value in after.items() if value.numel() and not torch.equal(value, before[name])}
    matrices = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel()}
    assert {f"{name}.weight" for name in matrices} <= moved


@pytest.mark.parametrize("window", [3, 6])
def test_a_window_on_a_layer_without_heads(window):
    """The layer whose cache says how many tokens there were has neither heads nor room for all of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["mistral"](sliding_window=window)).double().eval()
    resized(model, "without sublayers")
    batch = prompts(model.config)
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **GREEDY, **cache), expected)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_mixtures_of_experts_are_refused(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(kind, vocab_size=9, num_key_value_heads=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"one feed-forward sublayer in each layer, got '{kind}' .* mix experts"):
        layers_of(model)
