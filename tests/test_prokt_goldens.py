"""ProximalTrainer against trajectories of the published code, whose loop ran whole on tiny models.

`tests/data/prokt` holds what the default tests need; where the full records lie beside a checkout, all are compared.
Weights of key biases are left out: their true gradient is zero, and Adam amplifies its rounding.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import hf_compress as hc


DATA = Path(__file__).parent / "data" / "prokt"
RUNS = json.loads((DATA / "runs.json").read_text())

# With the published AdamW and its order inside a window.
PUBLISHED = [
    "lam0_k1", "lam0.4_k1", "lam0.4_k1_nozero", "lam0.4_k1_wd_warmup_clip", "frozen_teacher_k1", "lam0_k2",
    "lam0.4_k2",
]  # fmt: skip
# The original's loop with torch's AdamW: what is ours by default.
MODERN = ["lam0.4_k1_torchadamw", "lam0.4_k1_nozero_torchadamw_fp32"]


def columns(archive, index):
    names = [name.removeprefix("batch/") for name in archive if name.startswith("batch/")]
    return {name: torch.tensor(archive[f"batch/{name}"][index].astype(np.int64)) for name in names}


def start(role, dtype):
    return AutoModelForSequenceClassification.from_pretrained(DATA / f"{role}_init").to(dtype)


def replayed(folder, run, archive, dtype=torch.float64, student=None, read=columns, **options):
    """Train both models on the recorded micro-batches; what each micro-batch gave is kept in `seen`."""
    meta = RUNS[run]
    batches = [read(archive, index) for index in range(len(archive["batch/labels"]))]
    seen = {"output": [], "student_norms": [], "targets": []}

    class Replaying(hc.ProximalTrainer):
        def get_train_dataloader(self):
            return DataLoader(batches, batch_size=None, shuffle=False)

        def loss_terms(self, model, inputs):
            terms, outputs = super().loss_terms(model, inputs)
            seen["output"].append(float(terms["output"].detach()))
            return terms, outputs

    args = hc.ProximalArguments(
        str(folder), num_train_epochs=meta["num_train_epochs"], per_device_train_batch_size=1,
        gradient_accumulation_steps=meta["gradient_accumulation_steps"], learning_rate=meta["learning_rate"],
        teacher_learning_rate=meta["learning_rate_of_teacher"] if meta["train_teacher"] else 0.0,
        weight_decay=meta["weight_decay"], warmup_steps=meta["warmup_steps"], max_grad_norm=meta["max_grad_norm"],
        proximal_weight=meta["move_back_weight"], zero_init_heads=meta["init_classifier_to_zero"], adam_epsilon=1e-8,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, save_teacher=False,
        remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Replaying(
        start("student", dtype) if student is None else student, start("teacher", dtype), args,
        train_dataset=[{"input_ids": [0]}] * len(batches),
    )  # fmt: skip
    note = trainer.losses.note_each

    def noted(values):
        for name, several in values.items():
            seen.setdefault(name, []).extend(several.tolist())
        note(values)

    trainer.losses.note_each = noted
    trainer.train()
    seen["logs"] = {
        name: [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]
        for name in ("grad_norm", "learning_rate", "teacher_learning_rate")
    }
    return trainer, seen


def answers(model, archive, read=lambda inputs: inputs):
    names = [entry.removeprefix("eval/") for entry in archive if entry.startswith("eval/")]
    inputs = {
        entry: torch.tensor(archive[f"eval/{entry}"].astype(np.int64)) for entry in names
        if "logits" not in entry and entry != "labels"
    }  # fmt: skip
    model.eval()
    with torch.no_grad():
        return model(**read(inputs)).logits.numpy()


def largest(found, expected):
    """The largest difference between the weights of both models and those of an archive."""
    found = {
        f"final/{role}/{name}": value for role, model in found.items() for name, value in model.state_dict().items()
    }
    expected = {
        ours(name): value
        for name, value in expected.items()
        if name.startswith("final/") and "/bilstm.pooler" not in name
    }
    if not any("pair_projection" in name for name in found):
        # The original has the map of pairs for single texts, too, and never uses it.
        expected = {name: value for name, value in expected.items() if "pair_projection" not in name}
    assert expected.keys() <= found.keys()
    return max(
        float(np.abs(found[name].numpy() - value).max()) for name, value in expected.items() if "key.bias" not in name
    )


def compare(trainer, seen, archive, meta, tolerance, views=None):
    """Losses, learning rates, norms, and what both say in the end, against the record of a run."""
    near, size = {"rtol": 0, "atol": tolerance}, meta["gradient_accumulation_steps"]
    np.testing.assert_allclose(np.array(seen["output"]) / size, archive["s_loss"], **near)
    if meta["train_teacher"]:
        np.testing.assert_allclose(np.array(seen["loss/teacher"]) / size, archive["t_loss"], **near)
        np.testing.assert_allclose(seen["loss/teacher_task"], archive["t_ce"], **near)
        if meta["move_back_weight"]:
            np.testing.assert_allclose(seen["loss/proximal"], archive["t_kld"], **near)
        # Logged after the step: the rate of the next one.
        np.testing.assert_allclose(
            seen["logs"]["teacher_learning_rate"], [*archive["lr_t"][1:], 0.0], rtol=0, atol=1e-12
        )
    # Releases of transformers differ in whether they log the rate before or after the schedule's step.
    rates = seen["logs"]["learning_rate"]
    expected = archive["lr_s"] if rates[-1] else [*archive["lr_s"][1:], 0.0]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(seen["logs"]["grad_norm"], archive["gn_s"], rtol=0, atol=10 * tolerance)
    for role, model in both(trainer).items():
        found = answers(model, archive, (views or {}).get(role, lambda inputs: inputs))
        np.testing.assert_allclose(found, archive[f"eval/{role}_logits"], **near, err_msg=role)


def both(trainer):
    return {"student": trainer.model, "teacher": trainer.teacher_model}


@pytest.mark.parametrize("run", [
    pytest.param(run, marks=[pytest.mark.slow] * (run in ("lam0_k2", "lam0.4_k1_nozero"))) for run in PUBLISHED
])  # fmt: skip
def test_the_published_arithmetic(tmp_path, run):
    archive = dict(np.load(DATA / "runs" / f"{run}.npz"))
    trainer, seen = replayed(tmp_path, run, archive, compat="prokt")
    compare(trainer, seen, archive, RUNS[run], 1e-9)
    if "final/teacher/classifier.bias" in archive:
        # Kept in single precision.
        assert largest(both(trainer), archive) < 3e-7


@pytest.mark.parametrize("run", MODERN)
def test_the_method_with_the_optimizer_of_torch(tmp_path, run):
    archive, (run, single, _) = dict(np.load(DATA / "runs" / f"{run}.npz")), run.partition("_fp32")
    dtype, tolerance = (torch.float32, 1e-5) if single else (torch.float64, 1e-9)
    trainer, seen = replayed(tmp_path, run, archive, dtype)
    compare(trainer, seen, archive, RUNS[run], tolerance)
    assert single or largest(both(trainer), archive) < 3e-7


def test_accumulated_micro_batches_are_the_large_batch(tmp_path):
    """The published code mixes two teachers inside a window; ours gives what its run without accumulation gave."""
    small = dict(np.load(DATA / "runs" / "lam0.4_k2.npz"))
    large = dict(np.load(DATA / "runs" / "lam0.4_k1_torchadamw.npz"))
    trainer, seen = replayed(tmp_path, "lam0.4_k2", small)
    for name, key in (("output", "s_loss"), ("loss/teacher", "t_loss"), ("loss/proximal", "t_kld")):
        np.testing.assert_allclose(np.array(seen[name]).reshape(12, 2).mean(1), large[key], rtol=0, atol=1e-9)
    np.testing.assert_allclose(seen["logs"]["grad_norm"], large["gn_s"], rtol=0, atol=1e-8)
    for role, model in both(trainer).items():
        np.testing.assert_allclose(answers(model, large), large[f"eval/{role}_logits"], rtol=0, atol=1e-9)
    assert largest(both(trainer), large) < 3e-7


@pytest.mark.parametrize("run", ["lam0.4_k2", pytest.param("lam0.4_k1_torchadamw", marks=pytest.mark.slow)])
def test_single_precision(tmp_path, run):
    archive = dict(np.load(DATA / "runs" / f"{run}_fp32.npz"))
    compat = None if "torch" in run else "prokt"
    trainer, seen = replayed(tmp_path, run, archive, torch.float32, compat=compat)
    compare(trainer, seen, archive, RUNS[run], 1e-5)


def test_windows_that_end_with_an_epoch_are_needed_for_the_published_arithmetic(tmp_path):
    """There the gradients of a leftover micro-batch leak into the next epoch."""
    run = "lam0.4_k2_leftover_2epochs"
    archive = dict(np.load(DATA / "runs" / f"{run}.npz"))
    archive = {name: value[:7] for name, value in archive.items() if name.startswith("batch/")}
    with pytest.raises(ValueError, match="gradient_accumulation_steps must divide the 7 batches"):
        replayed(tmp_path, run, archive, compat="prokt")


def ours(name):
    """The name that a weight of the original's BiLSTM has here."""
    name = name.replace("bilstm.encoder.", "bilstm.layers.0.")
    return name.replace("dense_map_for_sentence_pair", "pair_projection")


