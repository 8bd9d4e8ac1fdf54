import math

import pytest
import torch

from ncmethods._core import InputError
from ncmethods.frames import simplex_etf, softmax_code, spread
from ncmethods.frames.codes import _pair_gaps, _rest_gaps, _search
from ncmethods.metrics.margin import one_vs_rest_margin
from ncmethods.testing import check_frame


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NCMETHODS_CACHE", str(tmp_path))
    return tmp_path / "frames"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def simplex_gram(K):
    return torch.eye(K, dtype=torch.float64) * K / (K - 1) - 1 / (K - 1)


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
    frame = _search(_rest_gaps, K, D, 600, 8, seeded(0))
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
    margins = [float(one_vs_rest_margin(code(K, D, steps=n, restarts=4))) for n in (20, 80, 240)]
    assert margins == sorted(margins)
    generator = seeded(0)
    alone = [_search(_rest_gaps, K, D, 80, 1, generator) for _ in range(4)]
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


# --- spread --------------------------------------------------------------------------------------


def far(K, D, *, seed=0, dtype=torch.float64, **options):
    return spread(K, D, generator=seeded(seed), dtype=dtype, **options)


@pytest.mark.parametrize(("K", "D"), [(2, 1), (4, 3), (12, 10), (20, 10), (7, 2)])
def test_spread_shares_the_closed_forms(K, D):
    frame = far(K, D)
    assert torch.equal(frame, code(K, D))
    rankin = -1 / (K - 1) if K <= D + 1 else 0 if K <= 2 * D else math.cos(2 * math.pi / K)
    assert max_cosine(frame) == pytest.approx(rankin, abs=1e-12)


@pytest.mark.parametrize(
    ("K", "D", "cosine"),
    [
        (5, 3, 0),  # Rankin, by search
        # Tammes problem, proven. Angles of 7, 10, 13, 14 points: OEIS A383859, A340918, A217695,
        # A383860.
        (7, 3, math.cos(1.35907989763266014)),
        (8, 3, (math.sqrt(8) - 1) / 7),  # square antiprism, 7x² + 2x − 1
        (9, 3, 1 / 3),
        (10, 3, math.cos(1.15447983341927074)),
        (12, 3, 1 / math.sqrt(5)),
        (13, 3, math.cos(0.99722359243811916)),
        (14, 3, math.cos(0.97163474288622408)),
        # Snub cube: edge² = 4(2 − t)/(3 − t) of the radius², t the tribonacci constant.
        (24, 3, 1 - 2 * (2 - 1.8392867552141612) / (3 - 1.8392867552141612)),
        # Universally optimal, Cohn and Kumar, arXiv:math/0607446:
        (16, 5, 1 / 5),
        (27, 6, 1 / 4),
    ],
)
def test_spread_finds_known_optima(K, D, cosine):
    frame = _search(_pair_gaps, K, D, 400, 12, seeded(0))
    assert max_cosine(frame) == pytest.approx(cosine, abs=3e-6)
    assert max_cosine(frame) > cosine - 1e-12  # they are optima


def test_spread_reaches_the_annealed_values():
    assert max_cosine(far(40, 10, steps=600, restarts=4)) == pytest.approx(1 / 6, abs=1e-5)
    assert max_cosine(far(100, 32, steps=600, restarts=1)) < 0.081  # random rows: 0.604


def test_half_of_the_starts_begin_cold():
    """13 points in space: from β = 2, as in softmax_code, every start ends at 0.55 or above."""
    frame, code_ = far(13, 3, steps=400, restarts=16), code(13, 3, steps=400, restarts=8)
    assert max_cosine(frame) < max_cosine(code_) - 5e-3
    # The margin is at least 1 − max cos: here the spread frame is the better softmax code, too.
    assert one_vs_rest_margin(frame) > one_vs_rest_margin(code_) + 5e-3


@pytest.mark.parametrize("build", [spread, softmax_code])
def test_search_is_a_frame_and_the_seed_decides(build):
    options = {"steps": 20, "restarts": 3, "cache": False}
    frame = build(9, 3, generator=seeded(0), **options)
    check_frame(frame)
    assert torch.equal(frame, build(9, 3, generator=seeded(0), **options))
    assert not torch.equal(frame, build(9, 3, generator=seeded(1), **options))
    torch.manual_seed(0)
    assert torch.equal(frame, build(9, 3, steps=20, restarts=3))
    for name in ("dim", "steps", "restarts"):
        with pytest.raises(InputError, match=f"{name} must be an integer ≥ 1"):
            build(**{"num_classes": 9, "dim": 3, name: 0})
    with pytest.raises(InputError, match="two unit rows, got num_classes = 3"):
        build(3, 1)


# --- cache ----------------------------------------------------------------------------------------


def draws(build, generator, **options):
    """A frame and what the generator gives after it."""
    return build(9, 3, steps=20, restarts=2, generator=generator, **options), torch.rand(
        3, generator=generator
    )


def test_a_hit_gives_the_same_frame_and_leaves_the_same_generator(own_cache):
    plain, after = draws(spread, seeded(0), cache=False)
    assert not own_cache.exists()
    for files in (1, 1):  # written, then read
        frame, then = draws(spread, seeded(0))
        assert torch.equal(frame, plain)
        assert torch.equal(then, after)
        assert len(list(own_cache.iterdir())) == files


def test_a_hit_does_not_search(own_cache, monkeypatch):
    frame, _ = draws(spread, seeded(0))
    monkeypatch.setattr("ncmethods.frames.codes._search", None)
    assert torch.equal(draws(spread, seeded(0))[0], frame)
    wide = spread(9, 3, steps=20, restarts=2, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(wide.float(), frame)  # float64 lies on disk
    for other in ({"steps": 21}, {"restarts": 3}, {"generator": seeded(1)}, {"num_classes": 10}):
        with pytest.raises(TypeError):
            spread(**({"num_classes": 9, "dim": 3, "steps": 20, "restarts": 2} | {
                "generator": seeded(0)} | other))  # fmt: skip
    with pytest.raises(TypeError):
        draws(softmax_code, seeded(0))


def test_nothing_is_kept_without_a_generator(own_cache):
    spread(9, 3, steps=5, restarts=1)
    spread(6, 3, generator=seeded(0))  # closed form
    assert not own_cache.exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_file_is_written_again(own_cache, damage):
    frame, _ = draws(spread, seeded(0))
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(
        {"cut": whole[:-7], "bit": bytes(flipped), "empty": b"", "text": b"no tensor"}[damage]
    )
    assert torch.equal(draws(spread, seeded(0))[0], frame)
    assert path.read_bytes()[:32] == whole[:32]
    assert [p.name for p in own_cache.iterdir()] == [path.name]  # no temporary file stays


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NCMETHODS_CACHE", str(tmp_path / "file"))
    frame, _ = draws(spread, seeded(0))
    assert torch.equal(frame, draws(spread, seeded(0), cache=False)[0])
