"""The published recipe of learned token pruning, `compat="ltp"`, against numbers that the original code produced."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

import hf_compress as hc
from hf_compress.core.architectures import layers_of
from hf_compress.methods.token_pruning.live_tokens import LiveTokens
from hf_compress.methods.token_pruning.modeling import thresholds_of


INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def goldens(shared):
    return shared / "specs" / "golden" / "ltp"


def open_double(folder, **fields):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64, **fields).eval()


def seen_by(model, archive, prefix=""):
    """Logits, live tokens after each layer [L, B, S], and multiply-accumulates of a batch."""
    state, inputs = LiveTokens(), {name: torch.tensor(archive[prefix + name]).long() for name in INPUTS}
    with torch.no_grad():
        logits = model(**inputs, forward_state=state).logits.numpy()
    blocks = layers_of(model)
    macs = sum(float(layer.sum()) for layer in state.macs(blocks)[:1])
    return logits, torch.stack([state.kept_after(block.index) for block in blocks]).numpy(), macs


def cases(goldens):
    for name, case in json.loads((goldens / "part2_forward" / "cases.json").read_text()).items():
        # The relative mode is not offered.
        if case["prune_mode"] != "threshold":
            yield name, case, np.load(goldens / "part2_forward" / "cases" / f"{name}.npz")


def test_forward_passes_agree_also_where_the_first_token_goes(goldens):
    compared = dropped = 0
    for name, case, golden in cases(goldens):
        model = open_double(goldens / "part2_forward" / "models" / case["model"])
        # The original divides by the padded length.
        config = {"compat": "ltp", "score_reference_length": golden["input_ids"].shape[1]}
        if case["prune_mode"] == "topk":
            config.update(prune_mode="topk", token_keep_rate=case["token_keep_rate"])
        else:
            config.update(final_token_threshold=0.01 if case["prune_mode"] else 0.0)
            if "meannorm" in name:
                config.update(scoring_mode="mean_norm")
        hc.compress(model, hc.TokenPruningConfig(**config))
        if case["prune_mode"] == "absolute_threshold":
            thresholds_of(model).values.data = torch.tensor(golden["theta"]).double()
        if "learned" in name:
            # Thresholds by hand, with one in the layer that starts at zero and is left alone.
            layers_of(model)[0].module.token_rule.switched_off = False
        logits, keep, macs = seen_by(model, golden)
        assert np.array_equal(keep, golden["keep"].astype(bool)), name
        np.testing.assert_allclose(logits, golden["logits64"], rtol=0, atol=1e-12, err_msg=name)
        if "mac" in golden:
            assert macs == golden["mac"].sum(), name
        compared += len(logits)
        dropped += int((~golden["cls_kept_all"].astype(bool)).sum())
    assert compared > 350
    assert dropped > 50


class OriginalAdamW(torch.optim.Optimizer):
    """AdamW of transformers 4.5: epsilon is added before the bias is corrected."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
                state["step"] += 1
                (one, two), step = group["betas"], state["step"]
                state["first"].mul_(one).add_(parameter.grad, alpha=1 - one)
                state["second"].mul_(two).addcmul_(parameter.grad, parameter.grad, value=1 - two)
                rate = group["lr"] * (1 - two**step) ** 0.5 / (1 - one**step)
                parameter.addcdiv_(state["first"], state["second"].sqrt().add_(group["eps"]), value=-rate)


class Watch(TrainerCallback):
    """Notes the thresholds after every update."""

    def __init__(self):
        self.thresholds = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # After the step, before gradients are cleared.
        self.thresholds.append(thresholds_of(model).values.detach().clone().numpy())


def train(model, rows, folder, settings, callbacks, **options):
    watch = Watch()
    args = hc.DistillationArguments(
        str(folder), per_device_train_batch_size=6, num_train_epochs=1, learning_rate=settings["lr"],
        lr_scheduler_type="linear", train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, alpha_output=0.0,
    )  # fmt: skip
    trainer = hc.DistillationTrainer(model, args=args, train_dataset=rows, callbacks=[*callbacks, watch], **options)
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss/task" in entry]
    return {name: [e.get(name) for e in logged] for name in ("loss/task", "loss/threshold", "grad_norm")}, watch


