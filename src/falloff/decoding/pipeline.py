"""LPD as a diffusers pipeline: from class labels to images, or from an image and a mask to a changed image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from falloff.decoding.order import Locality, OrderName, make_orders
from falloff.decoding.sampling import Generators, Guidance, Sampler
from falloff.decoding.sizes import group_sizes
from falloff.decoding.static import StaticSteps
from falloff.decoding.steps import UNKNOWN, decode
from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.transformer import LPDTransformer

OnStepEnd = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


class LPDPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is not typed
    """Class-conditional images by Locality-aware Parallel Decoding (arXiv:2507.01957).

    ``transformer`` decodes tokens, ``vae`` turns them into pixels.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: LPDTransformer, vae: VQTokenizer) -> None:
        super().__init__()
        if transformer.config.vocabulary != vae.config.codes:
            raise ValueError(
                f"the transformer knows {transformer.config.vocabulary} tokens and the tokenizer "
                f"{vae.config.codes} codes; they do not belong together"
            )
        self.register_modules(transformer=transformer, vae=vae)
        self.image_processor = VaeImageProcessor(do_resize=False, vae_latent_channels=0)
        self._compiled: StaticSteps | None = None

    def compile_decoding(self, **options: Any) -> None:
        """From now on decode by compiled steps of one shape, for which the next call takes long.

        ``options``: those of ``torch.compile``; on a GPU ``mode="reduce-overhead"`` makes CUDA graphs of the steps.
        Sizes of batch, another largest group or another data type are compiled anew. Raises ``ValueError`` for a
        transformer that is moved to its device layer by layer or call by call.
        """
        if hasattr(self.transformer, "_hf_hook"):
            raise ValueError("the transformer is offloaded, which no compiled step can be; keep it on its device")
        self._compiled = StaticSteps(self.transformer, **options)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 4.8,
        guidance_schedule: Literal["linear", "constant"] = "linear",
        order: OrderName | Tensor = "locality",
        locality: Locality | None = None,
        sizes: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        image: Any = None,
        mask: Any = None,
        generator: Generators = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Any:
        """One image per label.

        num_inference_steps: groups of tokens, of the published or cosine sizes, unless ``sizes`` gives them.
        guidance_scale, guidance_schedule: see ``Guidance``; 1 is none, and half the work.
        order: see ``make_orders``; a distinct one is drawn for each image, by the rule ``locality``. Or the orders
            themselves, int64 [labels, tokens].
        temperature, top_k, top_p: see ``Sampler``.
        image, mask: change an image (one for all labels, or one each; PIL, NumPy in [0, 1] or tensor in [0, 1]) where
            the mask [height, width] is set: tokens with a masked pixel are decoded anew, which takes fewer steps.
        generator: one, or one for each label, which then does not depend on its company.
        output_type: "latent" are the codes, int64 [labels, height, width] of the grid.
        callback_on_step_end: called as (pipeline, step, step, {}) after every step.

        Returns an ``ImagePipelineOutput``, or a tuple of the images. Raises ``ValueError`` for what does not fit.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        device = self._execution_device
        guidance = Guidance(scale=guidance_scale, schedule=guidance_schedule)
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        sizes = tuple(sizes) if sizes is not None else group_sizes(self.transformer.tokens, num_inference_steps)
        _check_generators(generator, len(labels))
        if (image is None) != (mask is None):
            raise ValueError("changing an image takes both image and mask, got one of them")
        known = None if image is None else self._known_tokens(image, self._unmasked(mask), len(labels))

        orders = self._orders(order, sizes, len(labels), generator, locality, known)
        with self.progress_bar(total=_steps(sizes, known)) as bar:

            def on_step(number: int) -> None:
                if callback_on_step_end is not None:
                    callback_on_step_end(self, number, number, {})
                bar.update()

            tokens = decode(
                self.transformer,
                torch.tensor(labels, device=device),
                orders,
                sizes,
                guidance=guidance,
                sampler=sampler,
                generator=generator,
                known_BN=None if known is None else known.flatten(1),
                on_step=on_step,
                compiled=self._compiled,
            )
        images = self.draw(tokens.reshape(-1, *self._grid), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def draw(self, codes_BHW: Tensor, output_type: str = "pil") -> Any:
        """Images of codes, int64 [images, height, width] of the grid; ``output_type`` as of a call."""
        if output_type == "latent":
            return codes_BHW
        pixels = self.vae.decode(codes_BHW).float().clamp(-1, 1)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @property
    def _grid(self) -> tuple[int, int]:
        return self.transformer.config.grid_height, self.transformer.config.grid_width

    def _orders(
        self,
        order: OrderName | Tensor,
        sizes: Sequence[int],
        count: int,
        generator: Generators,
        locality: Locality | None,
        known: Tensor | None,
    ) -> Tensor:
        if isinstance(order, Tensor):
            return order
        known_HW = None if known is None else known[0] != UNKNOWN
        sources = [(g, 1) for g in generator] if isinstance(generator, Sequence) else [(generator, count)]
        drawn = [
            make_orders(order, *self._grid, sizes, many, source, locality=locality, known_HW=known_HW)
            for source, many in sources
        ]
        return torch.cat(drawn)

    def _unmasked(self, mask: Any) -> Tensor:
        """Boolean [grid height, grid width]: tokens without a masked pixel."""
        pixels = mask.cpu() if isinstance(mask, Tensor) else torch.as_tensor(np.array(mask))
        factor = self.vae.factor
        height, width = (factor * side for side in self._grid)
        if tuple(pixels.shape) != (height, width):
            raise ValueError(f"the mask must be [{height}, {width}] pixels, got {list(pixels.shape)}")
        # 8-bit pictures are set above the middle, as are masks of fractions; booleans where true
        level = 127 if pixels.dtype == torch.uint8 else 0.5
        in_tokens = (pixels > level).reshape(height // factor, factor, width // factor, factor)
        return ~in_tokens.any(dim=3).any(dim=1)

    def _known_tokens(self, image: Any, unmasked_HW: Tensor, count: int) -> Tensor:
        """Codes of the image, [count, grid height, grid width], ``UNKNOWN`` where masked."""
        factor = self.vae.factor
        pixels = self.image_processor.preprocess(image)
        expected = [self.vae.config.channels, *(factor * side for side in self._grid)]
        if list(pixels.shape[1:]) != expected or len(pixels) not in (1, count):
            raise ValueError(
                f"image must be 1 or {count} pictures of [channels, height, width] = {expected}, "
                f"got {list(pixels.shape)}"
            )
        codes = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).cpu()
        known: Tensor = codes.expand(count, -1, -1).masked_fill(~unmasked_HW, UNKNOWN)
        return known


def _steps(sizes: Sequence[int], known: Tensor | None) -> int:
    """Groups that are not known from beginning to end."""
    given = 0 if known is None else int((known[0] != UNKNOWN).sum())
    return int((np.cumsum(sizes) > given).sum())


def _check_generators(generator: Generators, count: int) -> None:
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"{count} labels need as many generators or a single one, got {len(generator)}")
