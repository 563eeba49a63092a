"""The walk along layers: what each layer is fed, how often it runs, what is kept meanwhile, and what is refused."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, DebertaV2Config, DebertaV2Model
from transformers.pytorch_utils import Conv1D

import hf_compress as hc
from hf_compress.core import driver
from hf_compress.core.architectures import layers_of
from hf_compress.core.calibration import collect_inputs
from hf_compress.core.driver import LayerWalk
from hf_compress.core.layer_calls import NotWalkable
from hf_compress.core.moments import PairedMoments
from tests.images_and_sounds import cast, real_tokens
from tests.rounding import assert_equal_to_rounding
from tests.test_all_or_nothing import everything


class Rows:
    """All rows, as they come."""

    def __init__(self):
        self.parts = []

    def update(self, rows):
        self.parts.append(rows.clone())

    @property
    def all(self):
        return torch.cat(self.parts)


def modules_of(layer):
    """Name in the layer -> a linear module that sees one row a token: DeBERTa's see relative positions, too."""
    kinds, two_kinds_of_rows = (nn.Linear, Conv1D), ("attention.self.query_proj", "attention.self.key_proj")
    found = {name: module for name, module in layer.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if name not in two_kinds_of_rows}


def fed_in_real_passes(model, modules, data):
    """Key -> [N, F] live inputs of modules in whole forward passes, recorded without the driver."""
    rows, live = {key: [] for key in modules}, []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, key=key: rows[key].append(args[0].view(*live[-1].shape, -1)[live[-1]])
        )
        for key, module in modules.items()
    ]
    with torch.no_grad():
        for batch in data:
            live.append(real_tokens(batch))
            model.base_model(**cast(batch, model))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in rows.items()}


def layers_in(model):
    return [layer.module for layer in layers_of(model)]


