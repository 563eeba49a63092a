"""What an installed package must do, in a folder of its own: `python release_program.py FOLDER`.

It runs beside no source tree: in the environments that `make dist` and `tests/test_release.py` install a release into.
Imports nothing of the tests, and needs no network.
"""

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import hf_compress as hc


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *(f"w{i}" for i in range(40))]


def command(*arguments):
    """What the console script of this environment prints."""
    script = Path(sys.executable).with_name("hf-compress")
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def write_inputs(folder):
    """A model that was never trained, its tokenizer, and sentences with labels."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "dense")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "dense")
    (folder / "data").mkdir()
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 40} w{i % 7} w{i % 11},{i % 2}" for i in range(64)]
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))


def main(folder):
    folder.mkdir()
    write_inputs(folder)
    dense, pruned, data = (str(folder / name) for name in ("dense", "pruned", "data"))
    version = metadata.version("hf_compress")
    assert command("--version") == f"hf-compress {version}\n" == f"hf-compress {hc.__version__}\n"
    assert "prune-structure" in command("--help")
    # A README and the list of public names come along.
    assert all((resources.files("hf_compress.methods") / name / "README.md").is_file() for name in hc.METHODS)
    assert all(hasattr(hc, name) for name in hc.__all__)
    command("prune-structure", "--model_name_or_path", dense, "--data_dir", data, "--mac_ratio", "0.5",
            "--max_train_samples", "64", "--output_dir", pruned)  # fmt: skip
    # Opened by a process that knows nothing but the import.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pruned)
    (step,) = hc.steps_of(model)
    assert step["method"] == "structured_pruning"
    before = transformers.AutoModelForSequenceClassification.from_pretrained(dense)
    assert hc.count_cost(model, step["seq_len"]).macs <= 0.5 * hc.count_cost(before, step["seq_len"]).macs
    saved = load_file(Path(pruned) / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items() if name in saved)
    assert command("evaluate", "--models", dense, pruned, "--data_dir", data).count("accuracy") >= 1
    sys.stdout.write(f"hf_compress {version} works from {Path(hc.__file__).parent}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
