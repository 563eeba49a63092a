"""GPTQ and rounding to nearest beside recorded outputs of the released code, and the laws that they obey."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compress as hc
from hf_compress.methods.weight_quantization.packed import PackedModule
from hf_compress.methods.weight_quantization.rounding import (
    RoundingOptions,
    prepare_inputs,
    round_by_inputs,
    round_to_nearest,
)


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "specs" / "golden" / "gptq"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden vectors of the original code are not here")
# The larger one has the same list of cases as the first.
MATRICES = (
    "m24x32", "dead24x32", "quirk12x32", "lowrank24x32", "m16x160", pytest.param("m64x128", marks=pytest.mark.slow),
)  # fmt: skip
MODELS = (
    "b4_g-1_noact_dyn_asym", "b4_g-1_act_dyn_asym", "b4_g-1_noact_dyn_sym", "b4_g16_noact_dyn_asym",
    "b4_g16_act_static_asym", "b3_g-1_noact_dyn_asym", "b3_g16_noact_dyn_asym", "b3_g16_act_static_asym",
    "b2_g-1_act_dyn_asym", "b2_g-1_noact_dyn_sym", "b2_g16_noact_dyn_asym",
)  # fmt: skip


def value_of(rounded):
    """[R, C], the numbers that codes stand for."""
    return rounded.grid.scale[:, rounded.groups] * (rounded.codes - rounded.grid.zero[:, rounded.groups])


def gptq(weight, hessian, options, **more):
    return round_by_inputs(weight, prepare_inputs(hessian, options), options, **more)


@functools.cache
def recorded(name):
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def options_of(case):
    names = {"groupsize": "group_size", "sym": "symmetric"}
    fields = ("bits", "groupsize", "sym", "act_order", "static_groups", "percdamp")
    return RoundingOptions(**{names.get(field, field): case[field] for field in fields})


def distance_from_middle(row, found, expected, arrays, options):
    """How far from the middle between two codes the first weight of a row was that got another code, in codes.

    A loop over columns in double precision, which takes the recorded codes as given.
    """
    hessian = arrays["H"].double().numpy()
    dead = hessian.diagonal() == 0
    hessian = hessian + np.diag(dead.astype(float))
    order = np.argsort(-hessian.diagonal(), kind="stable") if options.act_order else np.arange(len(hessian))
    hessian = hessian[order][:, order] + options.percdamp * hessian.diagonal().mean() * np.eye(len(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weights = np.where(dead, 0, arrays["W"][row].double().numpy())[order]
    spread = {key: expected[key][row, expected["gidx"]].double().numpy()[order] for key in ("scale", "zero")}
    values = expected["Q"][row].double().numpy()[order]
    other = (found.codes != expected["codes"])[row].numpy()[order]
    for column in range(len(weights)):
        if other[column]:
            code = weights[column] / spread["scale"][column] + spread["zero"][column]
            return abs(code - np.floor(code) - 0.5)
        error = (weights[column] - values[column]) / factor[column, column]
        weights[column:] -= error * factor[column, column:]
    return np.inf


@needs_golden
@pytest.mark.parametrize("matrix", MATRICES)
def test_matrices_of_the_released_code(matrix):
    """Codes, zeros and groups exactly but for rows with a tie; scales of groups to rounding.

    Sums are added in another order, and on each processor in its own. A weight in the middle between two codes then
    goes to either, and takes what follows in its row along.
    """
    cases = [c for c in json.loads((GOLDEN / "matrices" / "cases.json").read_text()) if c["file"] == f"{matrix}.npz"]
    if not cases:
        pytest.skip("not stored")
    arrays = recorded(f"matrices/{matrix}.npz")
    for case in cases:
        expected = {name: arrays[f"{case['case']}/{name}"] for name in ("Q", "codes", "scale", "zero", "gidx", "loss")}
        found = gptq(arrays["W"], arrays["H"], options_of(case), columns=case["blocksize"])
        same = (found.codes == expected["codes"]).all(1)
        for row in (~same).nonzero()[:, 0].tolist():
            where = distance_from_middle(row, found, expected, arrays, options_of(case))
            assert where < 1e-5, (case["case"], row, where)
        assert int((~same).sum()) <= 1, case["case"]
        assert torch.equal(found.groups, expected["gidx"]), case["case"]
        assert torch.equal(found.grid.zero[same], expected["zero"][same]), case["case"]
        if same.all():
            assert float(found.loss) == pytest.approx(float(expected["loss"]), rel=4e-6)
        if case["groupsize"] == -1 or case["static_groups"]:
            assert torch.equal(found.grid.scale, expected["scale"])
            assert torch.equal(value_of(found)[same], expected["Q"][same])
        torch.testing.assert_close(found.grid.scale[same], expected["scale"][same], rtol=1e-6, atol=0)
        torch.testing.assert_close(value_of(found)[same], expected["Q"][same], rtol=1e-6, atol=0)


@needs_golden
@pytest.mark.parametrize("matrix", ["m24x32", "m64x128"])
def test_nearest_values_of_the_released_code(matrix):
    arrays = recorded(f"matrices/{matrix}.npz")
    cases = sorted({name.partition("/")[0] for name in arrays if name.startswith("rtn_b")})
    assert cases
    for case in cases:
        _, bits, kind = case.split("_")
        found = round_to_nearest(arrays["W"], RoundingOptions(int(bits[1:]), symmetric=kind == "sym"))
        assert torch.equal(value_of(found), arrays[f"{case}/Q"])
        assert torch.equal(found.grid.scale[:, 0], arrays[f"{case}/scale"])
        assert torch.equal(found.grid.zero[:, 0], arrays[f"{case}/zero"])


@pytest.fixture
def tiny():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "opt_tiny", attn_implementation="eager").eval()


def perplexity(model, ids, length=32):
    windows = ids[0, : len(ids[0]) // length * length].view(-1, length)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return float(losses.mean().exp())


def config_of(case):
    bits, group, act, static, kind = case.split("_")
    return hc.WeightQuantizationConfig(
        bits=int(bits[1:]), group_size=int(group[1:]), act_order=act == "act", static_groups=static == "static",
        symmetric=kind == "sym",
    )  # fmt: skip


@needs_golden
@pytest.mark.parametrize("case", MODELS)
def test_layers_in_order_of_the_released_code(tiny, case):
    tokens, arrays = recorded("opt_tokens.npz"), recorded(f"opt/{case}.npz")
    results = json.loads((GOLDEN / "opt" / "results.json").read_text())
    hc.compress(tiny, config_of(case), data=[{"input_ids": row[None].long()} for row in tokens["calib"]])
    names = [name.removesuffix("/Q") for name in arrays if name.endswith("/Q")]
    assert len(names) == 12
    for name in names:
        layer, path = name.removeprefix("L").split(".", 1)
        module = tiny.model.decoder.layers[int(layer)].get_submodule(path)
        assert isinstance(module, PackedModule)
        torch.testing.assert_close(module.weight, arrays[f"{name}/Q"], rtol=0, atol=1e-5)
    assert perplexity(tiny, tokens["test"].long()) == pytest.approx(results[case]["ppl"], rel=1e-5)


@needs_golden
@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_nearest_layers_of_the_released_code(tiny, kind):
    for bits in (2, 3, 4):
        model = AutoModelForCausalLM.from_pretrained(GOLDEN / "opt_tiny")
        hc.compress(model, hc.WeightQuantizationConfig(bits=bits, algorithm="rtn", symmetric=kind == "sym"))
        for name, expected in recorded(f"opt/rtn_b{bits}_{kind}.npz").items():
            if name.endswith("/Q"):
                layer, path = name.removesuffix("/Q").removeprefix("L").split(".", 1)
                assert torch.equal(model.model.decoder.layers[int(layer)].get_submodule(path).weight, expected)
