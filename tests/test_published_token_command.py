"""`prune-tokens --compat ltp`: the published soft stage, then the published hard stage, as two trainings."""

import re

import pandas
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.methods.token_pruning.modeling import thresholds_of
from hf_compress.stages import prune_tokens as stage


DATA = "--data_dir data --max_length 16 --use_cpu --disable_tqdm true --per_device_train_batch_size 16"
TRAIN = "--num_train_epochs 2 --learning_rate 1e-3 --final_token_threshold 0.4 --score_reference_length 16"
SOFT = f"prune-tokens --model_name_or_path model --output_dir soft {DATA} {TRAIN} --compat ltp"
HARD = f"prune-tokens --model_name_or_path soft --output_dir hard {DATA} --num_train_epochs 1 --soft_fraction 0"


@pytest.fixture
def place(sentences, tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        pandas.DataFrame(sentences, columns=["sentence", "label"]).to_parquet(tmp_path / "data" / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that commands make."""
    made = []

    class Noting(stage.DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(stage, "DistillationTrainer", Noting)
    return made


def test_both_stages(place, trainers):
    assert main(SOFT.split()) == 0
    soft = AutoModelForSequenceClassification.from_pretrained("soft")
    assert hc.steps_of(soft)[0]["compat"] == "ltp"
    assert (soft.config.masking_mode, soft.config.token_prune_stage) == ("soft", "soft")
    learned = thresholds_of(soft).values.detach()
    assert not torch.equal(learned, 0.4 * torch.arange(4) / 4)
    assert main([*HARD.split(), "--compat", "ltp"]) == 0
    hard = AutoModelForSequenceClassification.from_pretrained("hard")
    assert torch.equal(thresholds_of(hard).values, learned)
    assert (hard.config.masking_mode, hard.config.token_prune_stage) == ("hard", "hard")
    steering, args = trainers[0].callback_handler.callbacks, trainers[0].args
    [annealing] = [c for c in steering if isinstance(c, hc.ThresholdAnnealingCallback)]
    assert not any(isinstance(c, hc.StageSwitchCallback) for c in steering)
    assert (annealing.temperatures, annealing.lambda_threshold, annealing.lambda_warmup) == ((1e-3, 1e-3), 0.1, 0.0)
    assert (args.warmup_steps, args.weight_decay, args.train_sampling_strategy) == (0, 0.0, "random")


def test_what_is_given_wins(place, trainers):
    given = "--temperature_start 0.002 --temperature_end 0.0001 --lambda_warmup 0.1 --weight_decay 0.01 --max_steps 2"
    assert main([*SOFT.split(), *given.split()]) == 0
    [annealing] = [c for c in trainers[0].callback_handler.callbacks if isinstance(c, hc.ThresholdAnnealingCallback)]
    assert (annealing.temperatures, annealing.lambda_warmup) == ((0.002, 0.0001), 0.1)
    assert trainers[0].args.weight_decay == 0.01


@pytest.mark.parametrize(("line", "message"), [
    (f"{SOFT} --soft_fraction 0.5", "soft_fraction must be 0 or 1 with compat='ltp'.*got 0.5"),
    (SOFT.replace("compat ltp", "compat paper"), "compat.*'paper'"),
    (SOFT.replace("--compat ltp", "--soft_fraction 1"), r"soft_fraction must be in \[0, 1\), got 1"),
    (HARD.replace("path soft", "path other") + " --compat ltp", "compat must be None or left out for a model that"),
])  # fmt: skip
def test_contradictions_are_refused(place, capsys, line, message):
    other = AutoModelForSequenceClassification.from_pretrained("model")
    hc.compress(other, hc.TokenPruningConfig()).save_pretrained("other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "other" / file).write_text((place / "model" / file).read_text())
    assert main(line.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (place / "soft").exists()


def test_the_config_takes_the_setting_over():
    pruning = stage.TokenPruningArguments(compat="ltp", soft_fraction=1.0)
    assert pruning.config().compat == "ltp"
