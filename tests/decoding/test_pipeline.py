from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import HEIGHT, SIZES, TOKENS, WIDTH, model, orders, seed, tokenizer
from PIL import Image

from falloff.decoding import Locality, LPDPipeline, Sampler, decode


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    made = LPDPipeline(model(torch.float32), tokenizer())
    made.set_progress_bar_config(disable=True)
    return made


def test_makes_pictures(pipe: LPDPipeline) -> None:
    images = pipe([0, 3], 5, generator=seed(0)).images
    assert [image.size for image in images] == [(4 * WIDTH, 4 * HEIGHT)] * 2
    arrays = pipe([0, 3], 5, generator=seed(0), output_type="np", return_dict=False)[0]
    np.testing.assert_allclose(arrays, np.stack([np.asarray(image) for image in images]) / 255, atol=0.51 / 255)
    assert not np.array_equal(arrays[0], arrays[1])


def test_saves_and_loads(pipe: LPDPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    again = LPDPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    calls = [p(2, 5, generator=seed(3), output_type="latent").images for p in (pipe, again)]
    assert torch.equal(*calls)


@pytest.mark.parametrize("order", ["locality", "planned", "halton", "random", "raster"])
def test_a_picture_with_its_own_generator_does_not_depend_on_its_company(pipe: LPDPipeline, order: str) -> None:
    together = pipe([1, 2], 6, order=order, generator=[seed(0), seed(1)], output_type="latent").images
    alone = pipe(2, 6, order=order, generator=[seed(1)], output_type="latent").images
    assert torch.equal(together[1:], alone)
    assert together.shape == (2, HEIGHT, WIDTH)


def test_settings_reach_the_draw(pipe: LPDPipeline) -> None:
    plain = pipe([0, 1], 5, generator=seed(0), output_type="latent").images
    changes = (
        {"guidance_scale": 1.0},
        {"guidance_schedule": "constant"},
        {"sizes": (1,) * TOKENS},
        {"locality": Locality(repulsion=0, proximity=0)},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_p": 0.1},
    )
    for change in changes:
        other = pipe([0, 1], 5, generator=seed(0), output_type="latent", **change).images
        assert not torch.equal(plain, other), change


def test_tells_of_each_step(pipe: LPDPipeline) -> None:
    told: list[int] = []

    def note(sender: object, step: int, timestep: int, tensors: dict[str, object]) -> dict[str, object]:
        assert sender is pipe
        told.append(step)
        return tensors

    pipe(0, 6, callback_on_step_end=note)
    assert told == list(range(6))


def picture() -> torch.Tensor:
    return torch.rand(3, 4 * HEIGHT, 4 * WIDTH, generator=seed(5))


def test_changes_an_image_where_masked(pipe: LPDPipeline) -> None:
    """Inpainting, and a change of class of the masked part: all else keeps its tokens."""
    mask = torch.zeros(4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    mask[5, 9] = True  # one pixel of token (1, 2)
    mask[8:, :] = True  # the last row of tokens
    codes = pipe.vae.encode(picture()[None] * 2 - 1)[0]
    steps: list[int] = []
    changed = pipe(
        [0, 3],
        5,
        image=picture()[None],
        mask=mask,
        generator=seed(0),
        output_type="latent",
        callback_on_step_end=lambda *told: steps.append(told[1]) or {},
    ).images
    masked = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    masked[1, 2] = masked[2] = True
    assert torch.equal(changed[:, ~masked], codes[~masked].expand(2, -1))
    assert not torch.equal(changed[0][masked], changed[1][masked])
    assert len(steps) == 2  # sizes 1 2 3 4 5; nine tokens are known


def test_a_picture_is_drawn_around_a_known_part(pipe: LPDPipeline) -> None:
    """Outpainting: the middle stays, whatever the class; what is drawn around it depends on the class."""
    mask = torch.ones(4 * HEIGHT, 4 * WIDTH, dtype=torch.bool)
    mask[4:8, 4:16] = False  # tokens (1, 1) to (1, 3)
    codes = pipe.vae.encode(picture()[None] * 2 - 1)[0]
    given = {"image": picture()[None], "mask": mask, "top_k": 1}
    drawn = [pipe(label, 5, generator=seed(0), output_type="latent", **given).images[0] for label in (0, 3)]
    for each in drawn:
        assert torch.equal(each[1, 1:4], codes[1, 1:4])
    assert not torch.equal(*drawn)
    images = pipe(3, 5, generator=seed(0), output_type="pt", **given).images
    torch.testing.assert_close(images, (pipe.vae.decode(drawn[1][None]).clamp(-1, 1) + 1) / 2)


def test_draws_in_given_orders(pipe: LPDPipeline) -> None:
    places = orders(2)
    drawn = pipe([0, 3], 5, order=places, guidance_scale=1.0, top_k=1, output_type="latent").images
    expected = decode(pipe.transformer, torch.tensor([0, 3]), places, SIZES, sampler=Sampler(temperature=0))
    assert torch.equal(drawn.flatten(1), expected)


def test_takes_pictures_and_masks_of_any_kind(pipe: LPDPipeline) -> None:
    as_bytes = (picture().permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    mask = np.zeros((4 * HEIGHT, 4 * WIDTH), dtype=np.uint8)
    mask[:4] = 255
    ways = (
        (Image.fromarray(as_bytes), Image.fromarray(mask)),
        (as_bytes[None] / np.float32(255), mask > 0),
        (torch.from_numpy(as_bytes).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask / 255.0)),
    )
    made = [pipe(1, 5, image=i, mask=m, generator=seed(0), output_type="latent").images for i, m in ways]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": 4}, r"classes 0 to 3, got \[4\]"),
        ({"class_labels": -1}, r"classes 0 to 3, got \[-1\]"),
        ({"class_labels": 0, "num_inference_steps": 16}, "15 tokens are decoded in 2 to 15 steps, got 16"),
        ({"class_labels": 0, "sizes": (1, 13)}, "decodes 15 tokens, the group sizes sum to 14"),
        ({"class_labels": 0, "sizes": (3, 12)}, "first group is one token"),
        ({"class_labels": 0, "guidance_scale": -1.0}, "guidance scale = -1.0 is negative"),
        ({"class_labels": 0, "order": torch.zeros(2, 15)}, r"need orders \[1, 15\], got \[2, 15\]"),
        ({"class_labels": 0, "order": "spiral"}, "unknown decoding order 'spiral'"),
        ({"class_labels": [0, 1], "generator": [seed(0)]}, "2 labels need as many generators or a single one, got 1"),
        ({"class_labels": 0, "image": picture()[None]}, "both image and mask"),
        (
            {"class_labels": 0, "image": picture()[None], "mask": torch.zeros(12, 16)},
            r"mask must be \[12, 20\] pixels, got \[12, 16\]",
        ),
        (
            {"class_labels": 0, "image": picture()[None, :, :8], "mask": torch.zeros(12, 20)},
            r"1 or 1 pictures of \[channels, height, width\] = \[3, 12, 20\], got \[1, 3, 8, 20\]",
        ),
        ({"class_labels": 0, "image": picture()[None], "mask": torch.zeros(12, 20)}, "nothing to decode"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: LPDPipeline, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(**{"num_inference_steps": 5, **arguments})


def test_offloaded_parts_are_brought_back_before_they_run() -> None:
    """Every part runs behind the hook that offloading hangs on it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    called = []

    class Note(ModelHook):
        def pre_forward(self, module, *args, **kwargs):  # type: ignore[no-untyped-def]  # as in diffusers
            called.append(type(module).__name__)
            return args, kwargs

    pipe = LPDPipeline(model(torch.float32), tokenizer())
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae):
        add_hook_to_module(part, Note())
    pipe(0, 5, image=picture()[None], mask=torch.ones(4 * HEIGHT, 4 * WIDTH))
    assert called == ["VQTokenizer", *["LPDTransformer"] * 5, "VQTokenizer"]


def test_parts_of_other_codebooks_are_refused() -> None:
    with pytest.raises(ValueError, match="knows 11 tokens and the tokenizer 12 codes"):
        LPDPipeline(model(), tokenizer(codes=12))


def test_names_of_the_package_are_what_they_say() -> None:
    """A module of the same name would stand before a function as soon as it is imported."""
    import falloff.decoding

    for name in falloff.decoding.__all__:
        assert callable(getattr(falloff.decoding, name)), name
