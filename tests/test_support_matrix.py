"""The cells of the support matrix that one process can show: each is one short training, or one clear refusal."""

import pytest
import torch
import torch._dynamo
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from hf_compress.training.trainer import CompressionTrainer
from tests import crash_program, sharded_program
from tests.rounding import assert_equal_to_rounding, differ_beyond_rounding
from tests.support_matrix import MATRIX, PAGE, printed, table
from tests.support_rows import ROWS, build, train


# peft asks transformers for an attribute that is about to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

every_row = pytest.mark.parametrize("row", ROWS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Gives what a row's training leaves in fp32 as it is, once for each row and order of the rows."""
    done = {}

    def of(row, **changes):
        key = (row, *changes.items())
        if key not in done:
            done[key] = train(row, tmp_path_factory.mktemp("plain") / "run", **changes)
        return done[key]

    return of


def assert_same_training(found, expected):
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert_equal_to_rounding(found.weights[name].float(), value.float())
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def moved(found, begun):
    """Names of what a training has changed."""
    return {name for name, value in begun.items() if differ_beyond_rounding(found[name].float(), value.float())}


def test_the_page_has_the_table_that_is_printed():
    if not PAGE.is_file():
        pytest.skip("no docs beside the tests")
    assert printed(PAGE.read_text()) == table(), "run `python -m tests.support_matrix`"


@every_row
def test_two_processes(pair, tmp_path, plain, row):
    """More on them is in `tests/test_distributed.py`."""
    ROWS[row](tmp_path)
    for found in pair.run(sharded_program.in_parallel, row, str(tmp_path / "run")):
        assert found["weights"].keys() == plain(row).weights.keys()
        for name, value in plain(row).weights.items():
            assert_equal_to_rounding(found["weights"][name].float(), value.float())
        assert found["losses"] == pytest.approx(plain(row).losses, rel=1e-5)
    assert MATRIX[row]["DDP"] == "yes"


# It looks at gradients of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if n else ()) for n, row in enumerate(ROWS)])
def test_compiled(tmp_path, plain, row):
    """Traced, and run as traced (the kernels that inductor writes would round in other places)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = train(row, tmp_path / "run", torch_compile=True, torch_compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 100
    assert_same_training(found, plain(row))
    assert MATRIX[row]["torch.compile"] == "yes"


@every_row
def test_bf16(tmp_path, plain, row):
    found, expected = train(row, tmp_path / "run", bf16=True), plain(row)
    assert found.losses == pytest.approx(expected.losses, rel=2e-2, abs=1e-3)
    assert found.losses != expected.losses
    # Computed in bf16, trained and saved in fp32.
    assert {value.dtype for value in found.weights.values()} == {value.dtype for value in expected.weights.values()}
    assert MATRIX[row]["bf16"] == "yes"


@every_row
def test_fp16_is_not_ignored_without_a_gpu(tmp_path, row):
    assert MATRIX[row]["fp16"] == "on a GPU"
    if "stock" in row:
        pytest.skip("fp16 in a stock Trainer is its own")
    with pytest.raises(ValueError, match="fp16 must be off on the cpu"):
        train(row, tmp_path / "run", fp16=True)


@every_row
def test_streaming(tmp_path, plain, row):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(crash_program.Rows().rows)

    found = train(row, tmp_path / "run", rows=Stream())
    assert_same_training(found, plain(row, train_sampling_strategy="sequential"))
    assert MATRIX[row]["streaming"] == "yes"


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@every_row
def test_adapters(tmp_path, row):
    if MATRIX[row]["PEFT student"] == "refused":
        with pytest.raises(ValueError, match="adapters|PEFT"):
            train(row, tmp_path / "run", adapt=lora)
        return
    begun = lora(ROWS[row](tmp_path).student).state_dict()
    found = train(row, tmp_path / "run", adapt=lora).weights
    changed = moved(found, begun)
    assert {name for name in begun if "lora_B" in name or "modules_to_save" in name} <= changed
    assert not [name for name in changed if "lora_" not in name and "modules_to_save" not in name]


@every_row
def test_deepspeed_is_refused(tmp_path, row):
    """A real launch needs its package; without it, transformers refuses these arguments by itself."""
    made = ROWS[row](tmp_path)
    args = made.arguments(str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=1, **made.fields)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"deepspeed must not be set: .* FSDP2 .*DDP"):
        made.trainer(
            model=made.student, args=args, callbacks=made.callbacks, train_dataset=crash_program.Rows(),
            data_collator=crash_program.pad, **made.models,
        ).train()  # fmt: skip
    assert MATRIX[row]["DeepSpeed"] == "refused"


def test_deepspeed_of_a_launcher_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="deepspeed must not be set"):
        CompressionTrainer(build(16, 2, 0), args)


def test_fsdp_that_shards_nothing_is_refused(tmp_path, monkeypatch):
    """accelerate would train a whole model in each process without a word."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"fsdp must not be set here: .* this cpu"):
        CompressionTrainer(build(16, 2, 0), args)
