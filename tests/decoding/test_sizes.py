import pytest
from hypothesis import given
from hypothesis import strategies as st

from falloff.decoding.sizes import PUBLISHED, check_sizes, cosine_sizes, group_sizes


@pytest.mark.parametrize(("tokens", "steps"), PUBLISHED)
def test_published_lists_are_whole(tokens: int, steps: int) -> None:
    sizes = group_sizes(tokens, steps)
    assert sizes is PUBLISHED[tokens, steps]
    assert (len(sizes), sum(sizes), sizes[0]) == (steps, tokens, 1)
    assert list(sizes) == sorted(sizes)


@pytest.mark.parametrize(("tokens", "steps"), [(256, 12), (256, 20), (1024, 48)])
def test_the_rule_gives_these_published_lists(tokens: int, steps: int) -> None:
    assert cosine_sizes(tokens, steps) == PUBLISHED[tokens, steps]


def test_published_sizes_are_the_cosine_rounded() -> None:
    exact = [0.79, 2.36, 3.92, 5.45, 6.95, 8.41, 9.81, 11.15, 12.43, 13.63]
    exact += [14.74, 15.77, 16.70, 17.53, 18.25, 18.86, 19.36, 19.73, 19.98, 20.10]
    assert group_sizes(256, 20) == tuple(map(round, exact))


def test_the_rule_on_64_tokens() -> None:
    assert cosine_sizes(64, 5) == (1, 10, 15, 18, 20)


@given(st.data())
def test_the_rule_sums_up_and_never_falls(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 400))
    steps = data.draw(st.integers(2, tokens))
    sizes = cosine_sizes(tokens, steps)
    check_sizes(sizes, tokens)
    assert len(sizes) == steps
    assert list(sizes) == sorted(sizes)


def test_as_many_steps_as_tokens_is_one_by_one() -> None:
    assert group_sizes(256, 256) == (1,) * 256
    assert group_sizes(1, 1) == (1,)


@pytest.mark.parametrize("steps", [0, 1, 17])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"16 tokens are decoded in 2 to 16 steps, got {steps}"):
        group_sizes(16, steps)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 4, 4, 4), "the first group is one token, got group sizes"),
        ((), "the first group is one token"),
        ((1, 5, 9), r"decodes 16 tokens, the group sizes sum to 15: \[1, 5, 9\]"),
        ((1, 0, 15), "at least one token"),
    ],
)
def test_wrong_sizes_are_refused(sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sizes(sizes, 16)
