import math

import pytest
import torch

from ncmethods._core import InputError, NCError
from ncmethods.frames import _search_code, orthogonal_frame, simplex_etf, softmax_code
from ncmethods.metrics.margin import one_vs_rest_margin
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
    with pytest.raises(InputError, match=r"needs dim ≥ 9, got 8.*cosine_head"):
        simplex_etf(10, 8)
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


# --- more classes than D + 1 --------------------------------------------------------------------


def max_cosine(frame):
    frame = frame.double()
    return float((frame @ frame.T).fill_diagonal_(-2).max())


def code(K, D, *, seed=0, dtype=torch.float64, **options):
    return softmax_code(K, D, generator=seeded(seed), dtype=dtype, **options)


@pytest.mark.parametrize(("K", "D"), [(2, 1), (2, 5), (4, 3), (10, 64)])
def test_code_is_the_simplex_where_there_is_one(K, D):
    assert torch.equal(code(K, D), simplex_etf(K, D, generator=seeded(0), dtype=torch.float64))


@pytest.mark.parametrize("K", [5, 6, 17])
def test_code_in_the_plane_is_the_regular_polygon(K):
    frame = code(K, 2)
    assert max_cosine(frame) == pytest.approx(math.cos(2 * math.pi / K), abs=1e-12)
    assert float(one_vs_rest_margin(frame)) == pytest.approx(1 - math.cos(2 * math.pi / K))
    assert not torch.equal(frame, code(K, 2, seed=1))  # rotated by the generator


@pytest.mark.parametrize(
    ("K", "D"), [(4, 2), (5, 3), (6, 3), (8, 6), (12, 10), (20, 10), (100, 50)]
)
def test_code_up_to_twice_the_dimension(K, D):
    """Margin 1 is the most: for K ≥ D + 2 some row has the hull's nearest point in the others'."""
    frame = code(K, D)
    assert float(one_vs_rest_margin(frame)) == pytest.approx(1, abs=1e-8)
    assert max_cosine(frame) == pytest.approx(0, abs=1e-12)
    assert float(frame.sum(0).abs().max()) < 1e-12
    gram = frame @ frame.T
    antipodal = (gram < -1 + 1e-12).sum(1) == 1  # the pairs; a simplex of two rows is one more
    n = 2 * D - K + 2
    assert int(antipodal.sum()) == K - n * (n > 2)
    simplex = gram[:n, :n]
    torch.testing.assert_close(simplex, simplex_gram(n), rtol=0, atol=1e-12)
    assert float(gram[:n, n:].abs().sum()) < 1e-9


def test_code_of_one_simplex_beats_the_axes_under_cross_entropy():
    """All codes of margin 1 tie in the limit; at a finite scale ours loses least."""
    K, D, scale = 8, 6, 12.0

    def loss(rows):
        return float((scale * (rows @ rows.T - 1)).logsumexp(1).mean())

    axes = torch.cat((torch.eye(D), -torch.eye(D)[: K - D])).double()
    thirds = torch.block_diag(*[simplex_etf(4, 3, dtype=torch.float64)] * 2)
    for other in (axes, thirds):
        assert float(one_vs_rest_margin(other)) == pytest.approx(1, abs=1e-8)
        assert loss(code(K, D)) < loss(other)
    assert loss(code(12, 6)) == pytest.approx(
        loss(torch.cat((torch.eye(D), -torch.eye(D))).double())
    )


@pytest.mark.parametrize(
    ("K", "D", "cosine"),
    [
        # What is known in closed form, here found by search:
        (4, 3, -1 / 3),  # simplex
        (5, 2, math.cos(2 * math.pi / 5)),  # pentagon
        (6, 3, 0),  # octahedron
        # H. Cohn, table of spherical codes (cohn.mit.edu/spherical-codes), proven optimal:
        (7, 3, 0.2101383127),
        (8, 3, 0.2612038750),
        (9, 3, 1 / 3),
        (10, 3, 0.4043943252),
        (12, 3, 1 / math.sqrt(5)),  # icosahedron
        (16, 5, 1 / 5),  # Clebsch: universally optimal, Cohn and Kumar, arXiv:math/0607446
        (27, 6, 1 / 4),  # Schläfli, the same table
    ],
)
def test_search_finds_known_optima(K, D, cosine):
    frame = _search_code(K, D, 600, 8, seeded(0))
    assert max_cosine(frame) == pytest.approx(cosine, abs=1e-3)
    # A code without loose rows has w_k as its own best direction: the margin is 1 − max cos.
    assert float(one_vs_rest_margin(frame)) == pytest.approx(1 - cosine, abs=1e-3)


def test_search_needs_restarts_for_the_24_cell():
    """Most starts end at 0.483; the 24-cell has margin 1/2."""
    frame = code(24, 4, steps=1000)
    assert max_cosine(frame) == pytest.approx(0.5, abs=1e-3)
    assert float(one_vs_rest_margin(frame)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("K", "D", "cosine"), [(40, 10, 1 / 6), (100, 32, 0.081)])
def test_search_reaches_the_annealed_values(K, D, cosine):
    frame = code(K, D, steps=800, restarts=1)
    assert max_cosine(frame) < cosine + 1e-3
    assert max_cosine(frame) > cosine - 0.01
    margin = float(one_vs_rest_margin(frame))
    assert margin >= 1 - max_cosine(frame) - 1e-8  # w_k itself is a direction
    assert margin <= 1  # as for every K ≥ D + 2


@pytest.mark.parametrize(("K", "D"), [(4, 3), (8, 6), (5, 2), (9, 3)])
def test_code_is_a_frame_and_the_seed_decides(K, D):
    options = {"steps": 30, "restarts": 2}
    for dtype in (torch.float32, torch.float64):
        check_frame(code(K, D, dtype=dtype, **options))
    frame = code(K, D, **options)
    assert frame.shape == (K, D)
    assert torch.equal(frame, code(K, D, **options))
    assert not torch.equal(frame, code(K, D, seed=1, **options))
    assert torch.equal(frame.float(), code(K, D, dtype=torch.float32, **options))
    with torch.inference_mode():
        assert torch.equal(frame, code(K, D, **options))
    state = torch.get_rng_state()
    code(K, D, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_search_returns_the_best_start_and_gains_by_steps():
    K, D = 32, 6  # K·D is a multiple of 16: torch then draws the same numbers in any split
    margins = [float(one_vs_rest_margin(code(K, D, steps=n, restarts=4))) for n in (20, 80, 400)]
    assert margins == sorted(margins)
    generator = seeded(0)
    alone = [_search_code(K, D, 80, 1, generator) for _ in range(4)]
    frame = code(K, D, steps=80, restarts=4)
    assert min(float((frame - one).abs().max()) for one in alone) < 1e-6
    assert margins[1] > max(float(one_vs_rest_margin(one)) for one in alone) - 1e-3


def test_code_errors_name_the_way_out():
    with pytest.raises(InputError, match=r"two unit rows, got num_classes = 3.*dim ≥ 2"):
        softmax_code(3, 1)
    for bad in (1, 0, 2.0, True, "10"):
        with pytest.raises(InputError, match="num_classes must be an integer ≥ 2"):
            softmax_code(bad, 5)
    for name in ("dim", "steps", "restarts"):
        for bad in (0, -1, 2.0, True):
            with pytest.raises(InputError, match=f"{name} must be an integer ≥ 1"):
                softmax_code(**{"num_classes": 9, "dim": 3, name: bad})
