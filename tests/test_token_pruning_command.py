"""`hf-compress prune-tokens`, on a tiny classifier and generated sentences."""

import copy
import json
import re
import shutil
from pathlib import Path

import pandas
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.stages import training
from hf_compress.training.distillation import DistillationTrainer
from tests.rounding import assert_equal_to_rounding


TINY = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}  # fmt: skip
DATA = "--data_dir data --max_length 16 --use_cpu --disable_tqdm true --per_device_train_batch_size 16"
PRUNE = f"prune-tokens --model_name_or_path model --output_dir out {DATA} --score_reference_length 8"
TRAIN = "--num_train_epochs 2 --learning_rate 1e-3"


def classifier(**options):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**TINY, **options}))


def edit(folder, other, **fields):
    """A copy of a model with fields written into its `config.json`, as the published workflow does."""
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture(scope="module")
def place(sentences, tokenizer, tmp_path_factory):
    """A folder with a classifier, one that drops tokens already, and models that cannot."""
    root = tmp_path_factory.mktemp("tokens")
    models = {
        "model": classifier(),
        "three": classifier(num_labels=3),
        "linear": hc.compress(classifier(), hc.LinformerConfig(projected_length=4)),
        "pruned": hc.compress(
            classifier(), hc.TokenPruningConfig(final_token_threshold=0.1, token_prune_stage="hard")
        ),
        "topk": hc.compress(classifier(), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.3)),
        "learning": hc.compress(classifier(), hc.TokenPruningConfig(masking_mode="soft", token_prune_stage="soft")),
        "gpt2": GPT2ForSequenceClassification(
            GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0)
        ),
    }
    for stage in ("soft", "hard"):
        model = hc.compress(classifier(), hc.TokenPruningConfig(masking_mode=stage))
        model.config.token_prune_stage = stage
        models[f"{stage}/checkpoint-2"] = model
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    edit(root / "model", root / "edited", prune_mode="absolute_threshold", score_reference_length=8)
    edit(root / "model", root / "softened", prune_mode="absolute_threshold", masking_mode="soft")
    for stage in ("soft", "hard"):
        (root / stage / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (root / "data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(root / "data" / f"{name}.parquet")
    return root


@pytest.fixture
def inside(place, tmp_path, monkeypatch):
    """Commands run in a folder of this test's own, beside the models."""
    for found in place.iterdir():
        (tmp_path / found.name).symlink_to(found)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def saved(monkeypatch):
    """The models that a command has saved, as they were in memory."""
    models = []

    def keep(directory, model, *args, real=training.save_stage):
        models.append(copy.deepcopy(model).eval())
        real(directory, model, *args)

    monkeypatch.setattr(training, "save_stage", keep)
    return models


def logits(model, tokenizer):
    batch = tokenizer(["good film", "a very bad story was the plot"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def reopened(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


LEARNED = "--final_token_threshold 0.8 --threshold_learning_rate 0.02 --temperature_start 0.5 --temperature_end 0.1"
MODES = [
    (f"{LEARNED} --lambda_threshold 0.5", {"prune_mode": "absolute_threshold", "final_token_threshold": 0.8}),
    (f"{LEARNED} --target_relative_macs 0.7 --teacher_name_or_path model", {"score_reference_length": 8}),
    ("--soft_fraction 0 --final_token_threshold 0.5 --threshold_ramp one_based --score_norm live",
     {"final_token_threshold": 0.5, "threshold_ramp": "one_based", "score_norm": "live"}),
    ("--prune_mode topk --token_keep_rate 0.3", {"prune_mode": "topk", "token_keep_rate": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "fields"), MODES, ids=["learned", "steered", "manual", "topk"])
def test_the_whole_way(inside, saved, tokenizer, capsys, flags, fields):
    # A length is a setting of the reference norm alone.
    command = PRUNE if fields.get("score_norm") != "live" else PRUNE.replace(" --score_reference_length 8", "")
    assert main(f"{command} {TRAIN} --logging_steps 2 {flags}".split()) == 0
    printed = capsys.readouterr().out
    pruned, dense = reopened("out"), reopened("model")
    (step,) = hc.steps_of(pruned)
    assert step["method"] == "token_pruning"
    assert {name: step[name] for name in fields} == fields
    # Whatever came before, it ends as a model that really drops tokens.
    assert (pruned.config.masking_mode, pruned.config.token_prune_stage) == ("hard", "hard")
    assert {name: getattr(pruned.config, name) for name in fields} == fields
    assert_equal_to_rounding(logits(pruned, tokenizer), logits(saved[0], tokenizer))
    assert not torch.equal(pruned.classifier.weight, dense.classifier.weight)
    results = json.loads(Path("out/results.json").read_text())
    assert 0 < results["eval_relative_macs"] < 1
    assert results["eval_keep_rate"] < 1
    for name in ("eval_accuracy", "eval_relative_macs", "eval_keep_rate"):
        assert re.search(rf"^{name} +{results[name]:.4f}$", printed, re.M), name
    assert "saved to out" in printed
    state = json.loads(next(Path("out").glob("checkpoint-8/trainer_state.json")).read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    # In training the last layer computes all tokens that are left, so this is pruning and nothing else.
    assert logged[-1]["prune/keep_rate"] < 1
    learns = flags.startswith(LEARNED)
    assert ["loss/threshold" in entry for entry in logged] == ([True, True, False, False] if learns else [False] * 4)
    assert ["prune/lambda" in entry for entry in logged] == [learns] * 4
    assert [("loss/output" in entry) for entry in logged] == ["teacher" in flags] * 4
    thresholds = thresholds_of(pruned)
    if "topk" in flags:
        assert thresholds is None
    else:
        start = hc.compress(dense, hc.TokenPruningConfig(**fields))
        moved = thresholds.values != thresholds_of(start).values
        assert moved.tolist() == ([False] + [learns] * 4)


def test_a_model_that_drops_tokens_already(inside):
    line = PRUNE.replace("path model", "path pruned").replace(" --score_reference_length 8", "")
    assert main(f"{line} {TRAIN} --save_strategy no".split()) == 0
    before, after = reopened("pruned"), reopened("out")
    assert [step["method"] for step in hc.steps_of(after)] == ["token_pruning"]
    assert after.config.token_prune_stage == "hard"
    assert torch.equal(thresholds_of(after).values, thresholds_of(before).values)
    assert not torch.equal(after.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize(("folder", "flags", "learns"), [
    ("edited", LEARNED.replace("--final_token_threshold 0.8", ""), True), ("edited", "--soft_fraction 0", False),
    ("softened", "--soft_fraction 0", False), ("learning", "--soft_fraction 0", False),
], ids=["edited", "edited, by hand", "softened", "learning"])  # fmt: skip
def test_the_stage_is_what_was_asked_for(inside, folder, flags, learns):
    line = PRUNE.replace("path model", f"path {folder}").replace("--score_reference_length 8", "--save_strategy no")
    assert main(f"{line} {TRAIN} --logging_steps 2 {flags}".split()) == 0
    after = reopened("out")
    assert (after.config.masking_mode, after.config.token_prune_stage) == ("hard", "hard")
    start = thresholds_of(hc.compress(reopened("model"), hc.TokenPruningConfig())).values
    assert (thresholds_of(after).values != start).tolist() == [False] + [learns] * 4


def test_a_ramp_scaled_to_a_target(inside):
    line = f"{PRUNE} {TRAIN} --soft_fraction 0 --final_token_threshold 0.3 --target_relative_macs 0.75"
    assert main(f"{line} --save_strategy no".split()) == 0
    found = thresholds_of(reopened("out")).values
    start = thresholds_of(hc.compress(reopened("model"), hc.TokenPruningConfig(final_token_threshold=0.3))).values
    torch.testing.assert_close(found / found[-1], start / start[-1])
    assert not torch.equal(found, start)
    results = json.loads(Path("out/results.json").read_text())
    assert results["eval_relative_macs"] == pytest.approx(0.75, abs=0.04)  # Scaled on training rows.


def test_an_interrupted_command_goes_on(inside, monkeypatch):
    line = f"{PRUNE} {TRAIN} {LEARNED} --target_relative_macs 0.6"
    assert main(f"{line} --save_strategy no".replace("dir out", "dir whole").split()) == 0
    whole = reopened("whole").state_dict()
    # In the soft phase, and in the hard one, where the second epoch has begun.
    for stop in (2, 6):
        broken = f"{line} --save_strategy steps --save_steps {stop}".replace("dir out", f"dir out{stop}").split()

        def dying(self, *args, real=DistillationTrainer.training_step, stop=stop, **kwargs):
            if self.state.global_step == stop + 1:
                raise KeyboardInterrupt
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(DistillationTrainer, "training_step", dying)
            assert main(broken) == 130
        assert not Path(f"out{stop}/model.safetensors").exists()
        assert Path(f"out{stop}/checkpoint-{stop}").is_dir()
        assert main([*broken, "--resume_from_checkpoint", "true"]) == 0
        resumed = reopened(f"out{stop}").state_dict()
        assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []


def test_top_k_that_drops_nothing_says_so(caplog):
    hc.compress(classifier(), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.3))
    assert not caplog.records
    hc.compress(classifier(num_hidden_layers=3), hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.3))
    assert "token_keep_rate=0.3 drops nothing in a model of 3 layers" in caplog.text


TOPK = f"{PRUNE} --prune_mode topk --token_keep_rate 0.5"
MANUAL = f"{PRUNE} --soft_fraction 0"
FIXED = PRUNE.replace("path model", "path pruned").replace(" --score_reference_length 8", "")
CASES = [
    (f"{PRUNE} --prune_mode best", "prune_mode must be one of 'absolute_threshold', 'topk', got 'best'"),
    (f"{PRUNE} --threshold_ramp steep", "threshold_ramp must be one of 'zero_based', 'one_based', got 'steep'"),
    (f"{PRUNE} --score_norm sum", "score_norm must be one of 'reference', 'live', 'initial', got 'sum'"),
    (f"{PRUNE} --score_reference_length 0", "score_reference_length must be at least 1, got 0"),
    (f"{PRUNE} --final_token_threshold -0.1", "final_token_threshold must not be negative, got -0.1"),
    (f"{PRUNE} --final_token_threshold nan", "final_token_threshold must be finite, got nan"),
    (f"{TOPK} --token_keep_rate 1.5", "token_keep_rate must be at most 1, got 1.5"),
    (f"{TOPK} --token_keep_rate nan", "token_keep_rate must be finite, got nan"),
    (f"{PRUNE} --token_keep_rate 0.5", "token_keep_rate must go with prune_mode='topk', got 0.5"),
    (f"{PRUNE} --soft_fraction 1", r"soft_fraction must be in \[0, 1\), got 1"),
    (f"{PRUNE} --soft_fraction -0.1", r"soft_fraction must be in \[0, 1\), got -0.1"),
    (f"{PRUNE} --soft_fraction nan", r"soft_fraction must be in \[0, 1\), got nan"),
    (f"{PRUNE} --target_relative_macs 0", r"target_relative_macs must be in \(0, 1\], got 0"),
    (f"{PRUNE} --target_relative_macs 1.5", r"target_relative_macs must be in \(0, 1\], got 1.5"),
    (f"{PRUNE} --target_relative_macs nan", r"target_relative_macs must be in \(0, 1\], got nan"),
    (f"{PRUNE} --target_relative_macs half", "target_relative_macs.*'half'"),
    (f"{TOPK} --target_relative_macs 0.6", "target_relative_macs must go with prune_mode='absolute_thresh.*got 0.6"),
    (f"{MANUAL} --threshold_learning_rate 1e-3", "threshold_learning_rate must go with learned thresholds"),
    (f"{TOPK} --threshold_learning_rate 1e-3", "threshold_learning_rate must go with learned thresholds"),
    (f"{TOPK} --soft_fraction 0.3", "soft_fraction must go with learned thresholds .*got 0.3"),
    (f"{TOPK} --soft_fraction 0.5", "soft_fraction must go with learned thresholds .*got 0.5"),
    (f"{TOPK} --lambda_threshold 0.1", "lambda_threshold must go with learned thresholds .*got 0.1"),
    (f"{TOPK} --target_relative_macs 0.5 --lambda_warmup 0.1", "lambda_warmup must go with learned thresholds"),
    (f"{PRUNE} --score_norm live", "score_reference_length.*score_norm='reference'"),
    (f"{MANUAL.replace(' 8', ' 128')} --score_norm live", "score_reference_length must go with score_norm='ref"),
    (f"{PRUNE} --token_keep_rate 1", "token_keep_rate must go with prune_mode='topk', got 1"),
    (f"{PRUNE} --alpha_output 1", "alpha_output must go with teacher_name_or_path, got 1"),
    (f"{TOPK} --lambda_threshold 0.2", "lambda_threshold must go with learned thresholds .*got 0.2"),
    (f"{TOPK} --final_token_threshold 0.2", "final_token_threshold must go with prune_mode='absolute_thr.*got 0.2"),
    (f"{TOPK} --threshold_ramp one_based", "threshold_ramp must go with prune_mode='absolute_threshold', got one_b"),
    (f"{MANUAL} --lambda_warmup 0.2", "lambda_warmup must go with learned thresholds .*got 0.2"),
    (f"{MANUAL} --temperature_start 0.2 --target_relative_macs 0.7", "temperature_start must go with learned"),
    (f"{MANUAL} --temperature_end 0.2", "temperature_end must go with learned thresholds .*got 0.2"),
    (f"{FIXED} --soft_fraction 0.3", "soft_fraction must go with learned thresholds .*got 0.3"),
    (f"{FIXED} --lambda_threshold 0", "lambda_threshold must go with learned thresholds .*got 0"),
    (FIXED.replace("path pruned", "path topk") + " --target_relative_macs 0.7", "must go with prune_mode='absolute_t"),
    (f"{PRUNE} --alpha_output 2", "alpha_output must go with teacher_name_or_path, got 2"),
    (f"{PRUNE} --threshold_learning_rate -1", "threshold_learning_rate must not be negative, got -1"),
    (f"{PRUNE} --threshold_learning_rate nan", "threshold_learning_rate must not be negative, got nan"),
    (f"{PRUNE} --temperature_start 0", "temperature_start must be positive, got 0"),
    (f"{PRUNE} --temperature_end -1", "temperature_end must be positive, got -1"),
    (f"{PRUNE} --temperature_end nan", "temperature_end must be positive, got nan"),
    (f"{PRUNE} --lambda_threshold -1", "lambda_threshold must not be negative, got -1"),
    (f"{PRUNE} --lambda_threshold nan", "lambda_threshold must not be negative, got nan"),
    (f"{PRUNE} --lambda_warmup 1", r"lambda_warmup must be in \[0, 1\), got 1"),
    (f"{PRUNE} --teacher_name_or_path nowhere", "No classifier can be opened at 'nowhere'"),
    (f"{PRUNE} --teacher_name_or_path three", "3 labels, the task 'data' has 2"),
    (f"{PRUNE} --teacher_name_or_path model --alpha_output -1", "alpha_output must be zero or positive, got -1"),
    (f"{PRUNE} --teacher_name_or_path model --alpha_output 0", "alpha_output must be above 0 with teacher_name_or"),
    (f"{PRUNE} --masking_mode soft", "'masking_mode' is not an option"),
    (f"{PRUNE} --target_relative_mac 0.6", "Did you mean 'target_relative_macs'"),
    (PRUNE.replace("path model", "path gpt2"), "must be an encoder of type|model_type must be one of"),
    (PRUNE.replace("path model", "path linear"), "token_pruning cannot follow linformer: it needs softmax attention"),
    (PRUNE.replace("path model", "path three"), "3 labels, the task 'data' has 2"),
    (PRUNE.replace("path model", "path pruned") + " --prune_mode topk", "prune_mode must be 'absolute_threshold' or"),
    (PRUNE.replace("path model", "path topk"), "score_reference_length must be 128 or left out"),
    (f"{FIXED} --prune_mode topk", "prune_mode must be 'absolute_threshold' or left out"),
    (f"{FIXED.replace('path pruned', 'path topk')} --prune_mode absolute_threshold", "prune_mode must be 'topk'"),
    (PRUNE.replace("path model", "path pruned") + " --score_norm live", "score_norm must be 'reference' or left out"),
    (f"{PRUNE} --resume_from_checkpoint hard/checkpoint-2", "resume_from_checkpoint must be of the soft phase, got"),
    (f"{MANUAL} --resume_from_checkpoint soft/checkpoint-2", "resume_from_checkpoint must be of the hard phase, got"),
    (f"{PRUNE} --resume_from_checkpoint model", "resume_from_checkpoint must be true or a checkpoint folder"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("line", "expected"), CASES, ids=[f"{i:02d}" for i in range(len(CASES))])
def test_bad_input(inside, capsys, line, expected):
    assert main([*line.split(), "--max_steps", "1"]) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("hf-compress: ")
    assert re.search(expected, last), last
    assert "Traceback" not in captured.err
    assert not Path("out/model.safetensors").exists()
