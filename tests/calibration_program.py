"""What each of several processes runs that compress one model together, and one process runs alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_compress as hc
from hf_compress.cli.main import main
from hf_compress.core.examples import batches_of
from tests.two_processes import become_rank


_SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
# More than any float32 activation survives: a batch with this id has no finite activations.
FATAL = 98


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**_SIZES)).eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[FATAL] = 3e38
    return model


def albert() -> AlbertForSequenceClassification:
    """Layers that share their modules: they cannot be walked one by one."""
    torch.manual_seed(0)
    return AlbertForSequenceClassification(AlbertConfig(**_SIZES, embedding_size=16)).eval()


def rows(count: int = 58, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(3, FATAL, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "label": index % 2} for index, row in enumerate(ids)]


def batches(count: int = 58) -> list[dict[str, torch.Tensor]]:
    """Eight rows each; the last one is smaller."""
    return list(batches_of(rows(count), BertConfig(**_SIZES)))


def _collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return dict(next(batches_of(iter(part), BertConfig(**_SIZES))))


def loader(**settings: Any) -> DataLoader:
    return DataLoader(rows(), batch_size=8, collate_fn=_collate, **settings)


class Stream(torch.utils.data.IterableDataset):
    """Rows of one length, so that accelerate can join batches."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({"input_ids": row["input_ids"][:4], "label": row["label"]} for row in rows())


def short() -> list[dict[str, torch.Tensor]]:
    return [_collate(list(Stream())[start : start + 8]) for start in range(0, 58, 8)]


def _prepared(data: DataLoader, **settings: Any) -> Any:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings)).prepare(data)


def _sampled() -> DataLoader:
    return loader(sampler=DistributedSampler(rows(), shuffle=False))


_STRUCTURED = hc.StructuredPruningConfig
_WEIGHTS = hc.WeightPruningConfig
# Name -> model, steps, data in one process, data in several (None: the same).
CASES: dict[str, tuple[Callable, list, Callable, Callable | None]] = {
    **{
        f"{selection} {order}{' centred' if center else ''}{'' if correction else ' uncorrected'} {allocation}": (
            bert,
            [_STRUCTURED(
                mac_ratio=0.6, selection=selection, order=order, center=center, correction=correction,
                allocation=allocation,
            )],
            batches,
            None,
        )
        for selection, order, center, correction, allocation in [
            ("interpolative", "one_shot", False, True, "tolerance"),
            ("interpolative", "one_shot", True, True, "uniform"),
            ("interpolative", "sequential", False, True, "tolerance"),
            ("interpolative", "sequential", True, True, "tolerance"),
            ("interpolative", "one_shot", False, False, "tolerance"),
            ("magnitude", "one_shot", False, True, "uniform"),
            ("magnitude", "sequential", False, True, "uniform"),
            ("random", "one_shot", False, True, "tolerance"),
            ("random", "sequential", False, True, "tolerance"),
            ("fisher", "one_shot", False, True, "tolerance"),
            ("fisher", "one_shot", False, False, "tolerance"),
        ]
    },
    **{
        criterion: (bert, [_WEIGHTS(pattern="1x1", target_sparsity=0.5, criterion=criterion)], batches, None)
        for criterion in ("gradient", "snip", "snip_momentum", "wanda")
    },
    "sparsegpt": (bert, [_WEIGHTS(pattern="2:4", target_sparsity=0.5, criterion="sparsegpt", scope="local")], batches,
                  None),
    "sparsegpt of shared layers": (
        albert, [_WEIGHTS(pattern="2:4", target_sparsity=0.5, criterion="sparsegpt", scope="local")], batches, None
    ),
    "two steps": (
        bert, [_STRUCTURED(mac_ratio=0.6), _WEIGHTS(pattern="1x1", target_sparsity=0.5, criterion="wanda")], batches,
        None,
    ),
    "rows": (bert, [_STRUCTURED(mac_ratio=0.6)], rows, None),
    "generator": (bert, [_STRUCTURED(mac_ratio=0.6)], lambda: iter(batches()), None),
    "generator of rows with labels": (
        bert, [_WEIGHTS(pattern="1x1", target_sparsity=0.5, criterion="snip_momentum")], lambda: iter(rows()), None
    ),
    "loader": (bert, [_STRUCTURED(mac_ratio=0.6)], loader, None),
    "fewer batches than processes": (
        bert, [_STRUCTURED(mac_ratio=0.6, order="sequential", ridge=1e-3)], lambda: batches(8), None
    ),
    "fewer batches than processes, fisher": (
        bert, [_STRUCTURED(mac_ratio=0.6, selection="fisher")], lambda: batches(8), None
    ),
    "fewer batches than processes, sparsegpt": (
        albert, [_WEIGHTS(pattern="2:4", target_sparsity=0.5, criterion="sparsegpt", scope="local")],
        lambda: batches(8), None,
    ),
    "fewer batches than processes, momentum": (
        bert, [_WEIGHTS(pattern="1x1", target_sparsity=0.5, criterion="snip_momentum")], lambda: batches(8), None
    ),
    "prepared": (bert, [_STRUCTURED(mac_ratio=0.6)], batches, lambda: _prepared(loader())),
    "prepared, two passes": (
        bert, [_WEIGHTS(pattern="2:4", target_sparsity=0.5, criterion="sparsegpt", scope="local")], batches,
        lambda: _prepared(loader()),
    ),
    "prepared, uneven": (
        bert, [_STRUCTURED(mac_ratio=0.6)], batches, lambda: _prepared(loader(), even_batches=False)
    ),
    "dispatched": (
        bert, [_STRUCTURED(mac_ratio=0.6)], short,
        lambda: _prepared(DataLoader(Stream(), batch_size=8, collate_fn=_collate), dispatch_batches=True),
    ),
    "distributed sampler": (bert, [_STRUCTURED(mac_ratio=0.6)], batches, _sampled),
}  # fmt: skip


