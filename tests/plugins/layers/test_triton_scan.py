"""The Triton scan against the recurrence in fp64: on a card where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from tests.interpreted import DEVICE
from tryplicity import UserError
from tryplicity_plugins.layers import scans, ssd, triton_ssd
from tryplicity_plugins.layers.scans import TOKENS, why_not

NAMES = ("x", "dt", "A", "B", "C", "start")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Two tiles a chunk, so that a few tokens have borders of every kind."""
    monkeypatch.setattr(triton_ssd, "CHUNK", 32)
    monkeypatch.setattr(triton_ssd, "TILE", 16)
    monkeypatch.setattr(triton_ssd, "STATE_BLOCK", 64)


def recurrence(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, *, start_BHPN, runs_BT=None):
    """Token by token; a state of another document is forgotten."""
    heads = A_H.shape[0]
    B_BTHN, C_BTHN = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B_BTGN, C_BTGN))
    S_BHPN, run_B, outputs = start_BHPN, torch.zeros(len(x_BTHP), dtype=torch.long, device=x_BTHP.device), []
    for t in range(x_BTHP.shape[1]):
        if runs_BT is not None:
            S_BHPN = S_BHPN.where((runs_BT[:, t] == run_B)[:, None, None, None], torch.zeros_like(S_BHPN))
            run_B = runs_BT[:, t]
        S_BHPN = (torch.exp(dt_BTH[:, t] * A_H)[..., None, None] * S_BHPN
                  + (dt_BTH[:, t, :, None] * x_BTHP[:, t])[..., None] * B_BTHN[:, t, :, None])
        outputs.append((S_BHPN @ C_BTHN[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), S_BHPN


def draw(batch, time, heads, head_dim, groups, state, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    inputs = [normal(batch, time, heads, head_dim), F.softplus(normal(batch, time, heads)), -normal(heads).exp(),
              normal(batch, time, groups, state), normal(batch, time, groups, state),
              normal(batch, heads, head_dim, state)]
    return inputs, (normal(batch, time, heads, head_dim), normal(batch, heads, head_dim, state))


def values_and_gradients(function, inputs, weights, runs, dtype=torch.float32, has_start=True):
    inputs = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
    start = inputs[5] if has_start else None
    if not has_start and function is recurrence:
        start = torch.zeros_like(inputs[5])
    y, last = function(*inputs[:5], start_BHPN=start, runs_BT=runs)
    wanted = inputs if has_start else inputs[:5]
    gradients = torch.autograd.grad([y, last], wanted, [weight.to(dtype) for weight in weights])
    return {"y": y.detach(), "last": last.detach(), **dict(zip(NAMES, gradients, strict=False))}


def assert_near(got, right, tolerance=1e-5):
    assert got.keys() == right.keys()
    for name, value in right.items():
        error = ((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        assert error < tolerance, f"{name}: {error}"


def runs_from(batch, time, *begins):
    """Document numbers; one begins at each of these tokens."""
    at = torch.zeros(time, dtype=torch.long)
    at[list(begins)] = 1
    return at.cumsum(0).expand(batch, -1).to(DEVICE)


CASES = {  # (B, T, H, P, G, N), where documents begin
    "whole chunks": ((1, 64, 2, 8, 2, 16), None),
    "no multiple of a chunk, of a tile, of 16": ((2, 37, 2, 12, 1, 20), None),
    "heads to a group": ((1, 19, 6, 8, 2, 16), (4,)),
    "fewer tokens than a tile": ((1, 5, 2, 24, 1, 40), (2,)),
    "one token": ((2, 1, 2, 8, 1, 16), None),
    "one token, of a new document": ((1, 1, 2, 8, 1, 16), (0,)),
    "borders at chunks and tiles": ((1, 70, 2, 8, 1, 16), (16, 32, 64)),
    "borders beside them": ((1, 70, 2, 8, 1, 16), (0, 15, 17, 31, 33, 63, 65)),
    "documents of one token": ((1, 34, 2, 8, 1, 16), range(34)),
    "a document over three chunks": ((1, 75, 2, 8, 1, 16), (3, 70)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    shape, begins = CASES[case]
    inputs, weights = draw(*shape)
    runs = None if begins is None else runs_from(*shape[:2], *begins)
    got = values_and_gradients(triton_ssd.scan, inputs, weights, runs)
    assert_near(got, values_and_gradients(recurrence, inputs, weights, runs, torch.float64))


def test_without_a_state_to_start_from_and_of_the_last_state_alone():
    inputs, weights = draw(1, 35, 2, 8, 1, 16)
    got = values_and_gradients(triton_ssd.scan, inputs, weights, None, has_start=False)
    assert_near(got, values_and_gradients(recurrence, inputs, weights, None, torch.float64, has_start=False))
    for output in (0, 1):
        found, right = (torch.autograd.grad(function(*own[:5], start_BHPN=own[5])[output], own[0], weight)[0]
                        for function, own, weight in [
            (triton_ssd.scan, [t.clone().requires_grad_() for t in inputs], weights[output]),
            (recurrence, [t.double().requires_grad_() for t in inputs], weights[output].double())])
        assert_near({"x": found}, {"x": right})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_recurrence_at_random(seed):
    numbers = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=numbers))

    groups = pick(1, 3)
    shape = (pick(1, 3), pick(1, 100), groups * pick(1, 3), pick(1, 40), groups, pick(1, 70))
    inputs, weights = draw(*shape, seed=seed)
    runs = None
    if seed % 3:
        runs = (torch.rand(shape[:2], generator=numbers) < (0.05, 0.5)[seed % 2]).cumsum(1).to(DEVICE)
    got = values_and_gradients(triton_ssd.scan, inputs, weights, runs)
    assert_near(got, values_and_gradients(recurrence, inputs, weights, runs, torch.float64))


def test_one_document_changes_no_bit_of_another():
    inputs, weights = draw(1, 75, 2, 8, 1, 16)
    begins, of = (20, 41), slice(20, 41)  # the document in the middle, over a chunk's border
    runs = runs_from(1, 75, *begins)
    before = values_and_gradients(triton_ssd.scan, inputs, weights, runs)
    others = [t.clone() for t in inputs]
    other_weights = weights[0].clone(), weights[1]
    for t in (others[0], others[3], others[4], other_weights[0]):
        t[:, of] *= -3
    others[1][:, of] *= 0.3
    after = values_and_gradients(triton_ssd.scan, others, other_weights, runs)
    for name, value in before.items():
        if name in ("last", "start"):
            assert torch.equal(value, after[name]), name
        elif name != "A":  # a sum over all documents
            for part in (slice(0, 20), slice(41, None)):
                assert torch.equal(value[:, part], after[name][:, part]), name
            assert not torch.equal(value[:, of], after[name][:, of])


def test_the_same_bits_each_time():
    inputs, weights = draw(2, 20, 2, 8, 1, 16)
    first, second = (values_and_gradients(triton_ssd.scan, inputs, weights, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reads_slices_of_one_projection_where_they_lie():
    inputs, weights = draw(2, 21, 2, 8, 1, 16)
    x, dt, A, B, C, start = inputs
    packed = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], -1)
    xs, Bs, Cs = packed.split([16, 16, 16], -1)
    sliced = [xs.unflatten(-1, (2, 8)), dt, A, Bs.unflatten(-1, (1, 16)), Cs.unflatten(-1, (1, 16)), start]
    assert not sliced[0].is_contiguous()
    whole, parts = (triton_ssd.scan(*own[:5], start_BHPN=own[5]) for own in (inputs, sliced))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    found = []
    for lay in (torch.clone, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):  # heads before time
        x, weight = lay(inputs[0]).requires_grad_(), lay(weights[0])
        y = triton_ssd.scan(x, *inputs[1:5])[0]
        found.append((y, *torch.autograd.grad(y, x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_operators_keep_torchs_rules(packed):
    inputs, weights = draw(1, 9, 2, 8, 1, 16)
    x, dt, A, B, C, start = inputs
    runs, first = (runs_from(1, 9, 3), start) if packed else (None, None)
    own = [None if t is None else t.clone().requires_grad_() for t in (x, dt, dt * A, B, C, first)]
    torch.library.opcheck(triton_ssd.ssd_scan, (*own, runs))
    _, _, states, sums, steps = triton_ssd.ssd_scan(x, dt, dt * A, B, C, first, runs)
    torch.library.opcheck(triton_ssd.ssd_scan_backward,
                          (weights[0], weights[1] if packed else None, x, B, C, runs, states, sums, steps))


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    inputs, weights = draw(1, 32, 4, 8, 2, 16)
    with FlopCounterMode(display=False) as counter:
        values_and_gradients(triton_ssd.scan, inputs, weights, None)
    scores, inside, states = 32 * 2 * 16, 32 * 4 * 8, 4 * 8 * 16
    assert counter.get_total_flops() == 2 * 32 * (4 * scores + 3 * inside + 6 * states)


# --- who chooses ---


@pytest.fixture
def asked(monkeypatch):
    """TRYPLICITY_SCAN for one test, and nothing remembered of it."""
    why_not.cache_clear()
    yield lambda wanted: monkeypatch.setenv("TRYPLICITY_SCAN", wanted)
    why_not.cache_clear()


def which(monkeypatch, dtype=torch.float32, device=DEVICE):
    ran = []
    for module, name in ((triton_ssd, "triton"), (ssd, "torch")):
        monkeypatch.setattr(module, "scan", lambda x, *args, name=name, **options: ran.append(name))
    inputs = [t.to(device, dtype) for t in draw(1, 4, 2, 8, 1, 16)[0]]
    scans.scan(*inputs[:5], start_BHPN=inputs[5])
    return ran[-1]


def test_a_card_gets_triton_and_a_cpu_does_not(monkeypatch, asked):
    asked("auto")
    assert why_not(DEVICE, None, torch.float32, 8, 16) is None  # before `which` puts others in their place
    assert which(monkeypatch, device="cpu") == "torch"
    if DEVICE == "cuda":
        assert which(monkeypatch) == "triton"
    asked("torch")
    assert which(monkeypatch) == "torch"


def test_asked_for_by_name(monkeypatch, asked):
    asked("triton")
    assert why_not(DEVICE, None, torch.float32, 8, 16) is None
    assert which(monkeypatch) == "triton"
    with pytest.raises(UserError, match=r"TRYPLICITY_SCAN=triton: it cannot do heads of 8 .* in float64; auto"):
        which(monkeypatch, torch.float64)
    with pytest.raises(UserError, match="cannot do heads of 512"):
        scans.scan(torch.zeros(1, 1, 1, 512, device=DEVICE), *[torch.zeros(1, 1, 1, 1, device=DEVICE)] * 4)
    asked("cuda")
    with pytest.raises(UserError, match="TRYPLICITY_SCAN=cuda: it can be auto, torch, triton"):
        which(monkeypatch)


@pytest.mark.parametrize("part", ["y", "the gradient of A"])
def test_a_scan_that_is_wrong_is_left_out_with_a_warning(monkeypatch, asked, part):
    right = triton_ssd.scan

    def wrong(x, dt, A, *rest, **options):
        if part == "y":
            y, last = right(x, dt, A, *rest, **options)
            return y * 1.01, last
        return right(x, dt, A * 0.99 + A.detach() * 0.01, *rest, **options)

    monkeypatch.setattr(triton_ssd, "scan", wrong)
    with pytest.warns(UserWarning, match=f"the Triton scan is left out.*got {part} wrong by 1.0e-02"):
        assert "wrong" in why_not(DEVICE, None, torch.float32, 8, 16)


def test_a_scan_that_fails_is_left_out_with_its_reason(monkeypatch, asked):
    def fails(*args, **options):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(triton_ssd, "scan", fails)
    with pytest.warns(UserWarning, match="RuntimeError: out of resource: shared memory$"):
        assert why_not(DEVICE, None, torch.float32, 8, 16)


def test_the_self_test_is_the_same_inside_of_anything(monkeypatch, asked):
    """It runs where a forward runs: without gradients, under autocast, while a checkpoint counts what is saved."""
    saved = []
    with (torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16),
          torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)):
        assert why_not(DEVICE, None, torch.float32, 8, 16) is None
    assert not saved and TOKENS % triton_ssd.CHUNK


# --- in the layer ---


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiler_takes_it_whole(monkeypatch, asked, packed):
    """The choice, its self-test included, is made while tracing, and the gradients arrive."""
    asked("triton")
    inputs, weights = draw(1, 9, 2, 8, 1, 16)
    runs = runs_from(1, 9, 3) if packed else None
    compiled = torch.compile(scans.scan, backend="aot_eager", fullgraph=True)
    got = values_and_gradients(compiled, inputs, weights, runs)
    right = values_and_gradients(triton_ssd.scan, inputs, weights, runs)
    assert_near(got, right, 1e-6)
    assert why_not.cache_info().currsize == 1


def test_in_the_layer_whole_and_in_pieces(monkeypatch, asked):
    from tests.plugins.layers.test_mamba2 import documents, make

    mixer, ids = make(hidden=16, groups=2, chunk=8).to(DEVICE), documents(2, 21).to(DEVICE)
    x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(wanted):
        asked(wanted)
        mixer.zero_grad()
        own = x.clone().requires_grad_()
        y = mixer(own, doc_ids=ids)
        y.square().sum().backward()
        return {"y": y.detach(), "x": own.grad, **{name: p.grad.clone() for name, p in mixer.named_parameters()}}

    right = run("torch")
    assert "hand" in mixer.path(x.device, False)
    whole = run("triton")
    assert mixer.path(x.device, False).startswith("the scan in Triton, in chunks of 32")
    assert_near(whole, right, 2e-5)
    state = mixer.new_state(2, device=DEVICE)
    with torch.no_grad():
        pieces = [mixer(x[:, part], state=state, doc_ids=ids[:, part])
                  for part in (slice(0, 9), slice(9, 10), slice(10, 21))]
    assert_near({"y": torch.cat(pieces, 1)}, {"y": whole["y"]}, 1e-5)