def disturb(layer, seed):
    """Another layer in place of this one, as pruning makes one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("offload", [False, True])
def test_every_layer_is_fed_what_a_whole_pass_feeds_it(model, batches, architecture, offload):
    dense = model(architecture).train()
    data = batches(dense.config, count=3)
    walk = LayerWalk(dense, layers_in(dense), iter(data), two_streams=True, offload=offload)
    untouched = copy.deepcopy(dense)
    assert len(walk) == len(layers_in(dense))
    for index in walk:
        # The layers before this one are changed by now; both streams against whole passes of the two models.
        modules, before = (modules_of(layers_in(one)[index]) for one in (dense, untouched))
        rows = {name: Rows() for name in modules}
        walk.observe(modules, rows)
        expected = fed_in_real_passes(dense.eval(), modules, data)
        dense.train()
        widths = {name: getattr(m, "in_features", None) or m.nx for name, m in modules.items()}
        moments = {name: PairedMoments(width, width) for name, width in widths.items()}
        walk.observe_both(moments)
        twins = fed_in_real_passes(untouched.eval(), before, data)
        for name in modules:
            assert_equal_to_rounding(rows[name].all, expected[name])
            own, twin = expected[name].double(), twins[name].double()
            assert_equal_to_rounding(moments[name].own.gram, own.T @ own)
            assert_equal_to_rounding(moments[name].cross, twin.T @ own)
            assert moments[name].own.num_rows == len(own)
        disturb(layers_in(dense)[index], index)
        # The dense stream goes on from the layer as it was, also within the layer.
        again = {name: PairedMoments(width, width) for name, width in widths.items()}
        walk.observe_both(again)
        changed = fed_in_real_passes(dense.eval(), modules, data)
        dense.train()
        for name in modules:
            assert_equal_to_rounding(again[name].cross, twins[name].double().T @ changed[name].double())
    assert all(module.training for module in dense.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in dense.modules())


def test_the_dense_stream_costs_nothing_unless_asked_for(model, batches, monkeypatch):
    dense = model("bert")
    monkeypatch.setattr(driver.copy, "deepcopy", lambda layer: pytest.fail("a layer was copied"))
    walk = LayerWalk(dense, list(dense.encoder.layer), batches(dense.config, count=1))
    assert list(walk) == [0, 1, 2]
    with pytest.raises(ValueError, match="no dense stream"):
        walk.observe_both({"output.dense": PairedMoments(64, 64)})


def test_one_layers_inputs_are_kept(model, batches):
    dense = model("bert")
    data = batches(dense.config, count=6, size=5, length=17)
    walk = LayerWalk(dense, list(dense.encoder.layer), data)
    gc.collect()

    def hidden_states():
        found = [thing for thing in gc.get_objects() if torch.is_tensor(thing) and thing.shape == (5, 17, 32)]
        return len({tensor.data_ptr() for tensor in found})

    for _ in walk:
        gc.collect()
        assert hidden_states() == 6


def test_data_is_read_once_and_embeddings_run_once(model, batches):
    dense = model("bert")
    passes = []
    dense.embeddings.register_forward_hook(lambda *_: passes.append(1))
    walk = LayerWalk(dense, list(dense.encoder.layer), iter(batches(dense.config, count=4)))
    for index in walk:
        walk.observe({0: dense.encoder.layer[index].output.dense}, {0: Rows()})
    assert len(passes) == 4


# Counts.


def deep(layers=12):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 99}
    return BertModel(BertConfig(**sizes, num_hidden_layers=layers, initializer_range=0.2, pad_token_id=0)).eval()


@pytest.fixture
def counted(monkeypatch):
    """`counted(run)`: multiply-accumulates of all projections, and calls of layers: begun, and run to their end."""

    def count(run):
        macs, begun, finished = [], [], []

        def before(module, args):
            begun.extend([1] * type(module).__name__.endswith("Layer"))

        def after(module, args, output):
            finished.extend([1] * type(module).__name__.endswith("Layer"))
            if isinstance(module, nn.Linear):
                macs.append(args[0].numel() * module.out_features)

        handles = [
            nn.modules.module.register_module_forward_pre_hook(before),
            nn.modules.module.register_module_forward_hook(after),
        ]
        run()
        for handle in handles:
            handle.remove()
        return sum(macs), len(begun), len(finished)

    return count


def test_sequential_pruning_takes_three_passes_at_most(batches, counted):
    data = batches(BertConfig(pad_token_id=0), count=4)

    def run(order, layers):
        # Nearly everything stays, so that every call of a layer costs nearly the same.
        config = hc.StructuredPruningConfig(mac_ratio=0.97, order=order, ridge=1e-6)
        model = deep(layers)
        return counted(lambda: hc.compress(model, config, data=data))

    (macs, begun, _), (macs_once, begun_once, _) = run("sequential", 12), run("one_shot", 12)
    assert begun_once == 12 * len(data)
    assert 2.5 * macs_once < macs <= 3 * macs_once
    # A layer is begun once in the dense model, twice up to the projection that is measured, and run once to its end.
    assert begun <= 4 * begun_once
    assert run("sequential", 12)[2] <= 2 * begun_once
    # Linear in the number of layers.
    assert run("sequential", 24)[1] <= 2 * begun + 4 * len(data)


@pytest.mark.parametrize("layers", [6, 12])
def test_reconstruction_runs_each_layer_a_fixed_number_of_times(batches, counted, layers):
    data = batches(BertConfig(pad_token_id=0), count=3)
    config = hc.WeightPruningConfig(criterion="sparsegpt", pattern="2:4", target_sparsity=0.5, scope="local")
    model = deep(layers)
    _, begun, finished = counted(lambda: hc.compress(model, config, data=data))
    # One batch to see the order; then the real pass, four inputs to measure, and the way to the next layer.
    assert begun <= layers * (1 + 6 * len(data))
    assert finished <= layers * (1 + 2 * len(data))


# Refusals and failures.


def albert():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = AlbertModel(AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3)).eval()
    return model, list(model.encoder.albert_layer_groups)


def deberta():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = DebertaV2Model(DebertaV2Config(**sizes, num_hidden_layers=3, conv_kernel_size=3, conv_act="gelu")).eval()
    return model, list(model.encoder.layer)


def backwards():
    model = deep(3)
    return model, list(model.encoder.layer)[::-1]


def idle():
    model = deep(3)
    return model, [*model.encoder.layer, nn.Identity()]


def remembering():
    """The last layer also reads what the first one returned."""
    model = deep(3)
    first, last, kept = model.encoder.layer[0], model.encoder.layer[2], []
    first.register_forward_hook(lambda module, args, output: kept.append(output))
    last.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "first_states": kept[-1]}), with_kwargs=True
    )
    return model, list(model.encoder.layer)


NOT_WALKABLE = {
    albert: "layer 0 runs where layer 1 was expected",
    deberta: "layer 1 does not read the output of layer 0",
    backwards: "layer 2 runs where layer 0 was expected",
    idle: "layer 3 does not run",
    remembering: "layer 2 reads more of earlier layers than the output of layer 1",
}


@pytest.mark.parametrize("build", list(NOT_WALKABLE))
def test_layers_that_do_not_follow_each_other_are_refused(batches, build):
    model, layers = build()
    with pytest.raises(NotWalkable, match=NOT_WALKABLE[build]):
        LayerWalk(model, layers, batches(BertConfig(pad_token_id=0), count=2))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in layers[0].modules() if build is not remembering)


def test_two_models_that_drop_tokens_are_not_compared(model, batches):
    pruned = hc.compress(model("bert"), hc.TokenPruningConfig(final_token_threshold=0.03))
    with pytest.raises(NotWalkable, match="layers drop tokens"):
        LayerWalk(pruned, list(pruned.encoder.layer), batches(pruned.config, count=1), two_streams=True)


@pytest.mark.parametrize("first", [
    hc.TokenPruningConfig(final_token_threshold=0.03), hc.LinformerConfig(projected_length=4, max_tokens=80)
], ids=["tokens", "linear"])  # fmt: skip
def test_walks_along_changed_layers(model, batches, first):
    """Layers that drop tokens, and layers with another attention."""
    dense = hc.compress(model("bert").double(), first)
    data = batches(dense.config, count=3)
    layers = list(dense.encoder.layer)
    walk = LayerWalk(dense, layers, data)
    for index in walk:
        modules, rows = {index: layers[index].output.dense}, {index: Rows()}
        walk.observe(modules, rows)
        whole = {index: Rows()}
        collect_inputs(dense, modules, whole, data)
        assert_equal_to_rounding(rows[index].all, whole[index].all)
        disturb(layers[index], index)


@pytest.mark.parametrize("order", ["sequential", "sparsegpt"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_interrupted_on_the_way(model, batches, monkeypatch, order, at):
    dense = model("bert").train()
    before, calls = everything(dense), []
    original = LayerWalk.observe

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(LayerWalk, "observe", interrupted)
    config = hc.StructuredPruningConfig(mac_ratio=0.6, order="sequential")
    if order == "sparsegpt":
        config = hc.WeightPruningConfig(criterion="sparsegpt", pattern="2:4", target_sparsity=0.5, scope="local")
    with pytest.raises(KeyboardInterrupt):
        hc.compress(dense, config, data=batches(dense.config, count=3))
    assert len(calls) == at + 1
    assert everything(dense) == before
