"""Mamba-2 in C++: against the PyTorch path, and bit for bit however a text is cut, batched or threaded."""

import itertools

import pytest
import torch
from layer_tools import assemble, part, site, threads, without_native
from torch import nn

from tryplicity import Linear, Rows
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.mamba2 import Mamba2


class RowByRow(Linear):
    """Each token by itself, so that a token's bits do not depend on what else is in the product."""

    name = "row_by_row_for_test"

    def forward(self, x, offsets_E=None, spread=None):
        rows = [self.weight @ row.clone() for row in x.flatten(0, -2)]  # else its address decides bits too
        return torch.stack(rows).view(*x.shape[:-1], -1) if rows else x.new_empty(*x.shape[:-1], self.out_features)


def make(hidden=32, dtype=torch.float32, spread=0.3, linear=RowByRow, **options):
    options = {"state_size": 16, "head_dim": 8, "chunk": 8, **options}
    here = site(hidden=hidden, linear=linear)
    return assemble(lambda: part(Mamba2, **options).build(here), spread=spread, dtype=dtype)


@pytest.fixture(autouse=True)
def native_and_without_gradients():
    assert native.library() is not None
    with torch.no_grad():
        yield


def read(mixer, x, sizes, state):
    return torch.cat([mixer(piece, state=state) for piece in x.split(sizes, 1)], 1)


ODD = {"usual": {}, "head dim 1": {"head_dim": 1}, "state 3": {"state_size": 3}, "state 1": {"state_size": 1},
       "groups": {"groups": 2}, "short conv": {"conv_width": 2}, "long conv": {"conv_width": 7},
       "all odd": {"hidden": 15, "head_dim": 5, "state_size": 37, "groups": 3, "conv_width": 3},
       "pieces": {"head_dim": 32, "state_size": 150}}


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_equals_the_pytorch_path(options):
    mixer, exact = make(**options), make(**options).double()
    x = torch.randn(2, 23, options.get("hidden", 32))
    for sizes in ([23], [1] * 23, [9, 1, 13]):
        state, exact_state = mixer.new_state(2), exact.new_state(2, dtype=torch.float64)
        y, expected = read(mixer, x, sizes, state), read(exact, x.double(), sizes, exact_state)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
        for name in ("conv", "ssm"):
            scale = exact_state[name].abs().max().item()
            torch.testing.assert_close(state[name].double(), exact_state[name], rtol=0, atol=2e-6 * scale)
    with without_native():
        old = mixer(x)
    assert not torch.equal(old, y), "C++ did not run"
    torch.testing.assert_close(y, old, rtol=0, atol=4e-6 * old.abs().max().item())


@pytest.mark.parametrize("options", ODD.values(), ids=ODD)
def test_the_same_bits_whole_in_chunks_and_step_by_step(options):
    mixer = make(**options)
    x = torch.randn(1, 53, options.get("hidden", 32))
    whole_state = mixer.new_state(1)
    whole = mixer(x, state=whole_state)
    assert torch.equal(mixer(x), whole)
    for sizes in ([1] * 53, [16, 16, 16, 5], [1, 2, 3, 17, 30], [52, 1]):
        state = mixer.new_state(1)
        addresses = {name: value.data_ptr() for name, value in state.items()}
        assert torch.equal(read(mixer, x, sizes, state), whole)
        assert all(torch.equal(state[name], whole_state[name]) for name in state)
        assert {name: value.data_ptr() for name, value in state.items()} == addresses, "the state moved"


@pytest.mark.parametrize("time", [1, 6])
def test_the_same_bits_alone_and_among_others(time):
    """Rows of different pasts, each with its state, and one state of the whole batch."""
    mixer = make(groups=2)
    pasts, x = [torch.randn(1, n, 32) for n in (0, 1, 2, 40, 7)], torch.randn(5, time, 32)
    states = []
    for past in pasts:
        states.append(mixer.new_state(1))
        mixer(past, state=states[-1])
    alone = [state.clone() for state in states]
    expected = [mixer(x[i:i + 1], state=state) for i, state in enumerate(alone)]
    assert torch.equal(mixer(x, state=Rows(states)), torch.cat(expected))
    for got, wanted in zip(states, alone, strict=True):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    one = mixer.new_state(5)
    for i, past in enumerate(pasts):
        own = mixer.new_state(1)
        mixer(past, state=own)
        for name in ("conv", "ssm"):
            one[name][i] = own[name][0]
    assert torch.equal(mixer(x, state=one), torch.cat(expected))
    with without_native():
        again = [mixer.new_state(1) for _ in pasts]
        for past, state in zip(pasts[1:], again[1:], strict=True):
            mixer(past, state=state)
        plain = mixer(x, state=Rows(again))
    torch.testing.assert_close(plain, torch.cat(expected), rtol=0, atol=4e-6 * plain.abs().max().item())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_same_bits_with_any_number_of_threads(count):
    """Wide enough for the work to be shared out: 128 * 24 state numbers a token, 3 rows of 90 tokens."""
    mixer = make(hidden=64, state_size=24, head_dim=16, groups=2)
    x, found = torch.randn(3, 90, 64), []
    for n in (1, count):
        with threads(n):
            state = mixer.new_state(3)
            found.append((mixer(x, state=state), state))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in ("conv", "ssm"))


