import math

import pytest
import torch

from ncmethods._core import InputError, NCError
from ncmethods.frames import orthogonal_frame, simplex_etf, sparse_etf
from ncmethods.testing import check_frame

SIZES = [(2, 1), (2, 7), (3, 2), (10, 9), (10, 10), (10, 64), (100, 99), (1000, 1024)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def simplex_gram(K):
    return torch.eye(K, dtype=torch.float64) * K / (K - 1) - 1 / (K - 1)


def gram_error(frame, gram):
    frame = frame.double()
    return float((frame @ frame.T - gram).abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("K", "D"), SIZES)
def test_simplex_rows_are_unit_and_equiangular(K, D, dtype, bound):
    frame = simplex_etf(K, D, generator=seeded(K), dtype=dtype)
    assert frame.shape == (K, D)
    assert frame.dtype == dtype
    assert gram_error(frame, simplex_gram(K)) <= bound
    assert float(frame.double().sum(0).abs().max()) <= bound * math.sqrt(K)  # rows sum to zero
    if D >= K:
        canonical = simplex_etf(K, D, rotation="canonical", dtype=dtype)
        assert gram_error(canonical, simplex_gram(K)) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("K", "D"), [(2, 2), (10, 10), (10, 64), (200, 256)])
def test_orthogonal_rows_and_their_centred_simplex(K, D, dtype, bound):
    for rotation in ("haar", "canonical"):
        frame = orthogonal_frame(K, D, rotation=rotation, generator=seeded(K), dtype=dtype)
        assert frame.shape == (K, D)
        assert frame.dtype == dtype
        assert gram_error(frame, torch.eye(K, dtype=torch.float64)) <= bound
        centred = (frame.double() - frame.double().mean(0)) * math.sqrt(K / (K - 1))
        assert gram_error(centred, simplex_gram(K)) <= 4 * bound


@pytest.mark.parametrize("dim", [5, 8])
def test_canonical_is_the_centred_axes_padded(dim):
    K = 5
    want = torch.zeros(K, dim, dtype=torch.float64)
    want[:, :K] = math.sqrt(K / (K - 1)) * (torch.eye(K).double() - 1 / K)
    frame = simplex_etf(K, dim, rotation="canonical", dtype=torch.float64)
    torch.testing.assert_close(frame, want, rtol=0, atol=1e-15)
    assert torch.equal(orthogonal_frame(K, dim, rotation="canonical"), torch.eye(K, dim))


@pytest.mark.parametrize("build", [simplex_etf, orthogonal_frame])
def test_seed_decides_the_haar_draw(build):
    one, same = build(6, 9, generator=seeded(3)), build(6, 9, generator=seeded(3))
    assert torch.equal(one, same)
    assert not torch.equal(one, build(6, 9, generator=seeded(4)))
    state = torch.get_rng_state()
    build(6, 9, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)  # a given generator spares the global one
    torch.manual_seed(0)
    first = build(6, 9)
    torch.manual_seed(0)
    assert torch.equal(first, build(6, 9))
    # float32 is the rounded float64 frame, not another draw
    assert torch.equal(one, build(6, 9, generator=seeded(3), dtype=torch.float64).float())


@pytest.mark.parametrize(("K", "D"), [(2, 1), (4, 3), (4, 6)])
def test_haar_moments(K, D):
    """The first two moments of a Haar frame are known: E W = 0, E w_i w_jᵀ = cos_ij I / D."""
    draws = 1500
    generator = seeded(0)
    frames = torch.stack(
        [simplex_etf(K, D, generator=generator, dtype=torch.float64) for _ in range(draws)]
    )
    sd = 1 / math.sqrt(D * draws)  # of the mean of one entry
    assert float(frames.mean(0).abs().max()) < 5 * sd
    second = torch.einsum("nid,nje->ijde", frames, frames) / draws
    want = torch.einsum("ij,de->ijde", simplex_gram(K), torch.eye(D, dtype=torch.float64)) / D
    assert float((second - want).abs().max()) < 5 / math.sqrt(draws)
    # Sign symmetry, which QR without fixed signs breaks: half of all entries are positive.
    positive = (frames > 0).double().mean(0)
    assert float((positive - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(draws)


def test_haar_is_invariant_under_rotation():
    """Entries of a Haar frame have the law of one coordinate of a uniform unit vector."""
    K, D, draws = 3, 4, 1500
    generator = seeded(1)
    R = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=seeded(2))).Q
    frames = torch.stack(
        [simplex_etf(K, D, generator=generator, dtype=torch.float64) for _ in range(draws)]
    )
    for entries in (frames[:, 0, 0], frames[:, 2, 3], (frames @ R)[:, 1, 2]):
        # A coordinate t of a uniform vector on S^3 has density (2/π)√(1−t²): E t⁴ = 3/(D(D+2)).
        assert float(entries.square().mean()) == pytest.approx(1 / D, rel=0.1)
        assert float(entries.pow(4).mean()) == pytest.approx(3 / (D * (D + 2)), rel=0.15)


