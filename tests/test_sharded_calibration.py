"""Several processes that compress one model together: each reads a share of the data, the result is that of one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import hf_compress as hc
from tests.calibration_program import BAD, CASES, batches, bert, command, compressed, work
from tests.labelled_models import write_rows
from tests.rounding import assert_equal_to_rounding
from tests.two_processes import fork_server, free_port


@pytest.fixture(scope="module")
def launch():
    """Starts processes that work together, from a server that has imported everything."""
    context = fork_server()

    def start(target, folder, count, what):
        port = free_port()
        started = [
            context.Process(target=target, args=(str(folder), rank, count, port, what)) for rank in range(count)
        ]
        for process in started:
            process.start()
        return started

    return start


@pytest.fixture(scope="module")
def launched(tmp_path_factory, launch):
    """(what, processes) -> what each process found; all of them run at once."""
    folder = tmp_path_factory.mktemp("sharded")
    kinds = (("cases", 2), ("cases", 3), ("errors", 2), ("killed", 2))
    runs = {(what, count): launch(work, folder, count, what) for what, count in kinds}

    def result(what, count):
        for process in runs[what, count]:
            process.join(300)
        codes = [process.exitcode for process in runs[what, count]]
        assert codes == ([0, 7] if what == "killed" else [0] * count)
        return [torch.load(folder / f"{what}-{count}-{rank}.pt") for rank in range(count if what != "killed" else 1)]

    yield result
    for processes in runs.values():
        for process in processes:
            process.kill()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_processes_end_with_the_model_of_one(launched, count):
    found = launched("cases", count)
    for name in CASES:
        weights, steps = compressed(name, several=False)
        for ours, our_steps in (each[name] for each in found):
            assert ours.keys() == weights.keys()
            for step, expected in zip(our_steps, steps, strict=True):
                settings = {key: value for key, value in expected.items() if key != "tolerance"}
                assert {key: step[key] for key in settings} == settings, name
                if expected.get("tolerance") is not None:
                    # Prepared data are other batches of the same examples: activations round otherwise.
                    assert step["tolerance"] == pytest.approx(expected["tolerance"], rel=1e-6), name
            for key, value in weights.items():
                if name == "fisher one_shot tolerance":
                    # Its iterative solver stops at a residual of its own.
                    torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-4)
                else:
                    assert_equal_to_rounding(ours[key], value)
                # What is cut out or zeroed shows which units were kept; the others are only rounded otherwise.
                assert torch.equal(ours[key] == 0, value == 0), (name, key)
                assert torch.equal(ours[key], found[0][name][0][key]), (name, key)
            assert our_steps == found[0][name][1]


@pytest.mark.slow
def test_each_example_counts_once(launched):
    """The mean length is a ratio of two counts: an example that two processes read would change it."""
    for count in (2, 3):
        for name in ("prepared", "prepared, uneven", "distributed sampler", "rows", "generator"):
            lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches()])
            (step,) = launched("cases", count)[0][name][1]
            assert step["seq_len"] == int(lengths.sum()) / len(lengths), name


ENDS = {
    "shuffled apart": "data must be the same on every process",
    "split by hand": "data must be the same on every process",
    "fatal batch": "Activations must be finite",
    "broken stream": "no such row",
    "nothing": "data must hold at least one batch",
    "missing on one": "data must be given",
    "split stream": "data must not be a stream that accelerator.prepare split",
}


@pytest.mark.parametrize("name", list(BAD))
def test_an_error_of_one_process_ends_all(launched, name):
    both = launched("errors", 2)
    for order in ("one_shot", "sequential"):
        found = [each[f"{name}, {order}"] for each in both]
        assert all(ENDS[name] in text for _, text, _ in found), found
        assert all(untouched for _, _, untouched in found)
        if name in ("fatal batch", "broken stream", "missing on one"):
            assert found[0][0] == "OtherProcessFailed"
            assert found[0][1].startswith("Process 1 stopped: ")


def test_other_weights_on_one_process_are_refused(launched):
    assert all("model must be the same on every process" in each["other model"] for each in launched("errors", 2))


def test_a_killed_process_ends_the_other(launched):
    (found,) = launched("killed", 2)
    kind, text = found["killed"]
    assert kind == "LostProcess"
    assert text.startswith("One of the 2 processes of this compression has ended or no longer answers")


def test_one_process_reads_everything():
    """Nothing is shared where no other process is."""
    seen = []

    def counted():
        for batch in batches():
            seen.append(batch)
            yield batch

    hc.compress(bert(), hc.StructuredPruningConfig(mac_ratio=0.6), data=counted())
    assert len(seen) == len(batches()) == 8


COMMANDS = {
    "prune-structure": "prune-structure --mac_ratio 0.6 --ridge 1e-3 --device cpu",
    "prune-weights": "prune-weights --num_train_epochs 0 --use_cpu --report_to none --criterion sparsegpt "
    "--scope local --pattern 2:4 --target_sparsity 0.5",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["prune-structure", pytest.param("prune-weights", marks=pytest.mark.slow)])
def test_a_command_under_a_launcher_writes_one_folder(tmp_path, launch, model, tokenizer, sentences, name):
    model("bert", "sequence_classification").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [{"text": text, "label": label} for text, label in sentences])
    line = f"{COMMANDS[name]} --model_name_or_path model --data_dir data --max_length 16"
    alone = launch(command, tmp_path, 1, f"{line} --output_dir alone")
    both = launch(command, tmp_path, 2, f"{line} --output_dir both")
    for process in (*alone, *both):
        process.join(300)
    assert [process.exitcode for process in (*alone, *both)] == [0, 0, 0]
    assert (tmp_path / "printed-1.txt").read_text() == ""
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("both", "alone"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_equal_to_rounding(found[key], value)
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
