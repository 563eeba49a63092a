"""What the tests of guided training share: tiny students and teachers, and trainers on thirty rows."""

import torch
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

import hf_compress as hc
from tests.crash_program import Rows, pad


ROWS = [Rows()[index] for index in range(30)]

KINDS = {
    "fixed": (hc.DistillationTrainer, hc.DistillationArguments),
    "joint": (hc.JointTeacherTrainer, hc.JointTeacherArguments),
    "snapshots": (hc.SnapshotTeacherTrainer, hc.SnapshotTeacherArguments),
    "proximal": (hc.ProximalTrainer, hc.ProximalArguments),
}


def dense(seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.2,
             "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**sizes, **options}))


def linear(seed=0, dropout=0.0, share="none"):
    return hc.compress(dense(seed, dropout), hc.LinformerConfig(projected_length=4, share=share, seed=seed))


class Watch(TrainerCallback):
    """Calls a function after each update; before the checkpoint is written."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look(state.global_step)


def trainer_of(kind, folder, student, teacher=None, look=None, ordered=False, init=None, rows=ROWS, collator=pad,
               **options):  # fmt: skip
    """8, 8, 8 and 6 rows an epoch; three epochs; accumulation 3 makes groups of 3 and 1, so six updates."""
    trainer_class, arguments_class = KINDS[kind]

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True,
                "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "alpha_output": 0.0,
                "alpha_layer": 1.0, "gradient_accumulation_steps": 3, "dataloader_pin_memory": False,
                "seed": 3}  # fmt: skip
    if kind in ("joint", "proximal"):
        defaults |= {"save_teacher": False, "teacher_learning_rate": 3e-3}
    if kind == "proximal":
        defaults |= {"alpha_output": 1.0, "alpha_layer": 0.0}
    args = arguments_class(str(folder), **{**defaults, **options})
    given = {} if teacher is None else {"teacher_model": teacher}
    return (InOrder if ordered else trainer_class)(
        model=student, model_init=init, args=args, train_dataset=rows, eval_dataset=rows[:8],
        data_collator=collator,
        callbacks=[Watch(look)] if look else [], **given,
    )  # fmt: skip


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def trained(*args, **kwargs):
    trainer = trainer_of(*args, **kwargs)
    trainer.train()
    return weights(trainer.model)


def logged(trainer, name):
    """Update -> value, for the updates whose log names it."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
