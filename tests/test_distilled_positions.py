"""Which positions of a text generator are distilled: those where its own loss reads a label."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import hf_compress as hc
from hf_compress.training.output_terms import predicts_next_token


def language_model(kind, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=19, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1,
                                         eos_token_id=2, initializer_range=0.5)  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=32, initializer_range=0.5)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.5)).eval()
    config = transformers.T5Config(vocab_size=19, d_model=16, num_layers=1, num_heads=2, d_ff=32, d_kv=8,
                                   decoder_start_token_id=0, pad_token_id=0, initializer_factor=3.0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def batch_of():
    """Three texts: a prompt and an answer, whose labels alone count; the last has padding."""
    ids = torch.randint(3, 19, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    labels = ids.clone()
    labels[0, :3] = labels[1, :6] = labels[2, :2] = labels[2, 6:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer_of(folder, student, teacher, **options):
    args = hc.DistillationArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2, dataloader_pin_memory=False,
        per_device_train_batch_size=3, save_strategy="no", **options,
    )  # fmt: skip
    rows = [{name: value[i] for name, value in batch_of().items()} for i in range(3)]
    return hc.DistillationTrainer(student, teacher, args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("labelled", [True, False])
def test_distillation_against_a_loop(tmp_path, kind, labelled):
    student, teacher = language_model(kind, 0), language_model(kind, 1)
    batch = batch_of()
    if kind == "t5":
        batch["decoder_input_ids"] = batch["labels"].where(batch["labels"] > 0, torch.tensor(0)).roll(1, 1)
        batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    theirs, ours = (model(**inputs).logits.detach().double() for model in (teacher, student))
    rows = []
    for row in range(3):
        found = []
        for place in range(8):
            if labelled and kind in ("gpt2", "llama"):
                counts = place + 1 < 8 and batch["labels"][row, place + 1] != -100
            elif labelled:
                counts = batch["labels"][row, place] != -100
            else:
                counts = (kind == "t5") or batch["attention_mask"][row, place] == 1
            if counts:
                p, q = (torch.log_softmax(logits[row, place] / 2.0, -1) for logits in (theirs, ours))
                found.append(4 * float((p.exp() * (p - q)).sum()))
        rows.append(found)
    trainer = trainer_of(tmp_path, copy.deepcopy(student), teacher, alpha_task=0.0)
    seen = trainer.compute_loss(trainer.model.eval(), batch if labelled else inputs)
    if kind in ("gpt2", "llama"):
        # Each predicted token counts alike.
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    else:
        expected = sum(sum(found) / len(found) for found in rows) / 3
    assert float(seen.detach()) == pytest.approx(expected, rel=1e-5)


def test_which_models_predict_the_next_token():
    assert [predicts_next_token(language_model(kind, 0)) for kind in ("gpt2", "llama", "bert", "t5")] == [
        True, True, False, False]  # fmt: skip
