"""The laws of the basis: what its columns span, and what they must commute with."""

import pytest
import torch

from hf_guide.errors import ShapeError, TeacherError
from hf_guide.initialization.basis import CHUNK_ROWS, explained_variance, fit_basis, second_moment

WIDTH = 24


def decaying_rows(count: int = 300, width: int = WIDTH, seed: int = 0, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return (rows * 0.8 ** torch.arange(width)) @ rotation + mean


def subtract_mean(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(-1, keepdim=True)


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, WIDTH - 1, WIDTH])
def test_columns_are_orthonormal(size, keep_mean):
    basis = fit_basis(second_moment([decaying_rows()], WIDTH), size, keep_mean=keep_mean)
    assert basis.matrix.dtype == torch.float64 and basis.matrix.shape == (WIDTH, size)
    torch.testing.assert_close(basis.matrix.T @ basis.matrix, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)


def test_basis_spans_the_top_right_singular_vectors():
    rows = decaying_rows()
    basis = fit_basis(second_moment([rows], WIDTH), 9)
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(basis.matrix @ basis.matrix.T, right[:9].T @ right[:9], atol=1e-10, rtol=0)
    torch.testing.assert_close(basis.eigenvalues, singular**2)
    residual = rows - rows @ basis.matrix @ basis.matrix.T
    assert basis.explained == pytest.approx(1 - (residual**2).sum().item() / (rows**2).sum().item(), abs=1e-12)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_rows_inside_a_subspace_survive_exactly(keep_mean):
    small = decaying_rows(width=8, mean=0.0)
    span = torch.linalg.qr(subtract_mean(decaying_rows(8, seed=3)).T if keep_mean else decaying_rows(8, seed=3).T).Q
    rows = small @ span.T
    basis = fit_basis(second_moment([rows], WIDTH), 9 if keep_mean else 8, keep_mean=keep_mean)
    torch.testing.assert_close(rows @ basis.matrix @ basis.matrix.T, rows, atol=1e-12, rtol=0)
    assert basis.explained == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("width,size", [(WIDTH, 7), (WIDTH, 1), (513, 300)])
def test_keeping_the_mean_commutes_with_subtracting_it(width, size):
    rows = decaying_rows(width=width)
    matrix = fit_basis(second_moment([rows], width), size, keep_mean=True).matrix
    torch.testing.assert_close(subtract_mean(rows) @ matrix, subtract_mean(rows @ matrix), atol=1e-11, rtol=0)
    ones = matrix.T @ torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(
        ones, torch.full((size,), (width / size) ** 0.5, dtype=torch.float64), atol=1e-11, rtol=0
    )


def test_keeping_the_mean_keeps_the_best_directions_orthogonal_to_it():
    rows = decaying_rows()
    matrix = fit_basis(second_moment([rows], WIDTH), 7, keep_mean=True).matrix
    _, _, right = torch.linalg.svd(subtract_mean(rows), full_matrices=False)
    expected = right[:6].T @ right[:6] + torch.full((WIDTH, WIDTH), 1 / WIDTH, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_full_size_is_the_identity(keep_mean):
    basis = fit_basis(second_moment([decaying_rows()], WIDTH), WIDTH, keep_mean=keep_mean)
    assert torch.equal(basis.matrix, torch.eye(WIDTH, dtype=torch.float64)) and basis.explained == 1.0


def test_signs_are_fixed_and_the_same_rows_give_the_same_bits():
    first = fit_basis(second_moment([decaying_rows()], WIDTH), 10)
    again = fit_basis(second_moment([-decaying_rows()], WIDTH), 10)
    assert torch.equal(first.matrix, again.matrix) and torch.equal(first.eigenvalues, again.eigenvalues)
    largest = first.matrix.gather(0, first.matrix.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [5, 600])
def test_chunked_is_whole(width, centered):
    rows = decaying_rows(CHUNK_ROWS + 77, width)
    whole = second_moment([rows], width, centered=centered)
    chunked = second_moment(rows.split(333), width, centered=centered)
    mean = rows.mean(0) if centered else 0
    plain = (rows - mean).T @ (rows - mean)
    for moment in (whole, chunked):
        torch.testing.assert_close(moment, plain, atol=1e-9 * plain.abs().max().item(), rtol=0)
        assert torch.equal(moment, moment.T)


def test_half_precision_rows_are_summed_in_double():
    rows = decaying_rows(2000).to(torch.bfloat16)
    torch.testing.assert_close(second_moment([rows], WIDTH), rows.double().T @ rows.double(), rtol=1e-12, atol=0)


def test_a_shared_mean_vanishes_when_centered():
    rows = decaying_rows(mean=0.0)
    torch.testing.assert_close(
        second_moment([rows + 5], WIDTH, centered=True), second_moment([rows], WIDTH, centered=True), atol=1e-9, rtol=0
    )


def test_explained_variance_rises_to_one():
    curve = explained_variance(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))
    torch.testing.assert_close(curve, torch.tensor([0.4, 0.7, 0.9, 1.0, 1.0], dtype=torch.float64))
    assert torch.equal(explained_variance(torch.zeros(3)), torch.ones(3, dtype=torch.float64))


def test_a_table_of_zeros_still_gives_an_orthonormal_basis():
    basis = fit_basis(torch.zeros(6, 6), 3, keep_mean=True)
    torch.testing.assert_close(basis.matrix.T @ basis.matrix, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert basis.explained == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(value):
    rows = decaying_rows().float()
    rows[123, 4] = value
    with pytest.raises(TeacherError, match="model.embed_tokens.weight.*first is row 123"):
        second_moment(rows.split(50), WIDTH, name="model.embed_tokens.weight")


def test_chunks_of_another_width_are_an_error():
    with pytest.raises(ShapeError, match=r"expected chunks of shape \(any, 25\)"):
        second_moment([decaying_rows(10)], WIDTH + 1)


@pytest.mark.parametrize("size", [0, -1, WIDTH + 1])
def test_a_size_outside_the_stream_is_an_error(size):
    with pytest.raises(ShapeError, match=f"choose 1 to {WIDTH}"):
        fit_basis(torch.eye(WIDTH), size)
