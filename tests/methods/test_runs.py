"""Methods that look at queries and keys, over whole runs: of a tiny random pipeline and of the trained miniature."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import falloff
from falloff import SVG1, SVG2, AdaSpa, Method, Radial, Router, Schedule
from falloff.cli import checkpoint, pipeline

METHODS = [
    SVG2(q_clusters=3, k_clusters=9, mass=0.5, min_share=0.0),
    SVG2(q_clusters=3, k_clusters=9, mass=0.5, min_share=0.0, summary=True),
    SVG2(q_clusters=3, k_clusters=9, mass=0.5, min_share=0.0, span=1),
    AdaSpa(block=8, sparsity=0.6, search_every=2),
    SVG1(block=8, density=0.4),
    Router(candidates=(Radial(block=8), SVG1(block=8))),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{len(str(method))}")
def test_a_run_knows_nothing_of_the_one_before(method: Method) -> None:
    pipe = tiny.t2v()
    dense = tiny.generate(pipe)
    falloff.enable(pipe, method, schedule=Schedule(dense_first=1, dense_layers=()))
    first = tiny.generate(pipe)
    assert falloff.report(pipe).density < 1
    assert falloff.report(pipe).reasons == {"dense first step": 4}
    tiny.generate(pipe, frames=13, guidance=1.0)
    torch.testing.assert_close(tiny.generate(pipe), first, rtol=0, atol=0)
    assert not torch.allclose(first, dense)
    falloff.disable(pipe)
    torch.testing.assert_close(tiny.generate(pipe), dense, rtol=0, atol=0)


def test_the_miniature_is_closer_to_dense_the_more_is_answered() -> None:
    with pipeline.quiet():
        pipe = pipeline.load(checkpoint.find(None))
        pipe.set_progress_bar_config(disable=True)
        dense = latents(pipe)
        errors = {}
        for method in (SVG2(mass=0.6, min_share=0.0), SVG2(mass=0.6, min_share=0.0, summary=True)):
            with falloff.using(pipe, method, schedule=tiny.ALWAYS):
                errors[method.summary] = float((latents(pipe) - dense).norm() / dense.norm())
                report = falloff.report(pipe)
                assert report.density < 0.5
                assert report.reasons == {}
    assert errors[True] < 0.7 * errors[False] < 0.7, errors


def latents(pipe: Any) -> Tensor:
    out = pipe(
        "a green 5 moving left",
        num_frames=17,
        height=128,
        width=128,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    frames: Tensor = out.frames
    return frames
