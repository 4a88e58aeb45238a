"""Local losses of a block: what each measures, against plain twins, and what training on them does."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tryplicity import Mean, Site
from tryplicity.training.step import forward_backward
from tryplicity_plugins.brain.hebbian_loss import HebbianLoss, squared_correlation, standardise

ALL = "brain=[{type: hebbian_loss, weight: 1.0, tokens: 20}]"


def make(hidden=32, layer=0, layers=4, seed=0, dtype=torch.float32, **options):
    """A loss with every parameter away from zero."""
    site = Site(hidden_size=hidden, vocab_size=64, context_length=64, layers=layers, layer=layer)
    loss = HebbianLoss(HebbianLoss.Config(**options), site)
    torch.manual_seed(seed)
    loss.reset_parameters()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return loss if dtype == torch.float32 else loss.to(dtype)


def correlated(rows, tokens, hidden, sources, seed=0, dtype=torch.float64):
    """Features that are mixtures of a few sources."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, sources, generator=g) @ torch.randn(sources, hidden, generator=g)
    return (x + 0.3 * torch.randn(rows, tokens, hidden, generator=g)).to(dtype)


def squared(y):
    return squared_correlation(*standardise(y))


def test_correlation_by_hand():
    a, b = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    alike, apart, mixed = ([a, 3 * a + 5, -2 * a], [a, b, a * b], [a, a, b])
    found = torch.cat([squared(torch.stack(features, -1)[None].double()) for features in (alike, apart, mixed)])
    torch.testing.assert_close(found, torch.tensor([1, 0, 1 / 3]).double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tokens", [20, 31, 32, 50])  # fewer tokens than features, and more
def test_the_products_of_tokens_tell_what_the_matrix_of_features_does(tokens):
    y = correlated(3, tokens, 32, 4).requires_grad_()
    off = ~torch.eye(32, dtype=torch.bool)
    twin = torch.stack([torch.corrcoef(y_SD.T)[off].square().mean() for y_SD in y])
    torch.testing.assert_close(squared(y), twin, rtol=1e-5, atol=0)
    weights = torch.tensor([1.0, 2.0, -0.5]).double()
    ours, theirs = (torch.autograd.grad((value * weights).sum(), y)[0] for value in (squared(y), twin))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert theirs.abs().max() > 1e-5


def test_the_largest_tensor_is_the_tokens_read():
    """No features by features: 64 tokens of 512 features are 32,768 numbers, the matrix would be 262,144."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    loss, x = make(512, tokens=64), torch.randn(1, 64, 512)
    y = torch.randn(1, 64, 512, requires_grad=True)
    with Largest() as largest:
        sum(loss.block_loss(x, y, None).losses.values()).backward()
    assert largest.size == 64 * 512


def plain(loss, x, y, first, stride):
    """The three losses row by row, with the whole correlation matrix, by torch's own functions."""
    found = []
    many = x.shape[1] // stride
    for x_TD, y_TD in zip(x[:, first::stride][:, :many], y[:, first::stride][:, :many], strict=True):
        c = y_TD - x_TD
        z = (c - c.mean(0)) / c.std(0, correction=0)
        u = ((x_TD - x_TD.mean(0)) / x_TD.std(0, correction=0)).detach()
        matrix = loss.write_DR @ loss.read_RD + torch.diag(loss.gain_D)
        off = torch.corrcoef(c.T)[~torch.eye(c.shape[1], dtype=torch.bool)]
        found.append(torch.stack([off.square().mean(), z.abs().mean(), (z - u @ matrix.T).square().mean()]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_values_and_gradients_are_those_of_a_plain_twin(step):
    weights = {"weight": 0.5, "layer_decay": 0.5, "decorrelation": 1.5, "sparsity": 0.7, "prediction": 0.3}
    loss = make(12, layer=2, tokens=30, dtype=torch.float64, **weights)
    loss.before_step(step)
    loss.factor = 0.2
    x = correlated(3, 64, 12, 5).requires_grad_()
    y = (x + torch.tanh(x @ correlated(1, 12, 12, 12, seed=3)[0])).detach().requires_grad_()
    report = loss.block_loss(x, y, None)
    twin = plain(loss, x, y, step % 3, 3)  # 64 tokens, at most 30: every third
    scale = 0.5 * 0.5 ** 2 * 0.2 * torch.tensor([1.5, 0.7, 0.3]).double()
    assert list(report.losses) == ["decorrelation", "sparsity", "prediction"]
    torch.testing.assert_close(torch.stack(list(report.losses.values())), scale * twin, rtol=1e-5, atol=0)
    wanted = [x, y, *loss.parameters()]
    ours = torch.autograd.grad(sum(report.losses.values()), wanted)
    theirs = torch.autograd.grad((scale * twin).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
        assert a.abs().max() > 0
    numbers = loss.metrics(report.stats)
    expected = (twin[0].sqrt().item(), twin[1].item(), twin[2].item())
    assert tuple(numbers.values()) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_goes_through_the_block_alone():
    """What passes by on the stream cancels, and the predictor's input is detached: neither trains the input."""
    loss, x = make(), correlated(2, 40, 32, 4, dtype=torch.float32).requires_grad_()
    y = x + torch.tanh(x.detach() @ torch.randn(32, 32))
    total = sum(loss.block_loss(x, y, None).losses.values())
    assert total > 0 and torch.autograd.grad(total, x)[0].abs().max() == 0


def test_training_on_it_decorrelates_a_layer():
    """A linear layer over features that are mixtures of four sources."""
    torch.manual_seed(0)
    layer, loss = torch.nn.Linear(32, 32), make(weight=1.0, sparsity=0.0, prediction=0.0, tokens=32)
    x = correlated(8, 64, 32, 4, dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)

    def correlation():
        with torch.no_grad():
            return squared(layer(x)).mean().sqrt().item()

    before = correlation()
    for step in range(150):
        loss.before_step(step)
        optimizer.zero_grad()
        sum(loss.block_loss(x, x + layer(x), None).losses.values()).backward()
        optimizer.step()
    assert before > 0.4 and correlation() < before / 2


def test_training_on_it_makes_a_layer_sparse_and_foreseeable():
    torch.manual_seed(0)
    x = correlated(8, 64, 32, 8, dtype=torch.float32)
    for name in ("sparsity", "prediction"):
        layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        shares = dict.fromkeys(("decorrelation", "sparsity", "prediction"), 0.0) | {name: 1.0}
        loss = make(weight=1.0, tokens=64, **shares)
        optimizer = torch.optim.Adam([*layer.parameters(), *loss.parameters()], lr=3e-3)
        found = []
        for _ in range(100):
            optimizer.zero_grad()
            report = loss.block_loss(x, x + layer(x), None)
            sum(report.losses.values()).backward()
            optimizer.step()
            found.append(report.stats[name].value.item())
        assert found[-1] < 0.9 * found[0], name


@pytest.mark.parametrize("parts", [2, 4])
def test_rows_count_alike_however_they_are_cut(parts):
    loss, x = make(weight=1.0, dtype=torch.float64), correlated(4, 40, 32, 4)
    y = (x + correlated(4, 40, 32, 6, seed=1)).requires_grad_()
    whole = loss.block_loss(x, y, None)
    cut = [loss.block_loss(a, b, None) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    for name, value in whole.losses.items():
        torch.testing.assert_close(sum(part.losses[name] for part in cut) / parts, value, rtol=1e-10, atol=0)
        stat = sum((part.stats[name] for part in cut[1:]), cut[0].stats[name])
        torch.testing.assert_close(Mean(*stat).value, whole.stats[name].value, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(total, y, retain_graph=True)[0] for total in (
        sum(whole.losses.values()), sum(sum(part.losses.values()) for part in cut) / parts)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", ["silent block", "silent feature", "one token"])
def test_what_has_no_variance_gives_a_finite_gradient(case):
    loss, x = make(), correlated(2, 1 if case == "one token" else 40, 32, 4, dtype=torch.float32)
    added = torch.randn(x.shape) if case == "one token" else torch.zeros_like(x)
    if case == "silent feature":
        added[..., 1:] = torch.randn(2, 40, 31)
    y = (x + added).requires_grad_()
    total = sum(loss.block_loss(x, y, None).losses.values())
    total.backward()
    assert total.isfinite() and y.grad.isfinite().all()


def test_steps_read_other_tokens_in_turn():
    loss, x = make(tokens=16), torch.arange(64.0)[None, :, None].expand(1, 64, 32)
    seen = []
    for step in range(4):
        loss.before_step(step)
        seen += loss.sample(x)[0, :, 0].tolist()
    assert sorted(seen) == list(range(64)) and seen[16:32] == list(range(1, 64, 4))
    assert [loss.sample(x[:, :n]).shape[1] for n in (1, 16, 17, 63)] == [1, 16, 8, 15]


def surroundings():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return {"bf16": (nullcontext(), torch.bfloat16), "fake": (FakeTensorMode(), torch.float32),
            "autocast": (torch.autocast("cpu", torch.bfloat16), torch.float32),
            "meta": (torch.device("meta"), torch.float32)}


@pytest.mark.parametrize("name", ["bf16", "autocast", "fake", "meta"])
def test_runs_everywhere_in_fp32(name):
    context, dtype = surroundings()[name]
    real = name in ("bf16", "autocast")
    exact = make(dtype=torch.float64)
    with context:
        loss = make(dtype=dtype)
        x = (correlated(2, 40, 32, 4).to(dtype) if real else torch.randn(2, 40, 32)).requires_grad_()
        for run in (loss.block_loss, lambda *a: checkpoint(loss.block_loss, *a, use_reentrant=False)):
            loss.zero_grad()
            report = run(x, x * 1.5 + x.roll(1, -1) * 0.5, None)
            total = sum(report.losses.values())
            total.backward()
            assert total.dtype == torch.float32
            for parameter in loss.parameters():
                assert parameter.grad.dtype == dtype and parameter.grad.shape == parameter.shape
    if real:
        for parameter, twin in zip(loss.parameters(), exact.parameters(), strict=True):
            twin.data.copy_(parameter.data)
        x = x.detach()
        y = (x * 1.5 + x.roll(1, -1) * 0.5).to(torch.float64)  # rounded as it was
        twin = exact.block_loss(x.to(torch.float64), y, None)
        for key, value in report.losses.items():
            torch.testing.assert_close(value.double(), twin.losses[key], rtol=1e-4, atol=0)


def test_it_is_a_small_part_of_the_full_model(registry):
    from tryplicity.spec import load_spec

    site = load_spec("full", registry).site(0)
    with torch.device("meta"):
        loss = HebbianLoss(HebbianLoss.Config(), site)
    assert site.layers * sum(p.numel() for p in loss.parameters()) < 0.0002 * 9.3e9


# --- in a whole model ---

@pytest.fixture
def batch(prepared):
    return prepared.stream(seed=0).batch(0, 8, 48)


def run(model, batch, micro_batch=8, checkpointing=False):
    model.activation_checkpointing = checkpointing
    model.zero_grad()
    result = forward_backward(model, batch, micro_batch, "fp32")
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_every_block_of_a_model_has_one_and_each_parameter_learns(make_model, batch):
    model = make_model(ALL)
    result, gradients = run(model, batch)
    for i in range(3):
        for name in ("gain_D", "read_RD", "write_DR"):
            gradient = gradients[f"layers.{i}.objectives.hebbian_loss.{name}"]
            assert gradient.isfinite().all() and gradient.abs().max() > 0, (i, name)
    assert {"decorrelation", "sparsity", "prediction"} <= result.auxiliary.keys()
    numbers = model.metrics(result.stats)
    for name in ("correlation", "sparsity", "prediction_error"):
        assert 0 < numbers[f"layers.2.objectives.hebbian_loss.{name}"] < 3
    factors = {layer.objectives["hebbian_loss"].weight for layer in model.layers}
    assert factors == {1.0, 0.8, 0.8 ** 2}


def test_it_is_absent_outside_training(make_model, batch):
    model, without = make_model(ALL).eval(), make_model().eval()
    without.load_state_dict(model.state_dict(), strict=False)
    targets = {"next_token": batch.targets_BT}
    ours, theirs = (m(batch.ids_BT, targets=targets) for m in (model, without))
    assert torch.equal(ours.objectives["next_token"].total, theirs.objectives["next_token"].total)
    assert "decorrelation" not in {path.rpartition(".")[2] for path in ours.report.losses}


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_a_batch_cut_into_parts_gives_the_same(make_model, batch, micro_batch):
    model = make_model(ALL, dtype=torch.float64)
    whole, gradients = run(model, batch)
    parts, cut = run(model, batch, micro_batch)
    for name, value in whole.auxiliary.items():
        torch.testing.assert_close(parts.auxiliary[name], value, rtol=1e-6, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-8)


def test_activation_checkpointing_changes_no_bit(make_model, batch):
    model = make_model(ALL)
    plainly, gradients = run(model, batch, 4)
    again, recomputed = run(model, batch, 4, checkpointing=True)
    for name, value in plainly.auxiliary.items():
        assert torch.equal(again.auxiliary[name], value), name
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_training_a_model_on_it_lowers_its_correlations(make_model, batch):
    """With the weight at 0 and at 30: the same model, the same data."""
    found = {}
    for weight in (0, 30):
        model = make_model("layers=[memory, attention]", "heads=[]",
                           f"brain=[{{type: hebbian_loss, weight: {weight}, layer_decay: 1.0, tokens: 48}}]")
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(20):
            for module in model.modules():
                if hasattr(module, "before_step"):
                    module.before_step(step)
            optimizer.zero_grad()
            result = forward_backward(model, batch, 8, "fp32")
            optimizer.step()
        found[weight] = [model.metrics(result.stats)[f"layers.{i}.objectives.hebbian_loss.correlation"]
                         for i in range(2)]
        assert result.loss.value.isfinite()
    assert sum(found[30]) < 0.8 * sum(found[0]), found
