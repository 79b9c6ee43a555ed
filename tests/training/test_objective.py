"""Flow matching as the model and its sampler mean it."""

import copy

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import FULL, t2v

import falloff
from falloff import Schedule
from falloff.session import Position
from falloff.training import TrainingError
from falloff.training.families import family_of
from falloff.training.family import Sample
from falloff.training.noising import Diffusion, Flow, noising_of
from falloff.training.objective import flow_loss, point_at, validation_points, velocity

SIZE = (3, 8, 8)
CALL = {"num_frames": 9, "height": 64, "width": 64}


def sample(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        torch.randn(1, 16, *SIZE, generator=generator),
        SIZE,
        {"encoder_hidden_states": torch.randn(1, 4, 16, generator=generator)},
    )


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_the_target_leads_the_scheduler_to_the_clean_latent(name: str) -> None:
    """A model that puts out the target denoises to x_0 exactly, whatever step the scheduler takes."""
    pipe = t2v(scheduler_name=name)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(4)
    clean = sample()
    point = point_at(
        clean, Flow(shift=3.0, levels=(1.0,)), float(scheduler.sigmas[0]), torch.Generator().manual_seed(1)
    )
    latents = point.noised
    for timestep in scheduler.timesteps:
        latents = scheduler.step(point.target, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, clean.latents, atol=1e-4, rtol=1e-4)


def test_levels_are_those_of_the_sampler() -> None:
    pipe = t2v(scheduler_name="euler")
    flow = noising_of(pipe, family_of(pipe), 4, CALL)
    pipe.scheduler.set_timesteps(4)
    assert [1000 * level for level in flow.levels] == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert flow.shift == 3.0


def test_a_level_stands_at_the_nearest_step() -> None:
    flow = Flow(shift=3.0, levels=(1.0, 0.8, 0.4, 0.1))
    for level, step in ((0.99, 0), (0.7, 1), (0.41, 2), (0.0, 3)):
        assert flow.position(level) == Position(step=step, steps=4, branch="cond")


def test_drawn_levels_follow_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = sorted(Flow(shift=5.0, levels=(1.0,)).draw(generator) for _ in range(2001))
    assert drawn[1000] == pytest.approx(5 / 6, abs=0.01)  # the median of the logit-normal, 1/2, shifted
    assert 0 < drawn[0] < drawn[-1] < 1


def test_a_diffusion_is_the_schedulers() -> None:
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    noising = Diffusion(alphas=tuple(scheduler.alphas_cumprod.tolist()), levels=(1.0,))
    clean, generator = sample(), torch.Generator().manual_seed(1)
    drawn = [noising.draw(generator) for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.02)
    assert 0 <= min(drawn) < 0.01
    assert 0.99 < max(drawn) <= 1
    for level in (0.0, drawn[0], 1.0):
        point, t = point_at(clean, noising, level, generator), torch.tensor([round(999 * level)])
        torch.testing.assert_close(point.noised, scheduler.add_noise(clean.latents, point.noise, t).float())
        torch.testing.assert_close(point.target, scheduler.get_velocity(clean.latents, point.noise, t).float())


def test_what_follows_no_straight_flow_is_refused() -> None:
    pipe = t2v()
    pipe.scheduler = CogVideoXDDIMScheduler()
    with pytest.raises(TrainingError, match="CogVideoXDDIMScheduler with prediction_type='epsilon'"):
        noising_of(pipe, family_of(pipe), 4, CALL)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(TrainingError, match="use_dynamic_shifting"):
        noising_of(pipe, family_of(pipe), 4, CALL)
    with pytest.raises(TrainingError, match=r"object cannot be trained here; .*WanPipeline"):
        family_of(object())


def test_velocity_is_of_the_models_own_call() -> None:
    pipe = t2v()
    family = family_of(pipe)
    point = point_at(sample(), noising_of(pipe, family, 4, CALL), 0.3, torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = velocity(pipe, family, pipe.transformer, point, CALL)
        text = point.sample.text["encoder_hidden_states"]
        mixed = 0.7 * point.sample.latents + 0.3 * point.noise
        torch.testing.assert_close(out, pipe.transformer(mixed, torch.tensor([300.0]), text, return_dict=False)[0])
        expected = (out - (point.noise - point.sample.latents)).square().mean()
        torch.testing.assert_close(flow_loss(out, point), expected)


def test_the_schedule_follows_the_noise_level() -> None:
    """Noisy samples count as the dense first steps, others as sparse ones, each as a run of its own."""
    pipe = t2v()
    flow, family = noising_of(pipe, family_of(pipe), 4, CALL), family_of(pipe)
    schedule = Schedule(dense_first=1, dense_layers=(1,))
    seen = {}
    with falloff.using(pipe, FULL, schedule=schedule, kernel="reference"):
        for level in (0.999, 0.2):
            point = point_at(sample(), flow, level, torch.Generator().manual_seed(2))
            velocity(pipe, family, pipe.transformer, point, CALL)
            seen[level] = [(call.step, call.layer, call.reason) for call in falloff.report(pipe).calls]
    assert seen[0.999] == [(0, 0, "dense first step"), (0, 1, "dense layer")]
    last = flow.position(0.2).step
    assert seen[0.2] == [(last, 0, None), (last, 1, "dense layer")]


def test_gradients_come_through_the_plan() -> None:
    """Of a plan that sees everything they are the dense ones; of a sparse plan they are not."""
    pipe = t2v()
    flow, family = noising_of(pipe, family_of(pipe), 4, CALL), family_of(pipe)
    weight = pipe.transformer.blocks[0].attn1.to_k.weight

    def gradient() -> torch.Tensor:
        point = point_at(sample(), flow, 0.2, torch.Generator().manual_seed(2))
        return torch.autograd.grad(flow_loss(velocity(pipe, family, pipe.transformer, point, CALL), point), weight)[0]

    dense = gradient()
    with falloff.using(pipe, FULL, kernel="reference"):
        torch.testing.assert_close(gradient(), dense, rtol=1e-4, atol=1e-8)
    with falloff.using(pipe, falloff.Radial(block=4), schedule=Schedule(dense_first=0, dense_layers=())):
        assert (gradient() - dense).norm() > 0.01 * dense.norm()


def test_validation_points_stay_the_same() -> None:
    first, second = (validation_points([sample(), sample(1)], Flow(shift=3.0, levels=(1.0,)), seed=3) for _ in range(2))
    assert len(first) == 10
    assert all(torch.equal(a.noised, b.noised) for a, b in zip(first, second, strict=True))
