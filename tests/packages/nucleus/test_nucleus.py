import torch
from tryplicity_nucleus.router import Nucleus

from tryplicity import Site
from tryplicity.testing import check


def test_it_keeps_its_promises():
    assert check(Nucleus) == []


def test_a_token_gets_as_few_experts_as_make_up_the_share():
    router = Nucleus(Nucleus.Config(share=0.7, most=4), Site(hidden_size=4, vocab_size=300, context_length=8, layers=1),
                     experts=4, top_k=2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    chance = torch.tensor([[0.8, 0.1, 0.06, 0.04], [0.4, 0.35, 0.15, 0.1], [0.1, 0.3, 0.2, 0.4]])
    routing = router(chance.log()[None])
    assert routing.experts_NK.tolist() == [[0, 4, 4, 4], [0, 1, 4, 4], [3, 1, 4, 4]]
    torch.testing.assert_close(routing.weights_NK[1], torch.tensor([0.4 / 0.75, 0.35 / 0.75, 0, 0]))
