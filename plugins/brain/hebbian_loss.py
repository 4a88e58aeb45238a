"""A local loss of each block: its features decorrelated, sparse, and foreseeable from its input.

Shapes: B rows, T time, S tokens of a row that are read, D hidden, R rank of the predictor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Count, Mean, Objective, Report, Site, Weight
from tryplicity_plugins.layers.router import full_precision

EPS = 1e-6  # added to variances: a feature that is silent over a row stays silent, with a finite gradient


def standardise(x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature with mean 0 and variance 1 over its row, and the mean square that really came out [B, D]:
    short of 1 for a feature of hardly any variance, 0 for one of none."""
    centred_BSD = x_BSD - x_BSD.mean(1, keepdim=True)
    variance_B1D = centred_BSD.square().mean(1, keepdim=True)
    return centred_BSD * (variance_B1D + EPS).rsqrt(), (variance_B1D / (variance_B1D + EPS))[:, 0]


def squared_correlation(z_BSD: Tensor, variance_BD: Tensor) -> Tensor:
    """The mean square of the correlations between two different features of a row, [B].

    With C = Z^T Z / S, the sum of the squares of C is that of Z Z^T / S, since both are tr(Z^T Z Z^T Z) / S^2: the
    tokens' products with one another tell it, exactly, without a D x D matrix. The smaller of the two is taken. The
    squares of the diagonal, the variances, come off.
    """
    S, D = z_BSD.shape[1:]
    products = torch.bmm(z_BSD, z_BSD.mT) if S < D else torch.bmm(z_BSD.mT, z_BSD)
    squares_B = products.square().sum((1, 2)) / S**2 - variance_BD.square().sum(1)
    return squares_B / max(D * (D - 1), 1)


class HebbianLoss(Objective):
    """Three local objectives of every block, from its own input x and output y alone.

    All read the block's contribution y - x, not y: the stream carries on what all blocks before wrote, so the
    correlations of y are mostly theirs, while in y - x the part that only passes by cancels, in the value and in
    the gradient (exactly with a plain residual; to the extent that the streams pass unmixed with several).
    Every feature of it is standardised over the row, so that no scale of the block can lower any of the three.

    - decorrelation: the mean square of the correlation of two different features over the row's tokens, as
      anti-Hebbian inhibition between neurons brings about (Foldiak 1990; the covariance term of VICReg,
      arXiv:2105.04906).
    - sparsity: the mean absolute value. At variance 1 it is 0.8 for a Gaussian feature and goes to 0 for one
      that is silent but for a few tokens.
    - prediction: the mean squared error of a linear map of x, one gain per feature and a term of low rank. x is
      detached and the target is not: the block and the predictor learn, and no block before is asked to write
      what can be foreseen from. A detached target would make it a mere observer. What keeps the block from
      becoming constant to be foreseen is the standardisation; what it pays is some pressure to be linear, hence
      a small weight.

    The losses are local in what they read. Their gradient is not cut off behind the block: through what the block
    itself made of x, the blocks before get a share of it, as of any loss.

    What it is a statistic of: the tokens read of one row, all its packed documents together. It is a loss
    only; no token's output depends on another document's. All computing is in fp32 at least, without autocast.
    A block before weighs more than one behind it, by `layer_decay`. In the reported `correlation`, chance alone
    gives about 1 / sqrt(tokens).
    """

    name = "hebbian_loss"
    undecayed = ("gain_D",)

    @dataclass(frozen=True)
    class Config:
        weight: Weight = 0.01
        """Factor of all three losses, in the first block."""
        layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
        """What each further block's factor is multiplied by."""
        decorrelation: Weight = 1.0
        """Share of the decorrelation of features."""
        sparsity: Weight = 0.1
        """Share of the sparsity of features."""
        prediction: Weight = 0.1
        """Share of the prediction of the block's contribution from its input."""
        rank: Count = 4
        """Rank of the linear predictor beside its gain per feature: (2 * rank + 1) * hidden_size parameters a block."""
        tokens: Annotated[int, Field(ge=2, le=2**20)] = 128
        """At most so many tokens of a row are read, evenly spaced, others in each step."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        D = site.hidden_size
        self.weight = config.weight * config.layer_decay ** site.layer
        # what changes from step to step, or is each block's own, is a tensor, so that all blocks are compiled as one
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("scale", torch.empty(()), persistent=False)
        self.gain_D = nn.Parameter(torch.empty(D))
        self.read_RD = nn.Parameter(torch.empty(config.rank, D))
        self.write_DR = nn.Parameter(torch.empty(D, config.rank))

    @property
    def factor(self) -> float:
        return self.__dict__.get("_factor", Objective.factor)

    @factor.setter
    def factor(self, factor: float) -> None:
        self.__dict__["_factor"] = factor
        self.scale.fill_(self.weight * factor)

    def _apply(self, *args, **options) -> HebbianLoss:
        super()._apply(*args, **options)
        self.scale = torch.full_like(self.scale, self.weight * self.factor,  # bf16 would round it
                                     dtype=torch.promote_types(self.gain_D.dtype, torch.float32))
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.step.zero_()
        self.scale.fill_(self.weight * self.factor)
        nn.init.zeros_(self.gain_D)
        nn.init.normal_(self.read_RD, std=self.read_RD.shape[1] ** -0.5)
        nn.init.normal_(self.write_DR, std=0.02)

    def before_step(self, step: int) -> None:
        self.step.fill_(step)

    def sample(self, x_BTD: Tensor) -> Tensor:
        """The tokens of each row that count in this step, [B, S, D], in fp32 at least."""
        stride = max(1, -(-x_BTD.shape[1] // self.config.tokens))
        first = torch.arange(0, x_BTD.shape[1] - stride + 1, stride, device=x_BTD.device)
        x_BSD = x_BTD.index_select(1, first + self.step % stride)
        return x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))

    def predict(self, x_BSD: Tensor) -> Tensor:
        """The standardised contribution as foreseen from the standardised input."""
        gain_D, read_RD, write_DR = (p.to(x_BSD.dtype) for p in (self.gain_D, self.read_RD, self.write_DR))
        return x_BSD * gain_D + x_BSD @ read_RD.T @ write_DR.T

    def block_loss(self, x_BTD: Tensor, y_BTD: Tensor, doc_ids_BT: Tensor | None) -> Report:
        with full_precision(x_BTD):
            x_BSD = self.sample(x_BTD)
            z_BSD, variance_BD = standardise(self.sample(y_BTD) - x_BSD)
            foreseen_BSD = self.predict(standardise(x_BSD.detach())[0])
            found = {"decorrelation": squared_correlation(z_BSD, variance_BD),
                     "sparsity": z_BSD.abs().mean((1, 2)),
                     "prediction": (z_BSD - foreseen_BSD).square().mean((1, 2))}
        rows = float(len(x_BTD))
        return Report({name: self.scale * getattr(self.config, name) * value_B.mean()
                       for name, value_B in found.items()},
                      {name: Mean(value_B.detach().sum(), rows) for name, value_B in found.items()})

    def metrics(self, stats):
        return {"correlation": stats["decorrelation"].value.clamp(min=0).sqrt().item(),
                "sparsity": stats["sparsity"].value.item(), "prediction_error": stats["prediction"].value.item()}
