"""The whole hybrid: state equality, isolation of packed documents, initialisation."""

import pytest
import torch

from tryplicity import PluginFault
from tryplicity.components import IGNORE, Residual
from tryplicity.model import NEXT_TOKEN, assemble, initialise

DOCS = torch.tensor([[0] * 11 + [1] * 20 + [2] * 6, [0] * 3 + [1] * 1 + [2] * 33])


# fp64 throughout but for routers and decays, which compute in fp32: hence the tolerances

def random_ids(rows=2, length=37, seed=1):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("docs", [None, DOCS], ids=["one document", "packed"])
@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 1, 16, 2, 13], [20, 17], [1, 36]],
                         ids=["whole", "one at a time", "ragged", "two", "one then all"])
@torch.no_grad()
def test_whole_equals_chunks_of_any_size(make_model, sizes, docs):
    model, ids = make_model(dtype=torch.float64).eval(), random_ids()
    whole = model(ids, doc_ids_BT=docs)
    state, parts, start = model.new_state(2), [], 0
    for size in sizes:
        here = slice(start, start + size)
        parts.append(model(ids[:, here], state=state, doc_ids_BT=None if docs is None else docs[:, here]))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", ["linear", "bitlinear"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_one_packed_document_changes_nothing_in_another_bit_for_bit(make_model, linear, changed):
    model, ids = make_model(f"linear={linear}").eval(), random_ids()
    other = torch.where(changed == DOCS, random_ids(seed=2), ids)
    assert (other != ids).any()
    before, after = model(ids, doc_ids_BT=DOCS), model(other, doc_ids_BT=DOCS)
    assert torch.equal(before[changed != DOCS], after[changed != DOCS])
    assert not torch.equal(before[changed == DOCS], after[changed == DOCS])
    # in the objectives too: the multi-token targets of a document never lie in another
    targets = model.targets(ids, ids.roll(-1, 1), DOCS)["multi_token_prediction"]
    for row in range(2):
        for t in range(37):
            for depth, value in enumerate(targets[row, t], start=2):
                if value != IGNORE:
                    assert DOCS[row, t] == DOCS[row, t + depth - 1]


@torch.no_grad()
def test_packed_documents_come_out_as_alone(make_model):
    model, ids = make_model(dtype=torch.float64).eval(), random_ids()
    packed = model(ids, doc_ids_BT=DOCS)
    for row in range(2):
        for document in range(3):
            inside = DOCS[row] == document
            alone = model(ids[row:row + 1, inside])
            torch.testing.assert_close(packed[row, inside], alone[0], rtol=1e-5, atol=1e-6)


def test_every_parameter_gets_a_finite_gradient(make_model):
    model, ids = make_model(), random_ids()
    losses = model(ids[:, :-1], targets=model.targets(ids[:, :-1], ids[:, 1:], DOCS[:, :-1]), doc_ids_BT=DOCS[:, :-1])
    (sum(mean.value for mean in losses.objectives.values()) + sum(losses.report.losses.values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_loss_is_the_mean_negative_log_likelihood(make_model):
    model, ids = make_model().eval(), random_ids()
    next_BT = ids[:, 1:].clone()
    next_BT[0, :5] = IGNORE
    mean = model(ids[:, :-1], targets={NEXT_TOKEN: next_BT}).objectives[NEXT_TOKEN]
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), next_BT.flatten())
    assert mean.count == 2 * 36 - 5
    torch.testing.assert_close(mean.value, expected)


def test_hyper_connections_start_as_the_plain_residual(make_spec):
    ids = random_ids()
    streams = initialise(assemble(make_spec()), "cpu", 0).eval()
    plain = initialise(assemble(make_spec("residual=add")), "cpu", 0).eval()
    plain.load_state_dict({k: v for k, v in streams.state_dict().items() if ".residual." not in k})
    torch.testing.assert_close(streams(ids), plain(ids), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(make_spec):
    first, second, other = (initialise(assemble(make_spec()), "cpu", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_a_parameter_left_uninitialised_is_named(make_spec):
    model = assemble(make_spec())

    class Forgetful(Residual):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.empty(3, device="meta"))

    model.layers[1].mixer.residual = Forgetful()
    with pytest.raises(PluginFault, match=r"residual 'Forgetful': layers\.1\.mixer\.residual\.gain is uninitialised"):
        initialise(model, "cpu", 0)


def test_untied_embeddings_have_a_matrix_of_their_own(make_spec):
    tied, untied = (sum(p.numel() for p in assemble(make_spec(f"tied_embeddings={t}")).parameters())
                    for t in ("true", "false"))
    assert untied - tied == 300 * 32


@pytest.mark.parametrize("linear", ["linear", "bitlinear"])
def test_bf16_autocast_trains_and_keeps_the_streams_in_bf16(make_model, linear):
    model, ids, seen = make_model(f"linear={linear}"), random_ids(), []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses = model(ids[:, :-1], targets=model.targets(ids[:, :-1], ids[:, 1:], None))
    sum(mean.value for mean in losses.objectives.values()).backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
