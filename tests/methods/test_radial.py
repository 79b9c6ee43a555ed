"""Radial Attention against the published code's counts, brute force, and its own promises."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from falloff.geometry import Grid, Sequence, inverse
from falloff.geometry import order as token_order
from falloff.methods import Call, Dense, Radial, State
from falloff.methods.coverage import disc_runs, reference_cells
from falloff.plan import Plan

EMPTY = torch.empty(0)


def sequence(frames: int, tokens: int, text: int = 0, text_side: str = "after") -> Sequence:
    return Sequence(Grid(frames, 1, tokens), text, text_side)


def reference(decay: float, block: int, **settings: object) -> Radial:
    return Radial(decay=decay, block=block, mode="reference", frame_drop="published", **settings)


def plan(method: Radial, tokens: Sequence) -> Plan:
    made = method.plan(Call(sequence=tokens), EMPTY, EMPTY, EMPTY, State())
    assert isinstance(made, Plan)
    return made


def token_mask(method: Radial, tokens: Sequence) -> np.ndarray:
    """The window, pair by pair, bool [N, N] over the grid's tokens in raster order."""
    grid = tokens.grid
    k = np.arange(grid.tokens)
    frame, inside = k // grid.frame_tokens, k % grid.frame_tokens
    y, x = inside // grid.width, inside % grid.width
    distance = abs(frame[:, None] - frame)
    width = np.array([-1 if w is None else w for w in method.widths(tokens)])[distance]
    if method.window == "band":
        allowed = abs(inside[:, None] - inside) <= width
    else:
        squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
        allowed = (width >= 0) & ((squared <= (2 * width + 1) / math.pi) | (width >= grid.frame_tokens))
    return allowed | (frame < method.sink_frames)[None, :]


# Published counts (arXiv:2506.19852 reference code), on / total blocks.
@pytest.mark.parametrize(
    ("frames", "tokens", "method", "on", "total"),
    [
        (6, 256, reference(0.2, 64), 470, 576),
        (6, 256, reference(0.2, 64, neighbour="half"), 452, 576),
        (16, 128, reference(0.95, 64, sink_frames=0), 456, 1024),
        (5, 192, reference(1.0, 64, sink_frames=0), 173, 225),
        (9, 200, reference(1.0, 64, sink_frames=0), 481, 841),
        (40, 96, reference(0.5, 32), 711, 14400),
        (18, 3840, reference(0.2, 128), 83728, 291600),
        (18, 3840, reference(0.2, 128, neighbour="half"), 76798, 291600),
        (30, 3840, reference(1.0, 128, sink_frames=0), 237484, 810000),
        (30, 3840, reference(0.95, 128, sink_frames=0), 222452, 810000),
        (64, 3600, reference(1.0, 128), 621078, 3240000),
    ],
)
def test_reference_mode_has_the_published_blocks(frames: int, tokens: int, method: Radial, on: int, total: int) -> None:
    blocks = method.block_map(sequence(frames, tokens))
    assert (int(blocks.sum()), blocks.size) == (on, total)


