"""Coordinate descent after GPTQ: the error never rises, and in the end no code is better anywhere else."""

import json

import pytest
import torch
from helpers import apply, base_of

from llmq.matrix.descent import descend
from llmq.matrix.solver import damped, elimination, solve

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(seed=0, inputs=64, outputs=24):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw)
    rows = torch.randn(200, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    return weight, rows.t() @ rows


def error(weight, hessian, made):
    off = (weight - made.weight()).double()
    return float(((off @ damped(hessian, 0.05).double()) * off).sum())


def rounded(weight, hessian, bits=3, sym=False, static=True, keep_zeros=False):
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper, damping = elimination(hessian, 0.05, order)
    return solve(weight, upper, bits, 16, sym, True, order, static, keep_zeros), damping


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_each_sweep_lowers_the_error(sym, static):
    weight, hessian = problem()
    made, damping = rounded(weight, hessian, sym=sym, static=static)
    errors = [error(weight, hessian, descend(weight, hessian, made, damping, n)) for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]
    assert descend(weight, hessian, made, damping, 0) is made
    after = descend(weight, hessian, made, damping, 2)
    assert bool((after.zeros == made.zeros).all())
    assert bool((after.scales.bfloat16().half() == after.scales.half()).all())  # files and kernels hold them
    assert int(after.codes.max()) <= 7


def test_in_the_end_no_single_code_is_better_elsewhere():
    weight, hessian = problem(1, inputs=32, outputs=4)
    made, damping = rounded(weight, hessian, bits=2)
    end = descend(weight, hessian, made, damping, 12)
    least = error(weight, hessian, end)
    for i in range(32):
        for o in range(4):
            for code in range(4):
                codes = end.codes.clone()
                codes[i, o] = code
                other = type(end)(codes, end.scales, end.zeros, end.g_idx, end.bits)
                assert error(weight, hessian, other) >= least * (1 - 1e-5)


def test_fitted_scales_are_those_of_least_squares(monkeypatch):
    weight, hessian = problem(2, outputs=3)
    made, damping = rounded(weight, hessian)
    monkeypatch.setattr("llmq.matrix.descent._swept", lambda target, curvature, levels, *rest: levels)
    monkeypatch.setattr("llmq.matrix.descent.RIDGE", 0.0)
    fitted = descend(weight, hessian, made, damping, 1).scales
    root = torch.linalg.cholesky(damped(hessian, damping).double())  # H = R R^T: least squares of R^T (w - q)
    levels = made.codes.double() - made.zeros.double()[made.g_idx.long()]
    for o in range(3):
        design = torch.zeros(64, 4, dtype=torch.float64)
        design[torch.arange(64), made.g_idx.long()] = levels[:, o]
        best = torch.linalg.lstsq(root.t() @ design, root.t() @ weight[o].double()).solution
        torch.testing.assert_close(fitted[:, o].double(), best, rtol=5e-3, atol=0)  # rounded to bfloat16


def test_pruned_weights_stay_zero():
    weight, hessian = problem(3)
    weight[:, ::2] = 0
    made, damping = rounded(weight, hessian, keep_zeros=True)
    after = descend(weight, hessian, made, damping, 2, keep_zeros=True)
    assert bool((after.weight()[:, ::2] == 0).all())
    assert error(weight, hessian, after) < error(weight, hessian, made)


def test_inputs_that_are_always_zero_are_borne():
    weight, hessian = problem(4)
    hessian[5], hessian[:, 5] = 0, 0
    made, damping = rounded(weight, hessian)
    assert bool(descend(weight, hessian, made, damping, 2).weight().isfinite().all())


@pytest.mark.parametrize(("bits", "sweeps"), [pytest.param(2, 2, marks=pytest.mark.slow), (3, 2), (4, 0)])
def test_few_bits_are_asymmetric_and_swept_unless_asked_otherwise(bits, sweeps, tiny_llama, tiny_jsonl, tmp_path):
    settings = {"samples": 2, "length": 32, "data": str(tiny_jsonl), "bits": bits, "group_size": 32}
    base, sym = base_of(tiny_llama), bits == 4
    plain = apply("quantize.gptq", base, tmp_path / "1", **settings).weights
    said = apply("quantize.gptq", base, tmp_path / "2", **settings, sweeps=sweeps, sym=sym).weights
    other = apply("quantize.gptq", base, tmp_path / "3", **settings, sweeps=1).weights
    name = "model-00001-of-00003.safetensors"
    assert (plain / name).read_bytes() == (said / name).read_bytes() != (other / name).read_bytes()
    assert json.loads((plain / "quantize_config.json").read_text())["sym"] is sym
