from pathlib import Path

import pytest
import torch
from decoders import TOKENS, model, orders, sample, seed, teacher_forced

from falloff.decoding.training import Codes, Recipe, adamw, decoding_loss, draw_orders, train
from falloff.decoding.transformer import LPDTransformer

RECIPE = Recipe(batch=4, steps=(4, 8, TOKENS))


class Interrupted(Exception):
    pass


def codes() -> Codes:
    return Codes(*sample(12))


def trained(folder: Path, state: int, steps: int = 6, stop: int | None = None) -> LPDTransformer:
    """A model trained afresh or on, with dropout; ``stop``: interrupted after this many steps.

    ``state``: of the global generator, which must not matter.
    """
    made = model(torch.float32, dropout=0.1)

    def maybe_stop(step: int, loss: float) -> None:
        if step == stop:
            raise Interrupted

    with torch.random.fork_rng():
        torch.manual_seed(state)
        train(made, codes(), folder, RECIPE, adamw(made, 1e-3), steps=steps, save_every=0, on_step=maybe_stop)
    return made


def test_interrupted_training_ends_bit_for_bit_as_if_it_were_not(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = trained(tmp_path / "whole", 1).state_dict()
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", 2, stop=3)
    parts = trained(tmp_path / "parts", 3).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["head.weight"], model(torch.float32).head.weight)
    assert not list(tmp_path.rglob("*.part"))


def test_loss_is_the_mean_over_all_queries_with_own_groups_for_each_sample() -> None:
    made, places = model(), orders(2)
    tokens, labels = sample(2)
    sizes = [(1, 14), (1, 2, 3, 4, 5)]
    loss = decoding_loss(made, tokens, labels, places, sizes)
    each = []
    for i in range(2):
        one = slice(i, i + 1)
        logits = teacher_forced(made, tokens[one], labels[one], places[one], sizes[i])
        targets = tokens[one].gather(1, places[one])
        each.append(torch.nn.functional.cross_entropy(logits[0].float(), targets[0]))
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_training_learns(tmp_path: Path) -> None:
    """Every image of a class is the same: only the class is left to be read."""
    made = model(torch.float32)
    tokens = torch.randint(11, (4, TOKENS), generator=seed(0))
    losses: list[float] = []
    recipe = Recipe(batch=16, steps=(4, 8), label_drop=0.0)
    both = adamw(made, 3e-3)
    train(made, Codes(tokens, torch.arange(4)), tmp_path, recipe, both, steps=60, on_step=lambda _, x: losses.append(x))
    assert losses[-1] < 0.2 * losses[0]
    assert not made.training


def test_rates_rise_stay_and_fall() -> None:
    recipe = Recipe(batch=1, warmup=0.1, decay=0.5, floor=0.1)
    assert recipe.rate(0) == 0
    assert recipe.rate(0.05) == pytest.approx(0.5)
    assert recipe.rate(0.1) == recipe.rate(0.5) == 1
    assert recipe.rate(0.75) == pytest.approx(0.55)
    assert recipe.rate(1) == pytest.approx(0.1)


def test_weights_decay_and_vectors_do_not() -> None:
    made = model()
    decayed, kept = adamw(made, 1e-3)["adamw"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.02, 0)
    assert {id(made.pos_embed), id(made.fake_latent), id(made.head.weight)} <= {id(p) for p in decayed["params"]}
    assert {id(p) for p in kept["params"]} == {id(p) for p in made.parameters() if p.ndim == 1}


def test_orders_are_permutations_of_the_generator() -> None:
    drawn = draw_orders(3, 7, seed(0))
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(7).expand(3, -1))
    assert torch.equal(drawn, draw_orders(3, 7, seed(0)))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    made = model()
    with pytest.raises(ValueError, match="either steps or seconds, got steps=1 and seconds=1"):
        train(made, codes(), tmp_path, RECIPE, adamw(made, 1e-3), steps=1, seconds=1)
    with pytest.raises(ValueError, match=r"got \[3, 15\] and \[2\]"):
        Codes(torch.zeros(3, 15, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
