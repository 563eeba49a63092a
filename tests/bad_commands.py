"""Bad command lines and bad files, most of them generated: what `test_bad_commands.py` runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas
from transformers import BertForSequenceClassification

from hf_compress.cli.options import REQUIRED, Option, stage_groups
from hf_compress.stages.table import STAGES
from tests.test_bad_input import write_model
from tests.test_vocabulary_pruning import wordpiece


COMMANDS = {stage.command: stage for stage in STAGES.values()}
DATA = "--data_dir data --max_length 16"
TRAINED = f"--model_name_or_path model --output_dir out {DATA} --use_cpu --max_steps 1 --save_strategy no"
# A command line of each command that would work.
GOOD = {
    "finetune": f"finetune {TRAINED}",
    "distill": f"distill {TRAINED} --teacher_name_or_path other",
    "search": f"search {TRAINED.replace('--model_name_or_path', '--models')} --teacher_name_or_path other --trials 1",
    "joint-distill": f"joint-distill {TRAINED} --teacher_name_or_path other",
    "snapshot-distill": f"snapshot-distill {TRAINED} --teacher_snapshots other",
    "proximal": f"proximal {TRAINED} --teacher_name_or_path other",
    "prune-structure": f"prune-structure --model_name_or_path model --output_dir out {DATA} --calibration_samples 64",
    "prune-tokens": f"prune-tokens {TRAINED}",
    "prune-weights": f"prune-weights {TRAINED} --max_steps 8 --pruning_frequency 1 --target_sparsity 0.5",
    "quantize": f"quantize --model_name_or_path model --output_dir out {DATA} --calibration_samples 64",
    "linearize": "linearize --model_name_or_path model --output_dir out --projected_length 4",
    "prune-vocabulary": "prune-vocabulary --model_name_or_path pieces --output_dir out --corpus data/train.tsv",
    "evaluate": f"evaluate --models model {DATA}",
    "report": f"report --models model other --output_dir out {DATA}",
    "export": f"export --model_name_or_path model --output_dir out {DATA} --latency_repeats 1",
    "push": "push --model_name_or_path model --repo_id me/model --dry_run --output_dir out",
}
# Values of the right type that no option of that name takes.
OUT_OF_RANGE = {
    "mac_ratio": ("0", "-0.5", "1.01", "nan", "inf"),
    "seed": ("-1", "99999999999999999999999"),
    "trials": ("0", "-1"),
    "max_drop": ("-1", "nan", "inf"),
    "space": ("seed", "learning_rate=fast", "learning_rate=2:1", "max_step=1:2", "output_dir=a|b"),
    "max_length": ("0", "1", "-5", "100000"),
    "stride": ("0", "-1"),
    "max_windows": ("0", "-3"),
    "max_train_samples": ("0", "-3"),
    "max_eval_samples": ("0", "-3"),
    "max_positions": ("0", "-1", "3"),
    "min_heads": ("-1", "99"),
    "min_neurons": ("-8", "100000"),
    "round_to": ("0", "-1"),
    "seq_len": ("0", "-1", "nan"),
    "bits": ("0", "1", "9"),
    "group_size": ("0", "-2"),
    "percdamp": ("0", "-1", "nan", "inf"),
    "ridge": ("-1", "nan", "inf"),
    "calibration_samples": ("0", "-1", "1000000"),
    "calibration_seed": ("-1", "99999999999999999999999"),
    "final_token_threshold": ("-0.1", "nan", "inf"),
    "token_keep_rate": ("1.5", "nan"),
    "score_reference_length": ("0", "-4"),
    "soft_fraction": ("1", "-0.5", "nan", "2"),
    "temperature_start": ("0", "-1", "nan", "inf"),
    "temperature_end": ("0", "-1", "nan", "inf"),
    "lambda_threshold": ("-1", "nan"),
    "lambda_warmup": ("1", "-0.1", "nan"),
    "target_relative_macs": ("0", "1.5", "-1", "nan"),
    "threshold_learning_rate": ("-1", "nan", "inf"),
    "alpha_task": ("-1", "nan", "inf"),
    "alpha_output": ("-1", "nan", "inf"),
    "alpha_layer": ("-1", "nan", "inf"),
    "temperature": ("0", "-1", "nan", "inf"),
    "layer_map": ("0 9 --alpha_layer 1", "0 --alpha_layer 1", "0 1 0 --alpha_layer 1", "-2 0 --alpha_layer 1"),
    "max_distill_steps": ("-1",),
    "teacher_learning_rate": ("-1", "nan", "inf"),
    "teacher_update_cycle": ("0", "-1"),
    "student_layers": ("0", "-1", "2", "99", "2 --layers 0", "1 --layers 0 1"),
    "layers": ("middle", "2", "-1", "1 0", "0 0", "first last", "0 1"),
    "bilstm_hidden_size": ("0", "-1", "64"),
    "bilstm_embedding_size": ("0", "-1", "64"),
    "bilstm_layers": ("0", "2"),
    "bilstm_dropout": ("-0.1", "1", "nan"),
    "bilstm_mask_padding": ("false",),
    "bilstm_embeddings": ("teacher",),
    "pair_mode": ("separate",),
    "baselines": ("nothing", "hard_labels nothing", "hard_labels hard_labels"),
    "proximal_weight": ("-0.1", "1", "nan", "inf"),
    "student_ce_weight": ("-1", "nan", "inf"),
    "dual_epsilon": ("-1", "nan", "0.5"),
    "dual_beta": ("-1", "nan", "0.5"),
    "dual_learning_rate": ("-1", "nan", "0.5"),
    "target_sparsity": ("1", "-0.1", "1.5", "nan"),
    "start_step": ("-1",),
    "end_step": ("-1",),
    "pruning_frequency": ("0", "-1"),
    "warmup_epochs": ("-1", "nan", "inf"),
    "cooldown_epochs": ("-1", "nan", "inf"),
    "min_sparsity_ratio_per_op": ("-0.1", "0.9", "nan"),
    "max_sparsity_ratio_per_op": ("1", "-0.1", "0.1", "nan"),
    "reg_coeff": ("-1", "0.1", "nan"),
    "pattern": ("4", "0x0", "4:2:1", "axb", "5:4", "-1x4", "channelxchannel"),
    "op_names": ("(", "nowhere", "*"),
    "excluded_op_names": ("(", ".*"),
    "pruning_op_types": ("Nothing",),
    "local_configs": ("{", "3", "[]", '{"pattern":3}', '{"magic":1}', '{"op_names":["nowhere"]}', "null"),
    "projected_length": ("0", "-1", "1000000000000"),
    "max_tokens": ("0", "-1", "1000000000000"),
    "slot_stride": ("0", "-1"),
    "eval_batch_size": ("0", "-1"),
    "latency_batch_sizes": ("0", "-1", "1 0"),
    "int8_bound": ("0", "-0.1", "nan", "inf"),
    "check_examples": ("0", "-1"),
    "latency_repeats": ("0", "-1"),
    "latency_examples": ("0", "-1"),
    "split": ("nothing", "test"),
    "task_name": ("sst3",),
    "data_dir": ("nowhere", "file", "nofiles"),
    "train_file": ("nowhere.csv", "data", "table.xlsx"),
    "validation_file": ("nowhere.csv", "data"),
    "test_file": ("nowhere.csv",),
    "text_column": ("nothing", "label"),
    "text_pair_column": ("nothing",),
    "label_column": ("nothing",),
    "model_name_or_path": ("nowhere", "file", "data", "a/b/c/d", "../x"),
    "tokenizer_name": ("nowhere", "file", "data"),
    "teacher_name_or_path": ("nowhere", "file", "data"),
    "teacher_snapshots": ("nowhere-*", "data", "model file"),
    "models": ("nowhere", "file", "model nowhere"),
    "output_dir": ("file", "file/deeper", "model"),
    "teacher_cache_dir": ("file", "data"),
    "extra_metrics": ("nowhere",),
    "output_file": ("data", "file/deeper.json"),
}
# Values of `TrainingArguments` that would train nothing, or wrongly, or end in an error of a library.
TRAINING = {
    "gradient_accumulation_steps": ("0", "-1", "1.5"),
    "num_train_epochs": ("-1", "nan", "inf"),
    "per_device_train_batch_size": ("0", "-1"),
    "per_device_eval_batch_size": ("0", "-1"),
    "learning_rate": ("-1", "nan", "inf", "fast"),
    "weight_decay": ("-1", "nan"),
    "max_grad_norm": ("nan",),
    "warmup_steps": ("-1", "nan"),
    "label_smoothing_factor": ("-0.5", "1.5", "nan"),
    "adam_beta1": ("-0.1", "1.5"),
    "adam_epsilon": ("-1",),
    "seed": ("-1", "4294967296"),
    "dataloader_num_workers": ("-1",),
    "logging_steps": ("-1", "0"),
    "save_steps": ("-1 --save_strategy steps",),
    "eval_steps": ("-1 --eval_strategy steps",),
    "optim": ("nothing", "adamw_8bit_nothing"),
    "lr_scheduler_type": ("nothing",),
    "save_strategy": ("nothing",),
    "eval_strategy": ("nothing",),
    "logging_strategy": ("nothing",),
    "report_to": ("nothing",),
    "resume_from_checkpoint": ("nowhere", "model", "file"),
    "train_sampling_strategy": ("nothing",),
    "lr_scheduler_kwargs": ("{", "nonsense", "3", '{"nothing":1}'),
    "accelerator_config": ("{", "nowhere.json"),
    "deepspeed": ("nowhere.json",),
    "fsdp": ("nothing",),
    "optim_args": ("nothing",),
    "neftune_noise_alpha": ("nan", "-1"),
    "hub_strategy": ("nothing",),
    "adamw": ("1",),
}
# Settings that contradict each other or change nothing.
CONTRADICTIONS = {
    "finetune": (
        "--train_file data/train.tsv", "--validation_file data/validation.tsv", "--fp16 --bf16", "--bf16 --fp16",
        "--load_best_model_at_end --eval_strategy epoch --save_strategy no",
        "--load_best_model_at_end --eval_strategy no",
        "--load_best_model_at_end --eval_strategy epoch --save_strategy epoch --metric_for_best_model nothing",
        "--max_steps 0 --num_train_epochs -1", "--alpha_output 1", "--dropout 1",
        "--heads_per_layer 1 1", "stray", "--",
    ),
    "distill": (
        "--alpha_task 0 --alpha_output 0", "--alpha_task 0 --max_distill_steps 1", "--compat cald --layer_normalize",
        "--compat cald --layer_map 0 1", "--teacher_dropout --teacher_cache_dir cache",
        "--alpha_layer 1 --mask_padding false --teacher_cache_dir cache", "--compat ltp",
    ),
    "joint-distill": ("--teacher_cache_dir cache", "--label_smoothing_factor 0.1", "--lr_scheduler_type greedy"),
    "snapshot-distill": ("--teacher_cache_dir cache", "--teacher_snapshots model data"),
    "proximal": (
        "--teacher_learning_rate 0 --baselines distillation", "--teacher_learning_rate 0 --prox_mode dual",
        "--teacher_learning_rate 0 --evaluate_teacher", "--alpha_task 1", "--alpha_output 0.5",
        "--teacher_cache_dir cache", "--label_smoothing_factor 0.1", "--max_distill_steps 1", "--compat cald",
        "--text_pair_column nothing --text_column sentence", "--model_name_or_path bilstm --student_layers 1",
        "--model_name_or_path bilstm --max_positions 64", "--model_name_or_path bilstm --layers first",
        "--model_name_or_path bilstm --pair_mode separate", "--model_name_or_path bilstm --bilstm_hidden_size 0",
        "--model_name_or_path bilstm --bilstm_dropout 1", "--model_name_or_path bilstm --tokenizer_name nowhere",
        "--teacher_name_or_path base --teacher_learning_rate 0",
    ),
    "prune-structure": (
        "--prune_heads false --prune_neurons false", "--selection fisher --order sequential",
        "--selection fisher --round_to 2", "--route sketch", "--heads_per_layer 1 1", "--tolerance 0.1",
        "--neurons_per_layer 8 8", "--prune_heads false --mac_ratio 0.2", "--layer_by_layer",
        "--layer_by_layer --order sequential --max_positions 64", "--layer_by_layer --model_name_or_path nowhere",
    ),
    "prune-tokens": (
        "--prune_mode topk --soft_fraction 0.5", "--token_keep_rate 0.5", "--soft_fraction 0 --lambda_threshold 0.1",
        "--score_norm live --score_reference_length 64", "--teacher_name_or_path model --alpha_output 0",
        "--prune_mode topk --target_relative_macs 0.5", "--masking_mode soft", "--token_prune_stage hard",
    ),
    "prune-weights": (
        "--slim", "--pattern 2:4 --target_sparsity 0.9", "--criterion wanda", "--criterion sparsegpt --pattern 4x4",
        "--progressive --pattern mha", "--progressive --pruning_frequency 3", "--reg_type group_lasso",
        "--alpha_layer 1", "--alpha_task 0", "--start_step 9 --end_step 3", "--achieved_sparsity 0.5",
        "--heads_per_layer 1 1", "--start_step 50 --end_step 90", "--temperature 2", "--teacher_cache_dir cache",
        "--calibration_samples 64",
        "--num_train_epochs 0 --max_steps -1 --teacher_name_or_path other",
        "--local_configs {} --op_names (",
    ),
    "quantize": (
        "--static_groups true", "--algorithm rtn --correction dense", "--algorithm rtn --act_order true",
        "--algorithm rtn --true_sequential true", "--algorithm awq", "--op_names nothing", "--excluded_op_names layer",
        "--freeze_embeddings", "--max_eval_samples 4", "--output_dir model", "--learning_rate 0.1", "--op_names (",
        "--dropout 0",
        "--heads_per_layer 1 1", "--layer_by_layer --max_positions 64",
        "--layer_by_layer --model_name_or_path nowhere",
    ),
    "linearize": (
        "--max_length 16", "--freeze_embeddings", "--slot_stride 2", "--initialization normal --slot_stride 2",
        "--max_train_samples 4", "--learning_rate 0.1",
    ),
    "evaluate": ("--models", "--train_file data/train.tsv", "--output_dir out"),
    "report": ("--models", "--latency_batch_sizes", "--output_file x.json"),
    "export": (
        "--format safetensors", "--format torch-export --int8 true", "--format compressed-tensors", "--format tflite",
        "--output_dir model",
    ),
    "push": (
        "--repo_id me/my/model", "--repo_id me/-model", "--repo_id me/my--model", "--repo_id https://hf.co/me/model",
        "--repo_id", "--model_name_or_path nowhere", "--model_name_or_path data", "--report nowhere", "--report data",
        "--report model", "--eval_dataset nyu-mll/glue", "--eval_task sst2", "--output_dir model",
        "--private maybe", "--eval_dataset a/b/c", "--learning_rate 1", "--device cpu", "--teacher t",
    ),
}  # fmt: skip
YAMLS = {
    "number": "1: 2\n", "null": "null: 1\n", "true": "true: 1\n", "empty": "", "words": "just words\n",
    "list": "- seed: 1\n", "broken": "seed: [1, 2\n", "tab": "\tseed: 1\n", "twins": "seed: 1\nseed: 2\n",
    "nothing": "seed:\n", "nested": "seed: {a: 1}\n", "many": "seed: [1, 2]\n", "typo": "sead: 1\n",
    "kind": "learning_rate: fast\n", "no": "eval_strategy: no\n", "blank": "output_dir: ''\n",
    "date": "output_dir: 2020-01-01\n", "code": "seed: !!python/object/apply:os.getpid []\n",
    "dashes": "max-length: 16\n", "binary": "seed: !!binary aGk=\n", "infinite": "learning_rate: .inf\n",
    "anchor": "seed: *nowhere\n", "config": "config: other.yaml\n", "float": "seed: 1.5\n",
}  # fmt: skip


def _wrong_type(option: Option) -> str | None:
    kind = option.kind.removesuffix(" | None")
    if kind.startswith("Literal") or kind == "bool" or "int" in kind or "float" in kind:
        return "nonsense"
    return None


def _ours(name: str) -> Iterator[Option]:
    for group in stage_groups(COMMANDS[name]).values():
        yield from group.options


def _with(name: str, flag: str, value: str) -> str:
    """A good command line with one flag set to something else."""
    words = GOOD[name].split()
    if f"--{flag}" in words:
        start = words.index(f"--{flag}")
        end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[start:end]
    if flag in ("train_file", "validation_file", "test_file", "task_name") and "--data_dir" in words:
        start = words.index("--data_dir")
        del words[start : start + 2]
    return " ".join([*words, f"--{flag}", value])


def typing_errors() -> list[str]:
    """Every flag of ours with a value of the wrong type, with an empty one and with none."""
    lines = []
    for name in COMMANDS:
        for option in _ours(name):
            wrong = _wrong_type(option)
            if wrong is not None:
                lines.append(_with(name, option.name, wrong))
            lines.append(_with(name, option.name, "''"))
            if option.kind != "bool":
                lines.append(_with(name, option.name, "").strip())
            if option.default is REQUIRED and option.name not in COMMANDS[name].defaults:
                lines.append(" ".join(_with(name, option.name, "x").split()[:-2]))
    return lines


def wrong_values() -> list[str]:
    """Every flag that has a range, out of it; each in the first command that has it, the others after those."""
    first, others, seen = [], [], set()
    for name in COMMANDS:
        for option in _ours(name):
            for value in OUT_OF_RANGE.get(option.name, ()):
                if value == "model" and name == "report":
                    # Its files do not replace the model's.
                    continue
                if (name, option.name, value) == ("prune-vocabulary", "output_dir", "model"):
                    # It opens another one, whose folder it must not replace.
                    value = "pieces"
                (others if option.name in seen else first).append(_with(name, option.name, value))
            seen.add(option.name)
    return first + others


def wrong_training() -> list[str]:
    lines = [_with("finetune", flag, value) for flag, values in TRAINING.items() for value in values]
    return [line.replace(" --max_steps 1", "") if "num_train_epochs" in line else line for line in lines]


def contradictions() -> list[str]:
    return [f"{GOOD[name]} {flags}" for name, several in CONTRADICTIONS.items() for flags in several]


def yamls() -> list[str]:
    lines = [_with("finetune", "config", f"yaml/{name}.yaml") for name in YAMLS]
    return [line.replace(" --output_dir out", "") for line in lines] + [
        _with("finetune", "config", value) for value in ("nowhere.yaml", "data", "model/model.safetensors", "")
    ]


def write_place(root: Path) -> None:
    """Models, data and files that the command lines name."""
    write_model(root / "model")
    write_model(root / "other")
    _write_base(root / "base")
    _write_pieces(root / "pieces")
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 90} w{i % 7}\t{i % 2}" for i in range(300)]
    (root / "data").mkdir()
    for split in ("train", "validation"):
        (root / "data" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (root / "nofiles").mkdir()
    (root / "file").write_text("a file, not a folder")
    (root / "table.xlsx").write_text("x")
    (root / "yaml").mkdir()
    for name, content in YAMLS.items():
        (root / "yaml" / f"{name}.yaml").write_text(content)
    _write_bad_data(root / "rows")
    _write_bad_models(root)


def _write_pieces(folder: Path) -> None:
    """A model whose tokenizer has smaller tokens for unknown words."""
    write_model(folder, vocab_size=704)
    wordpiece(folder)


def _write_base(folder: Path) -> None:
    """A pretrained encoder without a head for any task."""
    write_model(folder)
    BertForSequenceClassification.from_pretrained(folder).bert.save_pretrained(folder)


GOOD_ROWS = "".join(f"{'good' if i % 2 else 'bad'} w{i},{i % 2}\n" for i in range(40))
TEXTS = {
    "empty.csv": "", "header.csv": "sentence,label\n", "null_text.csv": f"sentence,label\n{GOOD_ROWS},1\n",
    "null_label.csv": f"sentence,label\n{GOOD_ROWS}good w1,\n",
    "blank.csv": f"sentence,label\n{GOOD_ROWS}'   ',1\n   ,1\n", "ragged.csv": f"sentence,label\n{GOOD_ROWS}a,1,2,3\n",
    "twins.csv": f"sentence,sentence,label\n{GOOD_ROWS}", "nolabel.csv": "sentence\ngood\nbad\n",
    "notext.csv": "label,score\n1,2\n0,3\n", "oneclass.csv": "sentence,label\n" + "good w1,1\n" * 30,
    "nul.csv": f"sentence,label\n{GOOD_ROWS}\0\0\0,1\n", "quote.csv": f'sentence,label\n{GOOD_ROWS}"never closed,1\n',
    "minus.csv": f"sentence,label\n{GOOD_ROWS}good w1,-1\n",
    "infinite.csv": f"sentence,label\n{GOOD_ROWS}good w1,inf\n",
    "mixed.csv": f"sentence,label\n{GOOD_ROWS}good w1,up\n", "broken.json": '{"sentence": "a", "label": 1',
    "scalar.json": "3\n", "list.json": "[1, 2, 3]\n", "words.json": "not json at all\n", "empty.json": "",
    "nulls.jsonl": '{"sentence": null, "label": null}\n' * 9,
    # Lists of ids are several labels for a text; ids and lists of them are neither one nor the other.
    "lists.jsonl": '{"sentence": "a", "label": [[1], 0]}\n{"sentence": "b", "label": [0]}\n',
    "mixed.jsonl": '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": "up"}\n',
    "text_is_number.jsonl": '{"sentence": 3, "label": 1}\n{"sentence": "b", "label": 0}\n',
    "text_is_list.jsonl": '{"sentence": ["a"], "label": 1}\n{"sentence": ["b"], "label": 0}\n',
    "nested.jsonl": '{"sentence": {"a": 1}, "label": 1}\n{"sentence": {"a": 2}, "label": 0}\n',
    "keys.jsonl": '{"sentence": "a", "label": 1}\n{"text": "b", "label": 0}\n',
    "dicts.jsonl": '{"sentence": "a", "label": {"x": true}}\n{"sentence": "b", "label": {"x": false}}\n',
}  # fmt: skip
BYTES = {
    "latin.csv": f"sentence,label\n{GOOD_ROWS}".encode() + b"caf\xe9 \xff,1\n",
    "utf16.csv": f"sentence,label\n{GOOD_ROWS}".encode("utf-16"),
    "rubbish.parquet": b"PAR1 this is not parquet",
    "empty.parquet": b"",
}
FRAMES = {
    "lists.parquet": {"sentence": ["a", "b"] * 20, "label": [[0], [1]] * 20},
    "bytes.parquet": {"sentence": [b"a", b"\xff"] * 20, "label": [0, 1] * 20},
    "nulls.parquet": {"sentence": [None] * 40, "label": [0, 1] * 20},
    "norows.parquet": {"sentence": [], "label": []},
    "nocolumns.parquet": {},
}


def _write_bad_data(folder: Path) -> None:
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    for name, content in BYTES.items():
        (folder / name).write_bytes(content)
    for name, columns in FRAMES.items():
        pandas.DataFrame(columns, index=None if columns else range(9)).to_parquet(folder / name)
    (folder / "folder.csv").mkdir()
    (folder / "cut.parquet").write_bytes((folder / "bytes.parquet").read_bytes()[:-40])


BAD_CONFIGS = {
    "empty": "", "rubbish": "{", "list": "[]", "number": "3", "null": "null",
    "notype": {"model_type": None}, "strange": {"model_type": "nothing"}, "typed": {"model_type": 3},
    "sizes": {"hidden_size": "large"}, "heads": {"num_attention_heads": 3},
    "labels": {"id2label": {"0": "a", "1": "b", "2": "c"}}, "labels_list": {"id2label": [1, 2]},
    "record_text": {"quantization_config": "hf_compress"}, "record_list": {"quantization_config": []},
    "record_steps": {"quantization_config": {"quant_method": "hf_compress", "version": 1, "steps": 3}},
    "record_step": {"quantization_config": {"quant_method": "hf_compress", "version": 1, "steps": ["x"]}},
    "record_method": {"quantization_config": {"quant_method": "hf_compress", "version": 1, "steps": [{"method": []}]}},
    "record_version": {"quantization_config": {"quant_method": "hf_compress", "version": "new", "steps": []}},
    "prune_mode": {"prune_mode": "magic"}, "keep_rate": {"prune_mode": "topk", "token_keep_rate": "half"},
}  # fmt: skip


# Folder -> the file in it that is broken, and what it holds; None: it is gone.
BAD_FILES = {
    "weights_empty": ("model.safetensors", b""), "weights_rubbish": ("model.safetensors", b"\x08" * 400),
    "weights_gone": ("model.safetensors", None), "weights_folder": ("model.safetensors", "folder"),
    "config_gone": ("config.json", None), "config_folder": ("config.json", "folder"),
    "tokenizer_empty": ("tokenizer.json", b""), "tokenizer_rubbish": ("tokenizer.json", b"{"),
    "tokenizer_list": ("tokenizer.json", b"[]"), "tokenizer_config": ("tokenizer_config.json", b"3"),
}  # fmt: skip


def _write_bad_models(root: Path) -> None:
    for name, content in BAD_CONFIGS.items():
        folder = root / f"config_{name}"
        shutil.copytree(root / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        text = content if isinstance(content, str) else json.dumps({**config, **content})
        (folder / "config.json").write_text(text)
    for name, (file, content) in BAD_FILES.items():
        shutil.copytree(root / "model", root / name)
        (root / name / file).unlink()
        if content == "folder":
            (root / name / file).mkdir()
        elif content is not None:
            (root / name / file).write_bytes(content)


def bad_data() -> list[str]:
    files = [*TEXTS, *BYTES, *FRAMES, "folder.csv", "cut.parquet"]
    return [_with("finetune", "train_file", f"rows/{name}") for name in files] + [
        f"evaluate --models model --max_length 16 --validation_file rows/{name}"
        for name in files
        if name != "oneclass.csv"
    ]


def bad_models() -> list[str]:
    names = [*(f"config_{name}" for name in BAD_CONFIGS), *BAD_FILES]
    lines = [_with("evaluate", "models", name) for name in names]
    lines += [_with("prune-structure", "model_name_or_path", name) for name in names]
    return lines + [_with("distill", "teacher_name_or_path", name) for name in names if "tokenizer" not in name]
