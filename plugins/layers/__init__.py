"""Layers, routers, residuals and heads of the project."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_layers():
    from tryplicity_plugins.layers.activations import GELU, ReLU2, SiLU
    from tryplicity_plugins.layers.attention import GroupedQueryAttention
    from tryplicity_plugins.layers.bitlinear import BitLinear
    from tryplicity_plugins.layers.bitlinear_unnormed import UnnormedBitLinear
    from tryplicity_plugins.layers.gated_deltanet import GatedDeltaNet
    from tryplicity_plugins.layers.gated_mlp import GatedMLP
    from tryplicity_plugins.layers.hyper_connections import HyperConnections
    from tryplicity_plugins.layers.linear import PlainLinear
    from tryplicity_plugins.layers.mamba1 import Mamba1
    from tryplicity_plugins.layers.mamba2 import Mamba2
    from tryplicity_plugins.layers.mla import LatentAttention
    from tryplicity_plugins.layers.mlp import MLP
    from tryplicity_plugins.layers.moe import MixtureOfExperts
    from tryplicity_plugins.layers.multi_token import MultiTokenPrediction
    from tryplicity_plugins.layers.norms import LayerNorm, RMSNorm
    from tryplicity_plugins.layers.parallel import Parallel
    from tryplicity_plugins.layers.residual import Add
    from tryplicity_plugins.layers.router import TopKRouter
    from tryplicity_plugins.layers.shared_attention import SharedAttention
    from tryplicity_plugins.layers.short_conv import ShortConv

    return [PlainLinear, BitLinear, UnnormedBitLinear, RMSNorm, LayerNorm, SiLU, GELU, ReLU2, GatedMLP, MLP,
            MixtureOfExperts, TopKRouter, Mamba1, Mamba2, GatedDeltaNet, ShortConv, GroupedQueryAttention,
            LatentAttention, Parallel, SharedAttention, Add, HyperConnections, MultiTokenPrediction]