def lstm(dtype, pair):
    model = hc.BiLSTMForSequenceClassification(hc.BiLSTMConfig(
        vocab_size=60, embedding_size=20, hidden_size=16, dropout=0.0, num_labels=3, mask_padding=False,
        pair_mode="separate" if pair else "joint",
    ))  # fmt: skip
    state = {ours(name): value for name, value in load_file(DATA / "bilstm_init.safetensors").items()}
    # The original makes a pooler that it does not use, and the map of pairs for single texts, too.
    model.load_state_dict({
        name: value for name, value in state.items()
        if not name.startswith("bilstm.pooler") and (pair or not name.startswith("pair_projection"))
    })  # fmt: skip
    return model.to(dtype)


def first_and_second(inputs):
    """The student's view of a pair [B, 3, L]: both texts alone; their third view is the teacher's."""
    names = ("input_ids", "attention_mask")
    return {f"{place}{name}": inputs[name][:, row] for row, place in enumerate(("", "second_")) for name in names}


def together(inputs):
    return {name: value[:, -1] for name, value in inputs.items()}


def pair_columns(archive, index):
    batch = columns(archive, index)
    labels = batch.pop("labels")
    teacher = {f"teacher_{name}": value for name, value in together(batch).items()}
    return {**first_and_second(batch), **teacher, "labels": labels}