RUNS = [
    *((f"runs_torch_adamw/sink_{name}", None) for name in ("T1e-3_lr2e-5", "T1e-4_lr2e-5", "T1e-4_lr5e-4")),
    *((f"runs/sink_{name}", OriginalAdamW) for name in ("T1e-3_lr2e-5", "T1e-4_lr2e-5", "T1e-4_lr5e-4")),
    *((f"runs/nosink_{name}", OriginalAdamW) for name in ("T1e-3_lr2e-5", "T1e-4_lr2e-5")),
]


@pytest.mark.parametrize(("run", "optimizer"), RUNS)
def test_soft_and_hard_training(goldens, tmp_path, run, optimizer):
    """Our trainer, the model's own settings, nothing else; the saved soft model is what the hard stage opens."""
    folder, name = goldens / "part3_training", run.partition("/")[2]
    settings = json.loads((folder / "runs.json").read_text())[f"{name}_fp64"]
    golden = np.load(folder / f"{run}_fp64.npz")
    batches = dict(np.load(folder / "batches.npz"))
    count = batches["labels"].shape[1]
    rows = [
        {**{key: torch.tensor(batches[key][i // count, i % count]).long() for key in INPUTS},
         "labels": int(batches["labels"][i // count, i % count])}
        for i in range(15 * count)
    ]  # fmt: skip
    options = {} if optimizer is None else {"optimizer_cls_and_kwargs": (optimizer, {"lr": settings["lr"]})}
    # The recorded runs start from thresholds in single precision.
    near, exact = {"rtol": 0, "atol": 2e-6}, {"rtol": 0, "atol": 1e-9}
    model = open_double(folder / settings["init"])
    hc.compress(model, hc.TokenPruningConfig(
        final_token_threshold=settings["final_token_threshold"], temperature=settings["T"], masking_mode="soft",
        compat="ltp",
    ))  # fmt: skip
    rate = settings["lr_threshold"] if settings["lr_threshold"] != settings["lr"] else None
    steering = hc.ThresholdAnnealingCallback(lambda_threshold=settings["lambda_"], learning_rate=rate)
    for stage, part in (("soft", rows[: 10 * count]), ("hard", rows[10 * count :])):
        if stage == "hard":
            model = open_double(tmp_path / "soft", masking_mode="hard")
            assert thresholds_of(model).values.dtype == torch.float64
        callbacks = [steering] if stage == "soft" else []
        logged, watch = train(model, part, tmp_path / stage, settings, callbacks, **options)
        np.testing.assert_allclose(logged["loss/task"], golden[f"{stage}_loss_task"], **near)
        np.testing.assert_allclose(logged["grad_norm"], golden[f"{stage}_grad_norm"], rtol=1e-7)
        np.testing.assert_allclose(watch.thresholds, golden[f"{stage}_theta"], **exact)
        if stage == "soft":
            np.testing.assert_allclose(logged["loss/threshold"], settings["lambda_"] * golden["soft_reg"], **near)
        logits, keep, macs = seen_by(model.eval(), batches, "eval_")
        np.testing.assert_allclose(logits, golden[f"{stage}_eval_logits"], rtol=0, atol=1e-7)
        assert np.array_equal(keep, golden[f"{stage}_eval_keep"].astype(bool))
        assert macs == golden[f"{stage}_eval_mac"].sum()
        if optimizer is None:
            continue
        weights, state = load_file(folder / "weights" / f"{name}_fp64_{stage}.safetensors"), model.state_dict()
        assert len(weights) > 60
        for key, value in weights.items():
            # Keys' biases have no true gradient: Adam makes steps of their rounding.
            if not key.endswith("key.bias"):
                np.testing.assert_allclose(state[key].numpy(), value, rtol=0, atol=1e-6, err_msg=key)
