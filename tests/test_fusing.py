"""Operations of a step put together: the same values in fewer operations, and only where it is the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import oracle
from calls import made_sparse, sparse_module
from countdown.decoding import DecodeLoop
from countdown.fusing.fused import Fused, fused
from countdown.methods import method
from countdown.phase import Phases
from countdown.replay import tensors_in
from countdown.sites import find_sites
from countdown.sites.decoder import decoder_of
from fused_loop import FusedLoop
from test_decoding import HYBRIDS, IDS, causal_lm, own_text
from tiny import gemma3, llama

# In every step, however many layers: token, position, mask, what follows the logits, counters.
ONCE = {
    "embedding": 1, "add": 2, "le": 1, "angles_one": 1, "constant_pad_nd": 1, "amax": 1, "argmax": 2, "mul": 1,
    "index_select": 1, "copy_": 1, "_foreach_add_": 1,
}  # fmt: skip


def names_of(again: Fused) -> list[str]:
    return [one.name.split("::")[1] for one in again.operations if one.computes]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_done_again(
    step: Callable[[], Tensor], inputs: list[Tensor], written: Sequence[Tensor] = (), *, exactly: bool = True
) -> list[str]:
    """Check that a step put together gives its result, to the bit, for other inputs; return what it does then.

    What the step writes is as after the step itself, too.
    """
    made = []

    def whole() -> None:
        made.append(step())
        for tensor in inputs:  # what no step changes would not be read again
            tensor.mul_(1)

    again = fused(whole, lambda: [made[-1]])
    for place, tensor in enumerate([*inputs, *written]):
        tensor.copy_(random(*tensor.shape, seed=50 + place).to(tensor.dtype))
    before = [tensor.clone() for tensor in (*inputs, *written)]
    (found,) = again()
    after = [tensor.clone() for tensor in (*inputs, *written)]
    for tensor, values in zip((*inputs, *written), before, strict=True):
        tensor.copy_(values)
    whole()
    torch.testing.assert_close(found, made[-1], **({"rtol": 0, "atol": 0} if exactly else {}))
    assert all(torch.equal(one, other) for one, other in zip(after, (*inputs, *written), strict=True))
    return names_of(again)[: -len(inputs)]


def norm(x: Tensor, weight: Tensor, *, rounded: bool = True) -> Tensor:
    whole = x.float()
    whole = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * whole.to(x.dtype) if rounded else (whole * weight).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_llama_is_seven_operations(dtype):
    model = llama().to(dtype)
    loop, own = FusedLoop(model, IDS, new_tokens=12), DecodeLoop(model, IDS, new_tokens=12)
    assert torch.equal(loop.run(12), own_text(model, 12))
    own.run(12)
    assert oracle.relative_error(loop._logits, own._logits.double()) <= 1e-2
    layers = model.config.num_hidden_layers
    a_layer = {"project": 3 * layers + 1, "attend_next": layers, "gated": layers}
    norms = {"normalise": 1, "add_and_normalise": 2 * layers}
    assert dict(loop.operations) == ONCE | a_layer | norms


@pytest.mark.parametrize(
    ("model_type", "left"),
    [
        ("qwen3", {"normalise": 5, "attend_next": 2, "gated": 2, "add_and_normalise": 4}),
        ("mistral", {"normalise": 1, "attend_next": 2, "gated": 2, "add_and_normalise": 4}),
        # Gate and up in one weight; a part of each head is rotated.
        ("phi3", {"gated": 2, "attend_next": 2, "add_and_normalise": 4}),
        # Scores that are bent do not run in our attention.
        ("gemma2", {"gated": 2, "index_copy_": 4, "attend_next": 0}),
        # No gate, and another norm.
        ("starcoder2", {"gelu": 2, "gated": 0, "native_layer_norm": 5, "attend_next": 2}),
    ],
)
def test_what_other_models_leave(model_type, left):
    model = causal_lm(model_type).bfloat16()
    loop = FusedLoop(model, IDS, new_tokens=12)
    assert torch.equal(loop.run(12), own_text(model, 12))
    assert {name: loop.operations[name] for name in left} == left


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_states_of_convolutions_and_recurrences(model_type):
    model = causal_lm(model_type, **HYBRIDS[model_type])
    assert torch.equal(FusedLoop(model, IDS, new_tokens=12).run(12), own_text(model, 12))


@pytest.mark.parametrize("window", [4, 64])
def test_windows_and_norms_before_and_after(window):
    model = gemma3(sliding_window=window, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    loop = FusedLoop(model, IDS, new_tokens=12)
    assert torch.equal(loop.run(12), own_text(model, 12))
    # Of four norms of a layer two are of sums, and those of queries and keys of neither.
    assert loop.operations["normalise"] == 3 * 4 + 1
    assert loop.operations["add_and_normalise"] == 3 * 2


def started_early(model) -> list[bool]:
    """Of each sparse sum of a step, whether it may start while the norm before it waits."""
    operations = FusedLoop(model, IDS, new_tokens=4).traced.operations
    norms = {one.makes[-1][0]: one for one in operations if one.name.endswith("normalise")}
    sums = [one for one in operations if one.name == "countdown::sparse" and one.args[0] in norms]
    return [norms[one.args[0]].args[-1] is not False for one in sums]


def test_sparse_sums_of_neurons_start_early_and_those_of_channels_do_not():
    model = llama()
    made_sparse(model, per_term=0.3)
    assert started_early(model) == [True] * model.config.num_hidden_layers
    model, config = llama(), method("teal")
    phases = Phases()
    phases.watch(decoder_of(model)[0])
    for site in find_sites(model, ["linear"]):
        module = sparse_module(site, config, torch.full((site.terms,), 0.3), apply_to="decode", phases=phases)
        model.set_submodule(site.name, module)
    found = started_early(model)
    assert found
    assert not any(found)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(rounded, dtype):
    x, y = random(1, 1, 64, dtype=dtype), random(1, 1, 64, seed=1, dtype=dtype)
    weight = random(64, seed=2, dtype=dtype if rounded else torch.float32)
    assert is_done_again(lambda: norm(x, weight, rounded=rounded), [x]) == ["normalise"]
    assert is_done_again(lambda: norm(x + y, weight, rounded=rounded), [x, y]) == ["add_and_normalise"]

    def summed_up() -> Tensor:
        total = x + y
        return norm(total, weight, rounded=rounded) + total

    assert is_done_again(summed_up, [x, y]) == ["add_and_normalise", "add"]


def test_norms_that_are_other_norms():
    x, y, weight = random(1, 1, 64), random(1, 1, 64, seed=1), random(64, seed=2)

    def over_all() -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-5))

    def of_cubes() -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5))

    def of_another() -> Tensor:
        return weight * (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def by_what_is_computed() -> Tensor:
        return (y[0, 0] * 2) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def weighted_sum() -> Tensor:
        return norm(torch.add(x, y, alpha=2), weight)

    for step in (over_all, of_cubes, of_another, by_what_is_computed):
        assert "normalise" not in is_done_again(step, [x, y])
    assert is_done_again(weighted_sum, [x, y]) == ["add", "normalise"]


def test_a_sum_that_is_read_before_its_norm_is_done_stays():
    x, y, weight, seen = random(1, 1, 64), random(1, 1, 64, seed=1), random(64, seed=2), torch.zeros(1, 1, 64)

    def step() -> Tensor:
        total = x + y
        whole = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
        seen.copy_(total)
        return weight * whole

    assert is_done_again(step, [x, y]) == ["add", "copy_", "normalise"]
    assert torch.equal(seen, x + y)


def test_what_changes_in_between_is_not_read_late():
    x, weight = random(1, 1, 64), random(64, seed=2)

    def step() -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        scaled = x * inverse
        x.mul_(2)
        return weight * scaled

    assert "normalise" not in is_done_again(step, [x])


def test_what_is_changed_on_the_way_to_a_norm_is_no_norm():
    x, weight = random(1, 1, 64), random(64, seed=2)

    def step() -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        scaled[..., :8].mul_(2)
        return weight * scaled

    assert "normalise" not in is_done_again(step, [x])


def test_nothing_that_a_step_makes_is_held_longer_than_it_is_read():
    x, out = torch.ones(4), torch.zeros(4)

    def step() -> None:
        y = x
        for _ in range(5):
            y = y * 2
        out.copy_(y)
        x.add_(1)

    again = fused(step, list)
    before = [weakref.ref(leaf) for one in again.operations for leaf in tensors_in(one.args)]
    assert {id(ref()) for ref in before} <= {id(x), id(out)}
    alive: list[int] = []
    for one in again.operations:
        if one.name == "aten::mul":
            one.op = (lambda op: lambda *args: alive.append(len(made_alive())) or kept(op(*args)))(one.op)
    made: list[weakref.ref[Tensor]] = []

    def kept(tensor: Tensor) -> Tensor:
        made.append(weakref.ref(tensor))
        return tensor

    def made_alive() -> list[Tensor]:
        return [tensor for ref in made if (tensor := ref()) is not None]

    again()
    assert max(alive) <= 1


def project(x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.ops.countdown.project(x, weights, [None] * len(weights))


@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda g: F.gelu(g, approximate="tanh"), F.relu])
@pytest.mark.parametrize("together", [True, False])
def test_gated_activations(activation, together):
    x, gate, up = random(1, 32), random(48, 32, seed=1), random(48, 32, seed=2)
    weights = [torch.cat([gate, up])] if together else [gate, up]

    def step() -> Tensor:
        g, u = project(x, weights).split([48, 48], dim=-1)
        return u * activation(g)

    assert is_done_again(step, [x], exactly=False) == ["gated"]


def test_gates_that_are_read_elsewhere_or_of_other_sizes():
    x, weights = random(1, 32), [random(40, 32, seed=1), random(24, 32, seed=2)]

    def crossing() -> Tensor:  # the gate is of both weights
        y = project(x, weights)
        return F.silu(y[:, 20:44]) * y[:, :24]

    def twice() -> Tensor:
        y = project(x, weights)
        return F.silu(y[:, :24]) * y[:, 40:] + y[:, :24]

    def kept() -> Tensor:
        y = project(x, weights)
        activated = F.silu(y[:, :24])
        return activated * y[:, 40:] + activated

    for step in (crossing, twice, kept):
        assert "gated" not in is_done_again(step, [x])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Attending:
    """A token that attends to a cache."""

    def __init__(self) -> None:
        self.q, self.key, self.value = random(1, 4, 1, 16), random(1, 2, 1, 16, seed=1), random(1, 2, 1, 16, seed=2)
        self.cos, self.sin = random(1, 1, 16, seed=3), random(1, 1, 16, seed=4)
        self.keys, self.values = random(1, 2, 9, 16, seed=5), random(1, 2, 9, 16, seed=6)
        self.at, self.zero = torch.tensor([4]), torch.tensor([0])

    @property
    def given(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.q, self.key, self.value], [self.keys, self.values]

    def put(self, cache: Tensor, new: Tensor, at: Tensor | None = None) -> None:
        cache.index_copy_(2, self.at + self.zero if at is None else at, new)

    def attend(self, q: Tensor) -> Tensor:
        return torch.ops.countdown.attend_one(q, self.keys, self.values, None, 0.25)


def test_attention_with_rotations_and_cache():
    given = Attending()

    def step() -> Tensor:
        at = given.at + given.zero
        given.put(given.keys, rotate(given.key, given.cos, given.sin), at)
        given.put(given.values, given.value, at)
        return given.attend(rotate(given.q, given.cos, given.sin))

    assert is_done_again(step, *given.given, exactly=False) == ["attend_next"]


def test_attention_without_rotations():
    given = Attending()

    def step() -> Tensor:
        given.put(given.keys, given.key, given.at)
        given.put(given.values, given.value, given.at)
        return given.attend(given.q)

    assert is_done_again(step, *given.given, exactly=False) == ["attend_next"]


def test_rotations_that_differ_stay_beside_attention():
    given, other = Attending(), random(1, 1, 16, seed=9)

    def step() -> Tensor:
        given.put(given.keys, rotate(given.key, given.cos, other), given.at)
        given.put(given.values, given.value, given.at)
        return given.attend(rotate(given.q, given.cos, given.sin))

    names = is_done_again(step, *given.given, exactly=False)
    assert names.count("cat") == 2
    assert names[-1] == "attend_next"


def test_halves_the_other_way_round_are_no_rotation():
    given = Attending()

    def turned(x: Tensor) -> Tensor:
        return x * given.cos + torch.cat([-x[..., :8], x[..., 8:]], dim=-1) * given.sin

    def step() -> Tensor:
        given.put(given.keys, turned(given.key), given.at)
        given.put(given.values, given.value, given.at)
        return given.attend(turned(given.q))

    assert is_done_again(step, *given.given, exactly=False).count("cat") == 2


def test_caches_that_others_write_or_read_meanwhile_stay():
    given = Attending()

    def written_twice() -> Tensor:
        given.put(given.keys, given.key, given.at)
        given.put(given.values, given.value, given.at)
        given.put(given.values, given.value, given.zero)
        return given.attend(given.q)

    def read_between() -> Tensor:
        given.put(given.keys, given.key, given.at)
        given.put(given.values, given.value, given.at)
        total = given.keys.sum()
        return given.attend(given.q) + total

    def at_two_places() -> Tensor:
        given.put(given.keys, given.key, given.at)
        given.put(given.values, given.value, given.zero)
        return given.attend(given.q)

    for step in (written_twice, read_between, at_two_places):
        assert "attend_next" not in is_done_again(step, *given.given, exactly=False)


def test_a_counter_that_is_read_late_is_not_read_in_advance():
    given, counter, seen = Attending(), torch.tensor([3]), torch.tensor([0])

    def step() -> Tensor:
        at = given.zero + counter
        counter.add_(1)
        given.put(given.keys, given.key, at)
        given.put(given.values, given.value, at)
        y = given.attend(given.q)
        seen.copy_(counter)
        return y

    made = []
    again = fused(lambda: made.append(step()), lambda: [made[-1]])
    before, keys = counter.clone(), given.keys.clone()
    (found,) = again()
    assert seen.tolist() == (before + 1).tolist()
    kept = given.keys.clone()
    counter.copy_(before)
    given.keys.copy_(keys)
    torch.testing.assert_close(found, step())
    assert torch.equal(kept, given.keys)


def test_a_counter_that_counts_twice_counts_twice():
    counter = torch.tensor([0])

    def step() -> None:
        counter.add_(1)
        counter.add_(1)

    again = fused(step, list)
    before = int(counter)
    again()
    assert int(counter) == before + 2
    assert all(len(one.args[0]) == 1 for one in again.operations if one.name == "aten::_foreach_add_")


def test_counters_are_counted_up_together_unless_somebody_reads_them_after():
    x = random(3)
    ahead, behind, read = torch.tensor([0]), torch.tensor([5]), torch.tensor([2])

    def step() -> Tensor:
        ahead.add_(1)
        y = x * (behind + 1)
        behind.add_(1)
        read.add_(1)
        return y * read

    made = []
    again = fused(lambda: made.append(step()), lambda: [made[-1]])
    # The one that is read.
    assert names_of(again).count("add_") == 1
    assert names_of(again)[-1] == "_foreach_add_"
    counts = [int(one) for one in (ahead, behind, read)]
    (found,) = again()
    assert [int(one) for one in (ahead, behind, read)] == [count + 1 for count in counts]
    assert torch.equal(found, x * (counts[1] + 1) * (counts[2] + 1))


def test_angles_of_two_frequencies_are_not_mixed():
    position = torch.tensor([[3]])
    slow, fast = torch.rand(8, generator=torch.Generator().manual_seed(0)), torch.rand(8)

    def waves(frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        angles = (position[:, :, None].float() * frequencies).repeat(1, 1, 1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * scale, angles.sin() * scale

    def step() -> Tensor:
        position.add_(1)
        (a, b), (c, d) = waves(slow, 1.0), waves(fast, 2.0)
        return a + b * 3 + c * 5 + d * 7

    made = []
    again = fused(lambda: made.append(step()), lambda: [made[-1]])
    (found,) = again()
    position.sub_(1)
    torch.testing.assert_close(found, step())