@pytest.mark.parametrize(
    ("tokens", "decay", "expected"),
    [
        (1560, 1.0, [512, 256, 128, 128, 128]),
        (3600, 1.0, [1024, 512, 256, 128, 128]),
        (3840, 1.0, [1024, 512, 256, 128, 128]),
        (3840, 0.95, [972, 486, 243, 128, 128]),
        (3600, 0.2, [204, 128, 128, 128, 128]),
    ],
)
def test_widths_are_the_published_ones(tokens: int, decay: float, expected: list[int]) -> None:
    widths = reference(decay, 128).widths(sequence(33, tokens))
    assert [widths[d] for d in (2, 4, 8, 16, 32)] == expected
    assert widths[0] == widths[1] == tokens
    assert reference(decay, 128, neighbour="half").widths(sequence(2, tokens)) == [tokens, tokens // 2]


def test_published_frame_drop() -> None:
    widths = reference(1.0, 128).widths(sequence(37, 1560))
    kept = {d: widths[d] is not None for d in (16, 17, 18, 32, 34, 36)}
    assert kept == {16: True, 17: False, 18: True, 32: True, 34: False, 36: True}
    widths = reference(1.0, 128).widths(sequence(70, 3600))
    assert [d for d in range(30, 70) if widths[d] is not None] == [30, 31, *range(32, 64, 2), 64, 68]
    assert reference(1.0, 32).widths(sequence(40, 96)) == [96] + [None] * 39


def test_scaled_frame_drop_keeps_every_block_over_width() -> None:
    widths = Radial(block=64, decay=0.2).widths(sequence(21, 256))
    kept = [d for d, width in enumerate(widths) if width is not None]
    base = {d: 0.2 * 512 / 2 ** d.bit_length() for d in range(2, 21)}
    assert kept == [0, 1, *(d for d in base if base[d] >= 64 or d % int(64 / base[d]) == 0)] == [0, 1, 2, 5, 10, 20]


def test_shrink_rule_has_a_closed_form_when_frames_are_aligned() -> None:
    for width in range(21, 769):
        cells = reference_cells(width, 0, 0, tokens=16 * 128, block=128)
        a = np.arange(16)
        assert (cells == (abs(a[:, None] - a) <= (width + 22) // 128)).all(), width
    for width in range(21):
        assert not reference_cells(width, 0, 0, tokens=16 * 128, block=128).diagonal().any(), width


GRIDS = st.builds(Grid, st.integers(1, 9), st.integers(1, 9), st.integers(1, 13))
METHODS = st.builds(
    lambda decay, block, tau, neighbour, sink, drop, window: Radial(
        decay=decay, block=block, tau=tau, neighbour=neighbour, sink_frames=sink, frame_drop=drop, **window
    ),
    st.floats(0, 1),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["full", "half", "decayed"]),
    st.integers(0, 2),
    st.sampled_from(["block", "published"]),
    st.sampled_from([{}, {"window": "disc"}, {"window": "disc", "order": "hilbert"}]),
)


@settings(deadline=None, max_examples=150)
@example(grid=Grid(9, 10, 20), method=Radial(decay=1.0, block=64), text=0, side="after")
@given(grid=GRIDS, method=METHODS, text=st.integers(0, 20), side=st.sampled_from(["after", "before"]))
def test_coverage_equals_brute_force(grid: Grid, method: Radial, text: int, side: str) -> None:
    tokens = Sequence(grid, text, side)
    block = method.block_size(tokens)
    allowed = token_mask(method, tokens)
    if method.order == "hilbert":
        hilbert = token_order("hilbert", grid).numpy()
        allowed = allowed[hilbert][:, hilbert]
    whole = np.zeros((tokens.tokens, tokens.tokens), dtype=np.int64)
    video = slice(tokens.video_start, tokens.video_start + grid.tokens)
    whole[video, video] = allowed
    cuts = np.arange(0, tokens.tokens, block)
    expected = np.add.reduceat(np.add.reduceat(whole, cuts, axis=0), cuts, axis=1)
    assert (method.coverage(tokens) == expected).all()


@settings(deadline=None, max_examples=100)
@given(grid=GRIDS, method=METHODS, text=st.integers(0, 20), side=st.sampled_from(["after", "before"]))
def test_every_plan_is_complete_and_keeps_frame_sink_and_text(grid: Grid, method: Radial, text: int, side: str) -> None:
    tokens = Sequence(grid, text, side)
    mask = plan(method, tokens).mask()[0, 0].numpy()
    position = np.arange(tokens.tokens) - tokens.video_start
    frame = np.where((position >= 0) & (position < grid.tokens), position // grid.frame_tokens, -1)
    own = (frame[:, None] == frame) & (frame >= 0)
    sink = (frame >= 0) & (frame < method.sink_frames)
    assert mask[own].all()
    assert mask[frame >= 0][:, sink].all()
    assert mask[frame < 0].all()
    assert mask[:, frame < 0].all()


def test_smaller_tau_computes_more_and_decay_is_monotone() -> None:
    tokens = sequence(9, 200)
    maps = [Radial(block=64, tau=tau, frame_drop="published").block_map(tokens) for tau in (0.0, 0.1, 0.25, 0.5)]
    assert all((more | less == more).all() for more, less in itertools.pairwise(maps))
    assert maps[0].sum() > maps[-1].sum()
    for drop in ("published", "block"):
        maps = [
            Radial(block=16, decay=d, frame_drop=drop).block_map(sequence(17, 256)) for d in (1.0, 0.5, 0.25, 0.1, 0.0)
        ]
        assert all(wide.sum() >= narrow.sum() for wide, narrow in itertools.pairwise(maps))
        assert maps[0].sum() > maps[-1].sum()
        if drop == "published":  # which keeps the same frames whatever the decay
            assert all((wide | narrow == wide).all() for wide, narrow in itertools.pairwise(maps))


def test_frame_edges_see_their_whole_frame() -> None:
    tokens = Sequence(Grid(16, 45, 80))
    own = np.repeat(np.arange(16), 3600)

    def least_own_share(blocks: np.ndarray) -> float:
        touched = np.stack([np.bincount(np.flatnonzero(own == i) // 128, minlength=450) for i in range(16)])
        seen = blocks.astype(np.int64) @ touched.T
        return float(min((seen[np.flatnonzero(own == i) // 128, i] / 3600).min() for i in range(16)))

    assert least_own_share(Radial(block=128).block_map(tokens)) == 1.0
    half = reference(0.2, 128, neighbour="half").block_map(tokens)
    assert least_own_share(half) == pytest.approx(0.538, abs=0.001)


# Spec sheet section 4.2: densities in percent of all blocks at tau = 0.25, published widths and frame drop.
@pytest.mark.parametrize(
    ("frames", "tokens", "settings", "percent"),
    [
        (21, 1560, {"decay": 1.0}, 44.9),
        (21, 1560, {"decay": 0.2}, 34.4),
        (21, 3600, {"decay": 1.0}, 40.1),
        (33, 3600, {"decay": 0.95, "sink_frames": 0}, 27.4),
        (81, 1560, {"decay": 0.2}, 16.1),
        (128, 3600, {"decay": 0.2}, 9.1),
    ],
)
def test_density_of_known_sizes(frames: int, tokens: int, settings: dict[str, float], percent: float) -> None:
    method = Radial(block=128, frame_drop="published", **settings)
    density = 100 * method.block_map(sequence(frames, tokens)).mean()
    assert percent - 0.05 <= density <= percent + 0.3  # blocks that are always on may cost 0.3 points


ENERGY = [(1.0, 0.05), (0.3, 0.1), (0.3, 0.2), (0.1, 0.5)]


@pytest.mark.parametrize(("height", "width"), [(30, 52), (45, 80)])
def test_disc_in_hilbert_order_keeps_more_energy_than_the_published_map(height: int, width: int) -> None:
    tokens = Sequence(Grid(21, height, width))
    code = plan(reference(0.2, 128), tokens)
    disc = plan(Radial(block=128, window="disc", order="hilbert", frame_drop="published"), tokens)
    assert disc.density <= code.density + 0.01
    queries = torch.randint(tokens.tokens, (96,), generator=torch.Generator().manual_seed(0))
    seen_by_disc, seen_by_code = seen_keys(disc, queries), seen_keys(code, queries)
    for alpha, beta in ENERGY:
        energy = model_energy(tokens.grid, queries, alpha, beta)
        assert energy[seen_by_disc].sum() >= energy[seen_by_code].sum(), (alpha, beta)


def seen_keys(made: Plan, queries: torch.Tensor) -> torch.Tensor:
    """Rows of the plan's mask, bool [queries, N], tokens in raster order."""
    position = torch.arange(made.q_len) if made.q_order is None else inverse(made.q_order)
    return made.blocks.dense()[0, 0][position[queries] // 128][:, position // 128]


def model_energy(grid: Grid, queries: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """exp(-alpha dt - beta dist) of every key, each row summing to 1, [queries, N]."""
    k = torch.arange(grid.tokens)
    t, y, x = k // grid.frame_tokens, k // grid.width % grid.height, k % grid.width
    distance = torch.hypot((y[queries, None] - y).float(), (x[queries, None] - x).float())
    return torch.softmax(-alpha * (t[queries, None] - t).abs() - beta * distance, dim=1)


# Paper Eq. 4 without sink: allowed[i, k, j, l] iff |k - l| + 1 <= s / g, or d mod ceil(g / s) = 0 and k = l.
@pytest.mark.parametrize(("frames", "tokens", "pairs"), [(12, 16, 21816), (20, 4, 2412), (7, 9, 2757), (40, 3, 2766)])
def test_equation_four_counts(frames: int, tokens: int, pairs: int) -> None:
    """Blocks of one token are Eq. 4 but for the outermost diagonals of every band, which it leaves out.

    At 40 frames of 3 tokens bands are narrower than a token, and keep every 4th frame where Eq. 4 keeps every 3rd:
    S2 is a power of two above s.
    """
    i, k = np.divmod(np.arange(frames * tokens), tokens)
    d, apart = abs(i[:, None] - i), abs(k[:, None] - k)
    g = 2 ** np.floor(np.log2(np.maximum(d, 1))).astype(np.int64)
    allowed = ((g <= tokens) & (apart + 1 <= tokens / g)) | ((d % -(-g // tokens) == 0) & (apart == 0))
    bound = 4 * tokens**2 * frames * int(math.log2(frames))
    assert allowed.sum() == pairs <= bound
    method = Radial(decay=1.0, block=1, tau=0.0, neighbour="decayed", sink_frames=0)
    coverage = method.coverage(sequence(frames, tokens))
    assert (coverage == coverage.T).all()
    assert coverage.sum() <= bound
    widths = np.array([0 if width is None else width for width in method.widths(sequence(frames, tokens))])
    inside = (coverage == 1) & ((d < 2) | (apart < widths[d]))
    known = d < 8 if tokens == 3 else d >= 0
    assert (inside == allowed)[known].all()


@pytest.mark.parametrize(("frames", "bands"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (12, 7), (33, 11)])
def test_bands_double_in_distance(frames: int, bands: int) -> None:
    """2 ceil(log2 max(f, 2)) - 1 widths, each on both sides but the one in the middle."""
    widths = Radial(decay=1.0, block=1, sink_frames=0).widths(sequence(frames, 2000))
    assert None not in widths
    assert 2 * len(set(widths)) - 1 == bands
    assert bands == 2 * math.ceil(math.log2(max(frames, 2))) - 1


def test_disc_has_about_the_budget_of_its_band() -> None:
    for band in (128, 512, 2048):
        assert sum(2 * half + 1 for _, half in disc_runs(band)) == pytest.approx(2 * band + 1, rel=0.05)


def test_auto_block_follows_the_frame() -> None:
    sizes = {tokens: Radial().block_size(sequence(3, tokens)) for tokens in (91, 220, 256, 880, 1560)}
    assert sizes == {91: 32, 220: 32, 256: 64, 880: 128, 1560: 128}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.5}, r"decay = 1.5 is outside 0.0 to 1.0"),
        ({"tau": -0.1}, r"tau = -0.1 is outside"),
        ({"block": 0}, r"block = 0 must be a number of tokens"),
        ({"sink_frames": -1}, r"sink_frames = -1 is negative"),
        ({"window": "square"}, r"window = 'square' must be one of band, disc"),
        ({"order": "hilbert"}, r"window = 'band' .* needs order='raster'"),
        ({"mode": "reference"}, r"needs window='band'"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Radial(**settings)


def test_settings_round_trip() -> None:
    method = Radial(decay=0.5, block=64, window="disc", order="hilbert")
    assert Radial(**method.settings()) == method
    assert dataclasses.replace(method, decay=0.2) != method


def test_reference_mode_refuses_text_before_the_video() -> None:
    answer = reference(0.2, 32).plan(Call(sequence=sequence(3, 64, 8, "before")), EMPTY, EMPTY, EMPTY, State())
    assert isinstance(answer, Dense)
