"""The nested errors, the sparse encoder and the auxiliary loss against dense autograd in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_lens_matryoshka.ops.auxiliary_loss import auxiliary_loss
from sae_lens_matryoshka.ops.encoder import hidden_pre_of, selected_hidden_pre
from sae_lens_matryoshka.ops.latents import lay_out, lay_out_dense
from sae_lens_matryoshka.ops.nested_loss import NestedObjective, nested_errors, nested_errors_reference
from sae_lens_matryoshka.ops.selection import Selection

WIDTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12, unique=True).map(sorted)


def _randn(*shape: int, seed: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def _selection(mask: Tensor, hidden_pre: Tensor) -> Selection:
    rows, columns = mask.nonzero(as_tuple=True)
    shuffled = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))
    rows, columns = rows[shuffled], columns[shuffled]
    values = hidden_pre.detach()[rows, columns]
    return Selection(rows, columns, values, values)


@settings(max_examples=100, deadline=None)
@given(
    widths=WIDTHS,
    batch=st.integers(1, 9),
    density=st.floats(0, 1),
    scaled=st.booleans(),
    snap=st.booleans(),
    stop_gradient=st.sampled_from([False, True, "inner"]),
    tilt=st.sampled_from([0.0, 0.002, 1.5, -0.5]),
    ordered=st.booleans(),
    dense=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_are_those_of_the_dense_definition(
    widths: list[int],
    batch: int,
    density: float,
    scaled: bool,
    snap: bool,
    stop_gradient: Any,
    tilt: float,
    ordered: bool,
    dense: bool,
    seed: int,
):
    d_in, d_sae = 5, widths[-1]
    parameters = {
        "W_enc": _randn(d_in, d_sae, seed=seed, grad=True),
        "b_enc": _randn(d_sae, seed=seed + 1, grad=True),
        "W_dec": _randn(d_sae, d_in, seed=seed + 2, grad=True),
        "b_dec": _randn(d_in, seed=seed + 3, grad=True),
    }
    sae_in, target = _randn(batch, d_in, seed=seed + 4), _randn(batch, d_in, seed=seed + 5)
    row_scale = _randn(batch, 1, seed=seed + 6).abs() if scaled else None
    objective = NestedObjective(tuple(_randn(len(widths), seed=seed + 7).tolist()), snap, stop_gradient, tilt)
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed + 8)) if ordered else None
    places = torch.arange(d_sae) if order is None else order
    mask = torch.rand(batch, d_sae, generator=torch.Generator().manual_seed(seed)) < density
    x = sae_in - parameters["b_dec"]
    hidden_pre = x @ parameters["W_enc"] + parameters["b_enc"]

    reference = nested_errors_reference(
        (hidden_pre * mask)[:, places],
        parameters["W_dec"][places],
        parameters["b_dec"],
        target,
        widths,
        objective,
        row_scale,
    )
    latents = lay_out(_selection(mask, hidden_pre), batch, widths, places.argsort() if ordered else None)
    encoder = (x, parameters["W_enc"], parameters["b_enc"], parameters["b_dec"])
    coefficients = selected_hidden_pre(*encoder, latents)
    if dense:
        latents = lay_out_dense(batch, widths, order)
        coefficients = hidden_pre_of(*encoder) * mask
    ours = nested_errors(
        coefficients,
        parameters["W_dec"],
        parameters["b_dec"],
        target,
        latents,
        objective,
        row_scale,
        keep_level_residuals=True,
    )
    for first, second in zip(ours, reference, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)
    gradients = [
        torch.autograd.grad(0.7 * errors.loss, list(parameters.values()), retain_graph=True)
        for errors in (ours, ours, reference)  # ours twice: a backward pass must not use up what it needs
    ]
    for name, first, second, expected in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert first.equal(second)


def test_the_tilted_loss_has_the_gradient_of_tilted_empirical_risk():
    """arXiv:2007.01162, equation 1, on errors in units of their mean: log(mean(exp(t e))) / t."""
    residuals = _randn(7, 5, seed=0, grad=True)
    tilt, errors = 0.8, residuals.pow(2).sum(-1)
    scale = errors.mean().detach()
    risk = scale * torch.log(torch.exp(tilt * errors / scale).mean()) / tilt
    b_dec, target = torch.zeros(5, dtype=torch.float64), -residuals.detach()
    W_dec = _randn(2, 5, seed=1, grad=True)
    coefficients = torch.zeros(7, 2, dtype=torch.float64, requires_grad=True)
    ours = nested_errors(coefficients, W_dec, b_dec, target, lay_out_dense(7, [2]), NestedObjective(tilt=tilt))
    (of_residuals,) = torch.autograd.grad(risk, residuals)
    (of_coefficients,) = torch.autograd.grad(ours.loss, coefficients)
    torch.testing.assert_close(of_coefficients, of_residuals @ W_dec.detach().T, rtol=1e-9, atol=1e-12)
    assert ours.squared_errors.item() == pytest.approx(errors.mean().item())  # what is reported stays unweighted


def test_inner_levels_detached_train_their_own_latents_and_the_full_level_all():
    """Against autograd of the two losses by themselves, neither of which is written as it is in the package."""
    widths, W_dec, b_dec = [2, 5, 9], _randn(9, 4, seed=0, grad=True), _randn(4, seed=1, grad=True)
    coefficients, target = _randn(6, 9, seed=2, grad=True), _randn(6, 4, seed=3)
    inner = torch.zeros((), dtype=torch.float64)
    for start, end in ((0, 2), (2, 5)):
        given = (b_dec + coefficients[:, :start] @ W_dec[:start]).detach() if start else b_dec
        inner = inner + (given + coefficients[:, start:end] @ W_dec[start:end] - target).pow(2).sum(-1).mean()
    loss = inner + (b_dec + coefficients @ W_dec - target).pow(2).sum(-1).mean()
    objective = NestedObjective(stop_gradient="inner")
    ours = nested_errors(coefficients, W_dec, b_dec, target, lay_out_dense(6, widths), objective).loss
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    inputs = [coefficients, W_dec, b_dec]
    for first, second in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_latents_in_both_orders():
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    values = torch.arange(8.0).reshape(2, 4)
    latents = lay_out(_selection(mask, values), 2, [1, 3, 4])
    assert list(zip(latents.rows.tolist(), latents.columns.tolist(), strict=True)) == [
        *[(0, 0)],
        *[(0, 2), (1, 1)],
        *[(0, 3), (1, 3)],
    ]
    assert latents.starts.tolist() == [0, 1, 1, 2, 3, 4, 5]
    assert latents.columns[latents.by_column].tolist() == [0, 1, 2, 3, 3]
    assert latents.column_starts.tolist() == [0, 1, 2, 3, 5]
    assert latents.to_sparse(latents.scores).to_dense().equal(values * mask)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_auxiliary_loss_is_that_of_the_dense_definition(n_dead: int, column_scaled: bool, row_scaled: bool, seed: int):
    batch, d_in, d_sae = 4, 6, 12
    parameters: dict[str, Any] = {
        "W_enc": _randn(d_in, d_sae, seed=seed, grad=True),
        "b_enc": _randn(d_sae, seed=seed + 1, grad=True),
        "W_dec": _randn(d_sae, d_in, seed=seed + 2, grad=True),
    }
    sae_in, residual = _randn(batch, d_in, seed=seed + 3), _randn(batch, d_in, seed=seed + 4)
    b_dec = _randn(d_in, seed=seed + 7, grad=True)
    x = sae_in - b_dec
    column_scale = _randn(d_sae, seed=seed + 5).abs() if column_scaled else None
    row_scale = _randn(batch, 1, seed=seed + 6).abs() if row_scaled else None
    dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:n_dead].sort().values

    ours = auxiliary_loss(
        x=x, **parameters, b_dec=b_dec, residual=residual, dead=dead, column_scale=column_scale, row_scale=row_scale
    )
    if n_dead == 0:
        assert ours == 0
        return
    hidden_pre = x @ parameters["W_enc"] + parameters["b_enc"]
    scores = hidden_pre.detach() * (1.0 if column_scale is None else column_scale)
    alive = torch.ones(d_sae, dtype=torch.bool)
    alive[dead] = False
    kept = scores.masked_fill(alive, -torch.inf).topk(min(n_dead, d_in // 2)).indices
    mask = torch.zeros_like(hidden_pre).scatter_(1, kept, 1.0)
    error = (hidden_pre * mask) @ parameters["W_dec"] - residual
    if row_scale is not None:
        error = error * row_scale
    expected = min(n_dead / 3, 1.0) * error.pow(2).sum(-1).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    inputs = [b_dec, *parameters.values()]
    for first, second in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(first.to_dense(), second, rtol=1e-9, atol=1e-12)
