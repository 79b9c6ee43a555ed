import pytest
import torch

from falloff.decoding.sampling import Guidance, Sampler, guided


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def frequencies(sampler: Sampler, logits: list[float], draws: int = 4000) -> list[float]:
    drawn = sampler(torch.tensor(logits).expand(1, draws, -1), seed(0))
    return (torch.bincount(drawn[0], minlength=len(logits)) / draws).tolist()


def test_linear_scales_rise_with_the_place() -> None:
    scales = Guidance(scale=4.8).scales(256)
    assert scales[0] == 1
    assert float(scales[255]) == pytest.approx(1 + 3.8 * 255 / 256)
    assert (scales.diff() > 0).all()
    assert Guidance(scale=3, schedule="constant").scales(4).tolist() == [3] * 4


def test_scale_one_is_the_class_alone_bit_for_bit() -> None:
    cond, uncond = torch.randn(2, 3, 4, 5, generator=seed(0)).unbind()
    assert torch.equal(guided(cond, uncond, Guidance(scale=1.0).scales(4)), cond)
    assert torch.equal(guided(cond, uncond, Guidance(scale=9.0).scales(4))[:, 0], cond[:, 0])


def test_differences_are_taken_in_single_precision() -> None:
    cond, uncond = torch.randn(2, 1, 1, 500, generator=seed(0)).bfloat16().unbind()
    expected = uncond.float() + 3 * (cond.float() - uncond.float())
    torch.testing.assert_close(guided(cond, uncond, torch.tensor([3.0])), expected, rtol=1e-5, atol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert frequencies(Sampler(), logits.tolist()) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    hot = (logits / 2).softmax(dim=0).tolist()
    assert frequencies(Sampler(temperature=2), logits.tolist()) == pytest.approx(hot, abs=0.03)


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert frequencies(Sampler(top_k=2), logits) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert frequencies(Sampler(top_p=0.6), logits) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert frequencies(Sampler(top_p=0.4), logits) == [0, 1, 0, 0]
    assert frequencies(Sampler(temperature=0), logits) == [0, 1, 0, 0]


def test_own_generators_make_an_image_independent_of_its_company() -> None:
    logits = torch.randn(3, 6, 9, generator=seed(9))
    together = Sampler()(logits, [seed(i) for i in range(3)])
    assert torch.equal(together[1:2], Sampler()(logits[1:2], [seed(1)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature = -1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_p": 2}, "top_p = 2"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(**settings)  # type: ignore[arg-type]  # wrong on purpose


def test_wrong_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance scale = -0\.1 is negative"):
        Guidance(scale=-0.1)
    with pytest.raises(ValueError, match="'cosine' must be linear or constant"):
        Guidance(schedule="cosine")  # type: ignore[arg-type]  # wrong on purpose
