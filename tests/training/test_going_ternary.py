"""A model that was trained with plain linears becomes ternary: the rounding fades in, from the model itself on."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import SPEC
from tryplicity import UserError, World
from tryplicity.builder import build
from tryplicity.inference.exported import export
from tryplicity.inference.packed import load_model
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec
from tryplicity.training import starting

WARMUP = 3
FADING = "linear={{type: {}, fade_steps: {}}}"
FEW = ["layers=[memory, attention]", "heads=[]", "training.checkpoint_every=1",
       "training.schedule={type: wsd, warmup_steps: 0, decay: 0}"]
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plain(go):
    return go("plain", FEW, steps=1)


def settings(kind="bitlinear", steps=WARMUP):
    return [*FEW, FADING.format(kind, steps)]


@pytest.mark.parametrize("kind", ["bitlinear", "bitlinear_unnormed"])
def test_it_begins_as_the_plain_model(registry, plain, kind):
    model = load_model(plain.folder, registry)[0]
    way = registry.part("parallelism", "single").build()
    ternary = way.place(assemble(load_spec(str(SPEC), registry, settings(kind))), World(), 0)
    taken = starting.take(starting.opened(plain.folder), ternary, way, torch.optim.AdamW(ternary.parameters()), World())
    assert all(name.endswith(".fade") for name in taken.initialised) and not taken.unused
    with torch.no_grad():
        assert torch.equal(ternary.eval()(IDS), model(IDS))
        for module in ternary.modules():
            if hasattr(module, "fade"):
                module.fade.fill_(1)
        assert (ternary(IDS) - model(IDS)).abs().max() > 0.01


def test_it_is_resumed_exactly_and_ends_as_a_ternary_model(go, registry, plain, tmp_path):
    start = starting.opened(plain.folder)
    whole = go("whole", settings(), steps=WARMUP + 1, start=start)
    go("parts", settings(), steps=2, start=start)
    half = tmp_path / "half.safetensors"
    (tmp_path / "parts" / "model.safetensors").rename(half)
    parts = go("parts", settings(), steps=WARMUP + 1, resume=True)
    weights, again, mid = load_file(whole.weights), load_file(parts.weights), load_file(half)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    fades = [name for name in weights if name.endswith(".fade")]
    assert fades and all(weights[name] == 1 and mid[name] == pytest.approx(2 / WARMUP) for name in fades)

    # at the end: packed, unpacked, and as the same linear without a warm-up
    packed, floats = load_model(whole.folder, registry)[0], load_model(whole.folder, registry, ternary=False)[0]
    spec = load_spec(str(SPEC), registry, [*FEW, "linear=bitlinear"])
    ternary = initialise(assemble(spec), "cpu", 0)
    ternary.load_state_dict({name: tensor for name, tensor in weights.items() if name not in fades})
    with torch.no_grad():
        due = ternary.eval()(IDS)
        torch.testing.assert_close(floats(IDS), due, rtol=0, atol=1e-5)
        torch.testing.assert_close(packed(IDS), due, rtol=0, atol=1e-4)
    sizes = export(whole.folder, registry, tmp_path / "ternary.safetensors", "fp32")
    assert sizes.ratio > 6
    exported = load_model(tmp_path / "ternary.safetensors", registry)[0]
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS), packed(IDS), rtol=0, atol=1e-5)


def test_half_way_it_is_served_as_it_is_and_not_exported(go, registry, plain, tmp_path):
    run = go("half", settings(steps=10), steps=1, start=starting.opened(plain.folder))
    model, info = (load_model(run.folder, registry)[i] for i in (0, 3))
    trained = initialise(assemble(load_spec(str(SPEC), registry, settings(steps=10))), "cpu", 0)
    trained.load_state_dict(load_file(run.weights))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), trained.eval()(IDS), rtol=0, atol=1e-5)
    assert "ternary" not in info.format
    with pytest.raises(UserError, match="its rounding has not faded in yet; train it to the end of its fade_steps"):
        export(run.folder, registry, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_plan_is_that_of_a_ternary_model(registry):
    plans = [build(str(SPEC), "cpu", registry, [*FEW, linear]).plan.as_dict()
             for linear in ("linear=bitlinear", FADING.format("bitlinear", 5))]
    assert plans[0]["parameters"] == plans[1]["parameters"]
    assert plans[0]["packed_bytes_per_token"] == plans[1]["packed_bytes_per_token"]