BILSTM = {
    "bilstm_pair_lam0.3": pair_columns, "bilstm_pair_lam0": pair_columns, "bilstm_single_lam0.3": columns,
}  # fmt: skip


@pytest.mark.parametrize(("run", "dtype"), [
    *((run, torch.float64) for run in BILSTM), ("bilstm_pair_lam0.3", torch.float32),
])  # fmt: skip
def test_bilstm_students(tmp_path, run, dtype):
    double, pair = dtype == torch.float64, "pair" in run
    archive = dict(np.load(DATA / "runs" / f"{run}{'' if double else '_fp32'}.npz"))
    trainer, seen = replayed(
        tmp_path, run, archive, dtype, lstm(dtype, pair), BILSTM[run], compat="prokt"
    )  # fmt: skip
    views = {"student": first_and_second, "teacher": together} if pair else None
    compare(trainer, seen, archive, RUNS[run], 1e-9 if double else 1e-5, views)
    if "final/teacher/classifier.bias" in archive:
        assert largest(both(trainer), archive) < 3e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("run", [
    *PUBLISHED, "lam0.4_k1_torchadamw", "lam0.4_k1_nozero_torchadamw", *BILSTM,
])  # fmt: skip
def test_full_records(tmp_path, shared, run, dtype):
    """All weights in the end, in the precision in which they were recorded."""
    folder = shared / "specs" / "golden" / "prokt" / ("bilstm" if run in BILSTM else "runs")
    file, pair = folder / f"{run}_{dtype}.npz", "pair" in run
    if not file.exists():
        pytest.skip(f"no {file.name}")
    archive, single = dict(np.load(file)), dtype == "fp32"
    kind = torch.float32 if single else torch.float64
    trainer, seen = replayed(
        tmp_path, run, archive, kind, lstm(kind, pair) if run in BILSTM else None, BILSTM.get(run, columns),
        compat=None if "torch" in run else "prokt",
    )  # fmt: skip
    views = {"student": first_and_second, "teacher": together} if pair else None
    compare(trainer, seen, archive, RUNS[run], 1e-5 if single else 1e-9, views)
    if "final/teacher/classifier.bias" in archive:
        difference = largest(both(trainer), archive)
        print(f"{run} {dtype}: weights differ by at most {difference:.1e}")
        assert difference < (1e-5 if single else 1e-9)
