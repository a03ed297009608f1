"""Fresh parameters: as the original model makes them, and the same on any mesh."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.rewrite.initial import initial_values
from autopar.rewrite.initial_notes import SAVED
from autopar.runtime.initial import Recipe, initialize
from autopar.runtime.layout import Split
from graphs.memoryless import build_without_memory
from tests.autopar.test_checkpoints_on_ranks import meshes
from tests.models import ALL, Case, case

NO_MESH = cast(DeviceMesh, None)


def made(recipe: Recipe, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
    initialize(holder, NO_MESH, {}, {recipe: ["weight"]})
    return holder.weight.detach()


@pytest.mark.parametrize("known", ALL, ids=lambda known: known.name)
def test_every_parameter_of_every_model_has_a_recipe(known: Case) -> None:
    model = build_without_memory(known.build)
    missing = {name for name, _ in model.named_parameters()} - initial_values(model).recipes.keys()
    assert missing == ({"logit_scale"} if known.name == "clip" else set()), "a number, but on meta it is none"
    assert (
        not {name for name, _ in known.build().named_parameters()}
        - initial_values(known.build()).recipes.keys()
    )


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt2", "llama", "bert", "t5", "vit", "mixtral"])
def test_recipes_make_what_the_model_makes(name: str) -> None:
    """Mean and deviation of every parameter, those of padding included."""
    torch.manual_seed(0)
    model = case(name).build()
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    recipes = initial_values(model).recipes
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), "the model stays as it is"
        found = made(recipes[key], *parameter.shape)
        deviation = parameter.std(correction=0).item()
        error = 1e-6 + 8 * deviation / parameter.numel() ** 0.5
        assert found.mean().item() == pytest.approx(parameter.mean().item(), abs=error)
        assert found.std(correction=0).item() == pytest.approx(deviation, abs=error)
        if parameter.dim() == 2:
            assert torch.equal(found.any(-1), parameter.any(-1)), "the same rows are zero"


class Unusual(nn.Module):
    """Initialised in several ways, one of which is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated = nn.Linear(64, 64)
        self.scaled = nn.Linear(8, 8)
        self.copied = nn.Linear(4, 4)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.truncated:
            nn.init.trunc_normal_(module.weight, std=0.5, a=-0.7, b=0.7)
        elif module is self.scaled:
            nn.init.ones_(module.weight)
            with torch.no_grad():
                module.weight.mul_(3)
        elif module is self.copied:
            with torch.no_grad():
                module.weight.copy_(torch.arange(16).view(4, 4))


def test_what_follows_a_draw_belongs_to_the_recipe() -> None:
    initial = initial_values(Unusual())
    recipes = initial.recipes
    truncated = made(recipes["truncated.weight"], 64, 64)
    assert truncated.abs().max() <= 0.7
    assert 0.3 < truncated.std() < 0.5
    assert made(recipes["scaled.weight"], 8, 8).unique().tolist() == [3.0]
    assert recipes["copied.weight"] == SAVED
    assert initial.values["copied.weight"].flatten().tolist() == [*range(16)]


def _matrices(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 4)) for _ in range(count)]