def compressed(name: str, several: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    build, steps, alone, shared = CASES[name]
    model = hc.compress(build(), *steps, data=(shared if several and shared else alone)())
    return model.state_dict(), hc.steps_of(model)


def _differently_shuffled(rank: int) -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(rank))


def _with_fatal_batch(rank: int) -> Any:
    data = batches()
    data[1]["input_ids"][0, 0] = FATAL
    return data


def _broken_on_one(rank: int) -> Iterator[Any]:
    for number, batch in enumerate(batches()):
        if rank == 1 and number == 4:
            raise KeyError("no such row")
        yield batch


def _killed_on_one(rank: int) -> Iterator[Any]:
    for number, batch in enumerate(batches()):
        if rank == 1 and number == 4:
            os._exit(7)
        yield batch


# Name -> rank -> data with which no process may go on.
BAD: dict[str, Callable[[int], Any]] = {
    "shuffled apart": _differently_shuffled,
    "fatal batch": _with_fatal_batch,
    "broken stream": _broken_on_one,
    "nothing": lambda rank: [],
    "missing on one": lambda rank: None if rank else batches(),
    "split by hand": lambda rank: batches()[rank::2],
    "split stream": lambda rank: _prepared(
        DataLoader(Stream(), batch_size=8, collate_fn=_collate), dispatch_batches=False
    ),
}


def _errors(rank: int) -> dict[str, tuple[str, str, bool]]:
    """Name -> class and text of the error, and whether the model is as it was."""
    found = {}
    for name, data in BAD.items():
        for order in ("one_shot", "sequential"):
            model = bert()
            try:
                hc.compress(model, _STRUCTURED(mac_ratio=0.6, order=order), data=data(rank))
            except Exception as error:
                same = all(torch.equal(value, model.state_dict()[key]) for key, value in bert().state_dict().items())
                found[f"{name}, {order}"] = (type(error).__name__, str(error), same and not hc.steps_of(model))
    return found


def _other_model(rank: int) -> str:
    model = bert()
    with torch.no_grad():
        model.classifier.bias += rank
    try:
        hc.compress(model, _STRUCTURED(mac_ratio=0.6), data=batches())
    except ValueError as error:
        return str(error)
    return ""


def command(folder: str, rank: int, count: int, port: int, line: str) -> None:
    """One of `count` processes that run a command; what it prints goes to a file of its own."""
    become_rank(rank, port, count)
    os.chdir(folder)
    with open(f"printed-{rank}.txt", "w") as printed, contextlib.redirect_stdout(printed):
        code = main(line.split())
    sys.exit(code)


def work(folder: str, rank: int, count: int, port: int, what: str) -> None:
    """One of `count` processes; writes what it found into a file of its own."""
    become_rank(rank, port, count)
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    if what == "cases":
        found = {name: compressed(name, several=True) for name in CASES}
    elif what == "errors":
        found = {**_errors(rank), "other model": _other_model(rank)}
    else:
        try:
            hc.compress(bert(), _STRUCTURED(mac_ratio=0.6), data=_killed_on_one(rank))
        except Exception as error:
            found = {"killed": (type(error).__name__, str(error))}
    torch.save(found, f"{folder}/{what}-{count}-{rank}.pt")