def test_haar_does_not_lean_on_the_ones_direction():
    """QR of a *uniform* matrix, as in several public copies, puts one axis on the ones vector."""
    K, D, draws = 10, 64, 200
    generator = seeded(0)
    ones = torch.full((D,), D**-0.5, dtype=torch.float64)

    def lean(isometry):  # |cos| of the ones direction with the span of the frame
        return float((isometry.T @ ones).norm())

    haar = []
    for _ in range(draws):
        frame = simplex_etf(K, D, generator=generator, dtype=torch.float64)
        haar.append(lean(torch.linalg.svd(frame.T, full_matrices=False).U[:, : K - 1]))
    uniform = lean(
        torch.linalg.qr(torch.rand(D, K - 1, dtype=torch.float64, generator=generator)).Q
    )
    # A random (K−1)-space holds √((K−1)/D) of a fixed direction on average.
    assert sum(haar) / draws == pytest.approx(math.sqrt((K - 1) / D), rel=0.05)
    assert uniform > 0.9


def test_errors_name_the_way_out():
    assert issubclass(InputError, NCError)
    assert issubclass(NCError, ValueError)
    with pytest.raises(
        InputError, match=r"needs dim ≥ 9, got 8.*cosine_head.*spread, or orthoplex"
    ):
        simplex_etf(10, 8)
    with pytest.raises(
        InputError, match=r"needs dim ≥ 9, got 4.*In 4 dim.*softmax_code and spread.$"
    ):
        simplex_etf(10, 4)
    with pytest.raises(InputError, match=r"canonical .* needs dim ≥ 10, got 9.*rotation='haar'"):
        simplex_etf(10, 9, rotation="canonical")
    with pytest.raises(InputError, match=r"needs dim ≥ 10, got 9.*simplex_etf"):
        orthogonal_frame(10, 9)
    for build in (simplex_etf, orthogonal_frame):
        with pytest.raises(InputError, match=r"Unknown rotation 'har'.*'haar'\?"):
            build(3, 5, rotation="har")
        for bad in (1, 0, -3, 2.0, True, "10"):
            with pytest.raises(InputError, match="num_classes must be an integer ≥ 2"):
                build(bad, 5)


# --- zeros -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "D", "sparsity"),
    [(2, 5, 0.0), (3, 2, 0.0), (10, 16, 0.4), (10, 64, 0.6), (10, 64, 0.65), (40, 128, 0.6)],
)
def test_sparse_simplex_is_exact_and_has_its_zeros(K, D, sparsity):
    frame = sparse_etf(K, D, sparsity=sparsity, generator=seeded(0), dtype=torch.float64)
    check_frame(frame, cosine=-1 / (K - 1))
    assert int((frame == 0).sum()) == round(sparsity * K * D)
    zeros = (frame == 0).sum(0)
    assert int(zeros.max() - zeros.min()) <= 1  # even over the columns
    assert float(frame.sum(0).abs().max()) < 1e-12
    single = sparse_etf(K, D, sparsity=sparsity, generator=seeded(0))
    assert torch.equal(single, frame.float())
    assert not torch.equal(single, sparse_etf(K, D, sparsity=sparsity, generator=seeded(1)))


def test_two_entries_a_column_are_the_edges_of_a_graph():
    """Columns a(e_i − e_j): the Gram matrix is a graph Laplacian, that of all pairs alike."""
    K, D = 4, 40
    frame = sparse_etf(K, D, sparsity=0.5, generator=seeded(0), dtype=torch.float64)
    pairs = {}
    for column in frame.T:
        i, j = column.nonzero()[:, 0].tolist()
        assert column[i] == pytest.approx(-column[j])
        pairs[i, j] = pairs.get((i, j), 0) + float(column[i]) ** 2
    assert len(pairs) == 6
    assert all(size == pytest.approx(1 / (K - 1)) for size in pairs.values())


def test_sparse_errors_name_the_way_out():
    with pytest.raises(InputError, match="needs dim ≥ 9, got 8"):
        sparse_etf(10, 8)
    for bad in (1.0, -0.1):
        with pytest.raises(InputError, match=r"sparsity must lie in \[0, 1\)"):
            sparse_etf(10, 64, sparsity=bad)
    # 100 · 512 entries: 512 sums and 4950 products are given.
    with pytest.raises(InputError, match=r"5120 free .* at least 5462 in all.*sparsity ≤ 0\.893"):
        sparse_etf(100, 512, sparsity=0.9)
    with pytest.raises(InputError, match=r"still off by .* after 200 steps.*Lower sparsity"):
        sparse_etf(10, 64, sparsity=0.8, steps=200, generator=seeded(0))  # misses some pairs