class Views(nn.Module):
    """Initialised through views of its parameters, of which some lie in one memory, and from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.drawn_turned, self.column, self.flat = _matrices(4)
        self.source, self.follower, self.computed, self.orthogonal = _matrices(4)
        memory = torch.randn(8, 4)
        self.upper, self.lower = nn.Parameter(memory[:4]), nn.Parameter(memory[4:])
        self.never = nn.Parameter(torch.full((4,), math.nan))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for each in (self.column, self.source, self.computed, self.lower):
            each.normal_()
        self.turned.T.copy_(torch.arange(16.0).view(4, 4))
        self.column[:, 0].zero_()
        self.drawn_turned.T.uniform_()
        self.flat.view(-1).fill_(2)
        self.follower.copy_(self.source)
        self.computed.copy_(self.computed / self.computed.norm())
        nn.init.orthogonal_(self.orthogonal)
        self.upper.fill_(3)


def test_recipes_are_not_guessed_from_views_and_other_parameters() -> None:
    """What cannot be told is what the model holds: here values that belong together."""
    model = Views()
    initial = initial_values(model)
    saved = {name for name, recipe in initial.recipes.items() if recipe[:1] == SAVED}
    assert saved == {"turned", "column", "source", "follower", "computed", "orthogonal"}
    for name in saved - {"orthogonal"}:
        assert torch.equal(initial.values[name], getattr(model, name))
    orthogonal = initial.values["orthogonal"]
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(4))
    assert initial.recipes["drawn_turned"] == (("uniform_", 0.0, 1.0),)
    assert initial.recipes["flat"] == (("fill_", 2),)
    assert initial.recipes["upper"] == (("fill_", 3),)
    assert initial.recipes["lower"] == (("normal_", 0.0, 1.0),)
    assert "never" not in initial.recipes


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_values_are_saved_in_the_dtype_of_the_parameter(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(4, 4, dtype=dtype)
    monkeypatch.setattr("autopar.runtime.initial.saved_tensor", lambda _: value)
    assert torch.equal(made(SAVED, 4, 4, dtype=dtype), value)


@pytest.mark.parametrize("name", ["mamba", "whisper", "clip"])
def test_values_that_a_model_computes_go_with_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = case(name).build()
    initial = initial_values(model)
    assert initial.values
    named = dict(model.named_parameters())
    for key, value in initial.values.items():
        monkeypatch.setattr("autopar.runtime.initial.saved_tensor", lambda _, value=value: value)
        found = made(SAVED, *named[key].shape)
        if "dt_proj" in key:  # drawn, each time anew
            assert found.std().item() == pytest.approx(named[key].std().item(), rel=0.5)
        else:
            assert torch.equal(found, named[key])


def test_what_is_not_known_is_asked_for() -> None:
    recipes: dict[Recipe, list[str]] = {(("fill_", 1.0),): ["bias"]}
    with pytest.raises(ValueError, match=r"how weight is initialised.*; give the weights .*--weights"):
        initialize(nn.Linear(2, 2), NO_MESH, {}, recipes)


def test_a_rank_makes_its_part_of_what_one_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more than one block of rows, split along rows and columns."""
    recipe: Recipe = (("normal_", 0.0, 1.0), ("zero_row", 700))
    whole = made(recipe, 1536, 1024)  # two blocks of 2**20 elements
    assert not whole[700].any()
    assert 0.99 < whole.std() < 1.01
    sizes: list[Any] = []
    draw = Tensor.normal_

    def noted(self: Tensor, *numbers: float, generator: torch.Generator) -> Tensor:
        sizes.append(self.numel())
        return draw(self, *numbers, generator=generator)

    monkeypatch.setattr(Tensor, "normal_", noted)
    for splits in ({"tp": Split(0)}, {"tp": Split(1), "ep": Split(0, (1024, 512))}):
        for mesh in meshes(tp=2, ep=2):
            mine = whole
            for axis, split in splits.items():
                group = mesh.get_group(axis)
                parts = mine.split(split.sections or (mine.shape[split.dim],), split.dim)
                mine = torch.cat([part.chunk(2, split.dim)[group.rank()] for part in parts], split.dim)
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.empty_like(mine))
            initialize(holder, mesh, {"weight": splits}, {recipe: ["weight"]})
            assert torch.equal(holder.weight, mine)
    assert max(sizes) <= 2**20


def test_a_program_is_initialised_as_the_model_is() -> None:
    model = case("gpt2").build()
    plan = autopar.evaluate(model, "local-cpu", inputs=case("gpt2").inputs, global_batch=2)
    text = autopar.compile(model, plan, inputs=case("gpt2").inputs).files["train.py"]
    assert '(("normal_", 0.0, 0.02),): [' in text
    assert "initialize(stage, mesh, PLACEMENTS, INITIAL)" in text


class Stranger(nn.Module):
    """Initialised by ops that write elsewhere than in their first operand, and by putting others in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.drawn, self.product, self.first, self.second, self.outside = _matrices(5)
        self.swapped, self.replaced, self.follower = _matrices(3)
        self.norm(torch.randn(8, 4))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.drawn.normal_()
        torch.mul(self.product, 2, out=self.product)
        torch._foreach_mul_([self.first, self.second], 0.5)
        torch.normal(0.0, 1.0, (4, 4), out=self.outside)
        torch.linalg.qr(torch.randn(4, 4), out=(self.inner.weight, torch.empty(4, 4)))
        copies = [torch.empty(4, 4)]
        torch._foreach_copy_(copies, [self.first])
        self.follower.copy_(copies[0])
        self.swapped.data = torch.zeros(4, 4)
        self.replaced = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_a_stranger_changes_nothing_and_what_it_does_is_not_guessed() -> None:
    model = Stranger()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    initial = initial_values(model)
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1]), f"{name} was changed"
    told = {name: recipe[0][0] for name, recipe in initial.recipes.items() if recipe != SAVED}
    drawn = {"norm.weight": "fill_", "norm.bias": "fill_", "inner.bias": "uniform_", "drawn": "normal_"}
    assert told == drawn
    for name, value in initial.values.items():
        assert torch.equal(value, before[name][1]), "what cannot be told is what the model holds"


def test_masks_and_weights_of_eight_bits_keep_their_values() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask, narrow = torch.full((4, 4), -math.inf).triu(1), torch.eye(4).to(torch.float8_e4m3fn)
            self.mask = nn.Parameter(mask, requires_grad=False)
            self.narrow = nn.Parameter(narrow, requires_grad=False)
            self.unset = nn.Parameter(torch.full((2,), math.nan))

    found = initial_values(Frozen())
    assert found.recipes == {"mask": SAVED, "narrow": SAVED}
    assert made((("fill_", 0.5),), 2, 3, dtype=torch.float8_e4m3fn).float().tolist() == [[0.5] * 3] * 2
