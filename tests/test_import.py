"""Importing the package is cheap, registers the loader in any order, and every exported name resolves."""

import subprocess
import sys

import pytest

import hf_compress


def run(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["hf_compress"].__name__ == "CompressionLoader"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["hf_compress"].__name__ == "CompressionConfig"
"""

ORDERS = {
    "registry first": "import transformers.quantizers.auto\nimport hf_compress",
    "model class first": "from transformers import BertModel\nimport hf_compress",
    "loader first": "import hf_compress.loading",
}

STUDENT = """
from transformers import AutoConfig, AutoModelForSequenceClassification
config = AutoConfig.for_model("bilstm", vocab_size=9, hidden_size=3)
assert type(AutoModelForSequenceClassification.from_config(config)).__module__ == "hf_compress.students.bilstm"
"""

STUDENT_ORDERS = {
    "package first": "import hf_compress",
    "registry first": "import transformers.models.auto.modeling_auto\nimport hf_compress",
    "student first": "import hf_compress.students.bilstm",
}


def _first_alone(orders):
    """Each order is a process that imports everything: the default tests try the first one."""
    first, *others = orders
    return [first, *(pytest.param(order, marks=pytest.mark.slow) for order in others)]


@pytest.mark.parametrize("order", _first_alone(STUDENT_ORDERS))
def test_the_student_joins_the_auto_classes_in_any_order(order):
    run(STUDENT_ORDERS[order] + STUDENT)


@pytest.mark.parametrize("order", _first_alone(ORDERS))
def test_registered_in_any_order(order):
    run(ORDERS[order] + REGISTERED)


def test_import_is_light_and_registers_the_loader():
    program = """
import sys
import hf_compress
heavy = {"torch", "transformers", "transformers.quantizers", "numpy", "scipy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not any(name.startswith("hf_compress.") for name in sys.modules)
import transformers.quantizers.auto as auto
assert "hf_compress.loading" in sys.modules
import inspect
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
assert type(auto.__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
"""
    run(program + REGISTERED)


def test_every_exported_name_resolves():
    assert sorted(hf_compress.__all__) == sorted(set(hf_compress.__all__))
    for name in hf_compress.__all__:
        value = getattr(hf_compress, name)
        assert value is getattr(hf_compress, name)
        assert name == "METHODS" or value.__name__.rpartition(".")[2] == name
    assert set(hf_compress.__all__) <= set(dir(hf_compress))
    with pytest.raises(AttributeError, match="No hf_compress attribute decompress"):
        hf_compress.decompress  # noqa: B018
