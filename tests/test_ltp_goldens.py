"""Token pruning against numbers that the original LTP code produced; our physical removal against its masks."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.token_pruning.importance import (
    keep_above,
    keep_rate_ramp,
    keep_top,
    kept_counts,
    soft_mask,
    threshold_ramp,
    token_importance,
)
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.modeling import thresholds_of


@pytest.fixture
def goldens(shared):
    return shared / "specs" / "golden" / "ltp"


@pytest.mark.parametrize("name", list("ABCD"))
def test_scores_and_masks(goldens, name):
    inputs = np.load(goldens / "part1_scores_masks" / "inputs.npz")
    head = np.load(goldens / "part1_scores_masks" / "head.npz")
    probs, live = torch.tensor(inputs[f"{name}_probs"]), torch.tensor(inputs[f"{name}_live"]).bool()
    initial = torch.tensor(inputs[f"{name}_n0"])
    width = probs.shape[-1]
    scores = token_importance(probs, live, "reference", width)
    np.testing.assert_allclose(scores.numpy(), head[f"{name}_score_mean"], rtol=0, atol=1e-7)
    older = np.load(goldens / "part1_scores_masks" / "working_branch.npz")
    np.testing.assert_allclose(
        token_importance(probs, live, "live").numpy(), older[f"{name}_mean_norm_score"]
        if f"{name}_mean_norm_score" in older else older[f"{name}_working_mean_norm_score"], rtol=0, atol=1e-6,
    )  # fmt: skip
    exact = torch.tensor(head[f"{name}_score_mean"])
    for theta, keep, bare in zip(
        head[f"{name}_abs_theta"], head[f"{name}_abs_keep"], head[f"{name}_abs_returned_bare"], strict=True
    ):
        if bare:
            continue  # a threshold of exactly zero: the original returns its input mask
        ours = keep_above(exact, live, float(theta)).numpy()
        assert (ours[:, 0] == live[:, 0].numpy()).all()
        assert (ours[:, 1:] == keep.astype(bool)[:, 1:]).all()
    for place, theta in enumerate(head[f"{name}_soft_theta"]):
        for row, temperature in enumerate(head[f"{name}_soft_T"]):
            ours = soft_mask(exact.double(), torch.tensor(float(theta)).double(), float(temperature))
            np.testing.assert_allclose(ours.numpy(), head[f"{name}_soft_mask"][row, place], rtol=0, atol=2e-3)
    for key in [key for key in head.files if key.startswith(f"{name}_topk_L12") and key.endswith("_keep")]:
        stem = key.removesuffix("_keep")
        rate = float(stem.rpartition("_r")[2])
        rates, counts, valid = keep_rate_ramp(rate, 12), head[f"{stem}_k"], head[f"{stem}_valid"]
        for layer in range(12):
            if rates[layer] == 1:
                continue
            ours = keep_top(torch.tensor(head[f"{name}_score_sum"]), live, kept_counts(initial, rates[layer]))
            for row in np.flatnonzero(valid[layer]):
                theirs = head[key][layer, row].astype(bool)
                if theirs[0] and counts[layer, row] >= 1:
                    assert (ours[row].numpy() == theirs).all(), (key, layer, row)


def test_ramps_and_counts(goldens):
    folder = goldens / "part1_scores_masks"
    ramps = json.loads((folder / "ramps_macs.json").read_text())["ramps"]
    for key, expected in ramps["base_thresholds"].items():
        layers, final = key.removeprefix("L").split("_final")
        np.testing.assert_allclose(threshold_ramp(float(final), int(layers)), expected, rtol=1e-6, atol=1e-9)
    for key, expected in ramps["keep_rates"].items():
        layers, rate = key.removeprefix("L").split("_r")
        np.testing.assert_allclose(keep_rate_ramp(float(rate), int(layers)), expected, rtol=1e-6)
    table = np.load(folder / "topk_k_table.npz")
    for key in table.files[1:]:
        layers, rate = key.removeprefix("k_L").split("_r")
        rates = keep_rate_ramp(float(rate), int(layers))
        for layer, value in enumerate(rates):
            ours = kept_counts(torch.arange(1, 513), value).numpy()
            assert (ours == np.maximum(1, table[key][:, layer])).all(), (key, layer)


def test_forward_drops_what_the_original_masks(goldens):
    folder, compared = goldens / "part2_forward", 0
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        mode = case["prune_mode"]
        golden = np.load(folder / "cases" / f"{name}.npz")
        if "pad64" in name or mode == "threshold":
            continue  # scores that depend on padding, and the relative mode, are not offered
        model = AutoModelForSequenceClassification.from_pretrained(folder / "models" / case["model"]).eval()
        if mode == "topk":
            config = hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=case["token_keep_rate"])
        else:
            scoring = "mean_norm" if "meannorm" in name else "mean"
            config = hc.TokenPruningConfig(final_token_threshold=0.01 if mode else 0.0, scoring_mode=scoring)
        hc.compress(model, config)
        if mode == "absolute_threshold":
            thresholds_of(model).values.data = torch.tensor(golden["theta"]).float()
        for block in layers_of(model):
            block.module.token_rule.reads_first = False
            if "learned" in name:
                block.module.token_rule.switched_off = False
        state = LiveTokens()
        inputs = {key: torch.tensor(golden[key]).long() for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model.double()(**inputs, forward_state=state).logits.numpy()
        exact = golden["cls_kept_all"].astype(bool)
        keep = torch.stack([state.kept_after(i) for i in range(len(golden["keep"]))]).numpy()
        assert (keep[:, exact] == golden["keep"].astype(bool)[:, exact]).all(), name
        np.testing.assert_allclose(logits[exact], golden["logits64"][exact], rtol=0, atol=1e-10, err_msg=name)
        if exact.all() and "mac" in golden:
            macs, dense = (by_layer.sum() for by_layer in state.macs(layers_of(model)))
            assert float(macs) == golden["mac"].sum()
            assert float(dense) == golden["baseline_mac"].sum()
        compared += int(exact.sum())
    assert compared > 200


@pytest.mark.parametrize("run", ["sink_T1e-3_lr2e-5", "sink_T1e-4_lr2e-5", "sink_T1e-4_lr5e-4"])
def test_soft_and_hard_training(goldens, run):
    """Our forward under the original's regulariser and clipping, with torch's AdamW, step by step."""
    folder = goldens / "part3_training"
    settings = json.loads((folder / "runs.json").read_text())[f"{run}_fp64"]
    golden = np.load(folder / "runs_torch_adamw" / f"{run}_fp64.npz")
    batches = np.load(folder / "batches.npz")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "init_sink").double().train()
    config = hc.TokenPruningConfig(
        final_token_threshold=settings["final_token_threshold"], masking_mode="soft", temperature=settings["T"]
    )
    hc.compress(model, config)
    theta = thresholds_of(model).values
    theta.data = torch.tensor(threshold_ramp(0.008, 4), dtype=torch.float32).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for stage, steps in (("soft", range(10)), ("hard", range(10, 15))):
        model.config.masking_mode = stage
        weights = [p for p in model.parameters() if p is not theta]
        groups = [{"params": weights, "lr": settings["lr"]}, {"params": [theta], "lr": settings["lr_threshold"]}]
        optimizer = torch.optim.AdamW(groups if stage == "soft" else groups[:1], eps=1e-8, weight_decay=0.0)
        total = len(steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)  # noqa: B023
        for place, step in enumerate(steps):
            state = LiveTokens()
            inputs = {key: torch.tensor(batches[key][step]).long() for key in ("input_ids", "attention_mask")}
            out = model(**inputs, labels=torch.tensor(batches["labels"][step]).long(), forward_state=state)
            loss = out.loss
            np.testing.assert_allclose(float(loss.detach()), golden[f"{stage}_loss_task"][place], rtol=0, atol=2e-7)
            if stage == "soft":
                # The original also averages over padding, where the score is zero.
                width, masked = inputs["input_ids"].shape[1], 0.0
                for layer, (mask, inside) in state.soft.items():
                    padding = torch.sigmoid(-theta[layer] / settings["T"]) * (width - inside.sum(1))
                    masked = masked + (((mask * inside).sum(1) + padding) / width).mean()
                np.testing.assert_allclose(float(masked.detach()), golden["soft_reg"][place], rtol=0, atol=2e-7)
                loss = loss + 0.1 * masked
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.zero_grad()
            expected = golden[f"{stage}_theta"][place]
            np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=0, atol=1e-8)
            if stage == "hard":
                keep = torch.stack([state.kept_after(i) for i in range(4)]).numpy()
                assert (keep == golden["hard_keep"][place].astype(bool)).all()
