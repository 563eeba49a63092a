"""`compat="cald"` sets what the published recipe needs, and refuses what contradicts it."""

import pytest
from transformers import TrainingArguments

import hf_compress as hc
from hf_compress.cli import commands
from hf_compress.stages.table import STAGES


PUBLISHED = {
    "layer_reduction": "sum", "layer_normalize": False, "layer_map": None, "mask_padding": False,
    "teacher_dropout": True, "teacher_cache_dir": None, "teacher_schedule": "stretched", "max_grad_norm": 0.0,
}  # fmt: skip
KINDS = (hc.DistillationArguments, hc.JointTeacherArguments)


@pytest.mark.parametrize("kind", KINDS)
def test_it_sets_everything_by_itself(kind, tmp_path):
    args = kind(str(tmp_path), compat="cald", use_cpu=True, weight_decay=0.1, warmup_steps=3)
    fields = [name for name in PUBLISHED if hasattr(args, name)]
    assert {name: getattr(args, name) for name in fields} == {name: PUBLISHED[name] for name in fields}
    assert (args.weight_decay, args.warmup_steps) == (0.1, 3)
    for name in fields:
        assert f"`{name}" in hc.DistillationArguments.__doc__
    # What was set is accepted when it is checked again, as a search does, and when it is given.
    args.check()
    kind(str(tmp_path), compat="cald", use_cpu=True, **{name: PUBLISHED[name] for name in fields})


@pytest.mark.parametrize(("name", "value"), [
    ("max_grad_norm", 0.5), ("layer_normalize", True), ("layer_map", [0, 1]), ("teacher_cache_dir", "cache"),
])  # fmt: skip
def test_it_refuses_contradictions(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be left out or .* with compat='cald'"):
        hc.DistillationArguments(str(tmp_path), compat="cald", use_cpu=True, **{name: value})


def test_without_it_nothing_is_set(tmp_path):
    args = hc.JointTeacherArguments(str(tmp_path), use_cpu=True)
    assert (args.max_grad_norm, args.teacher_schedule, args.layer_reduction) == (1.0, "own", "mean")
    assert TrainingArguments(str(tmp_path), use_cpu=True).max_grad_norm == 1.0


@pytest.mark.parametrize(("extra", "decay", "sampling"), [
    ("", 0.01, "group_by_length"), ("--compat cald", 0.0, "random"),
    ("--compat cald --weight_decay 0.01 --train_sampling_strategy group_by_length", 0.01, "group_by_length"),
])  # fmt: skip
def test_the_command_takes_the_published_constants_where_they_are_left_out(monkeypatch, extra, decay, sampling):
    seen = []
    monkeypatch.setattr(commands, "run_stage", lambda stage, arguments: seen.append(arguments.distillation) or {})
    line = f"--model_name_or_path a --teacher_name_or_path b --data_dir d --output_dir out --use_cpu {extra}"
    commands.run(STAGES["joint_distill"], line.split())
    assert (seen[0].weight_decay, seen[0].train_sampling_strategy) == (decay, sampling)
    assert seen[0].teacher_schedule == ("stretched" if "compat" in extra else "own")