@pytest.mark.parametrize("bias", [-200.0, -40.0, 19.9, 20.1, 200.0])
def test_extreme_time_steps(bias):
    """From a step of exactly zero, where the state stands still, to one that forgets everything."""
    mixer = make()
    nn.init.constant_(mixer.dt_bias, bias)
    nn.init.uniform_(mixer.A_log, -3, 3)
    x, state, exact = torch.randn(2, 20, 32), mixer.new_state(2), make().double()
    state["ssm"].normal_()
    before = state["ssm"].clone()
    exact.load_state_dict(mixer.state_dict())
    exact_state = exact.new_state(2, dtype=torch.float64)
    exact_state["ssm"].copy_(before)
    y, expected = mixer(x, state=state), exact(x.double(), state=exact_state)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4e-6 * expected.abs().max().item())
    torch.testing.assert_close(state["ssm"].double(), exact_state["ssm"], rtol=0,
                               atol=4e-6 * exact_state["ssm"].abs().max().item())
    assert torch.equal(state["ssm"], before) == (bias < 0)  # exp(-40) is nothing beside one


def test_nothing_read_changes_nothing():
    mixer = make()
    state = mixer.new_state(1)
    mixer(torch.randn(1, 9, 32), state=state)
    before = state.clone()
    assert mixer(torch.randn(1, 0, 32), state=state).shape == (1, 0, 32)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_documents_and_gradients_go_another_way_than_decoding():
    mixer, x = make(), torch.randn(2, 12, 32)
    ids = torch.arange(12).div(5, rounding_mode="floor").expand(2, -1)
    with without_native():
        expected = mixer(x, doc_ids=ids)
    torch.testing.assert_close(mixer(x, doc_ids=ids), expected, rtol=0, atol=4e-6 * expected.abs().max().item())
    with torch.enable_grad():
        mixer(x).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    # a text of documents, then tokens without ids, that go on in C++
    state, plain_state = mixer.new_state(2), mixer.new_state(2)
    mixer(x, state=state, doc_ids=ids)
    rest = mixer(x[:, :3], state=state)
    with without_native():
        mixer(x, state=plain_state, doc_ids=ids)
        expected = mixer(x[:, :3], state=plain_state)
    torch.testing.assert_close(rest, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_a_batch_of_another_size_than_its_state_is_refused():
    mixer = make()
    with pytest.raises(AssertionError):
        mixer(torch.randn(3, 2, 32), state=mixer.new_state(2))
    with pytest.raises((AssertionError, ValueError)):
        mixer(torch.randn(3, 2, 32), state=Rows([mixer.new_state(1), mixer.new_state(1)]))


def test_moved_parameters_are_noticed():
    """C keeps their addresses: changed in place, put elsewhere, replaced, packed, and in a copy of the module."""
    from copy import deepcopy

    from tryplicity_plugins.layers.bitlinear import BitLinear

    mixer, x = make(hidden=40, linear=BitLinear).eval(), torch.randn(1, 6, 40)

    def same(mixer):
        with without_native():
            expected = mixer(x)
        torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        return expected

    outputs = [same(mixer)]
    mixer.D.mul_(2)
    outputs.append(same(mixer))
    mixer.conv_bias.data = mixer.conv_bias.data + 1
    outputs.append(same(mixer))
    mixer.dt_bias = nn.Parameter(mixer.dt_bias + 1)
    outputs.append(same(mixer))
    other = deepcopy(mixer)
    other.A_log.sub_(2)
    outputs += [same(other), same(mixer)]
    for linear in (mixer.in_proj, mixer.out_proj):
        linear.adopt(linear.pack())
    packed = mixer(x)
    torch.testing.assert_close(packed, outputs[-1], rtol=0, atol=1e-3 * packed.abs().max().item())
    outputs[-1] = packed
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_ternary_matrices_give_the_same_bits_in_pieces():
    """The whole mixer with its packed matrices, as a chat reads and writes."""
    from tryplicity_plugins.layers.bitlinear import BitLinear

    mixer = make(hidden=40, linear=BitLinear).eval()
    for linear in (mixer.in_proj, mixer.out_proj):
        linear.adopt(linear.pack())
    x, others, whole = torch.randn(1, 301, 40), torch.randn(2, 301, 40), mixer.new_state(1)
    expected = mixer(x, state=whole)
    for sizes in ([1] * 301, [16, 16, 269]):
        state = mixer.new_state(1)
        assert torch.equal(read(mixer, x, sizes, state), expected)
        assert torch.equal(state["ssm"], whole["ssm"])
    state = Rows(mixer.new_state(1) for _ in range(3))
    assert torch.equal(read(mixer, torch.cat([others, x]), [20, 1, 280], state)[2:], expected)
