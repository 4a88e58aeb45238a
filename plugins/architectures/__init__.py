"""Published architectures: how their files read as specs."""

from tryplicity import hookimpl


@hookimpl
def tryplicity_components():
    from tryplicity_plugins.architectures.hybrids import Bamba, GraniteMoEHybrid, Mamba2, NemotronH
    from tryplicity_plugins.architectures.llama import BitNet, Llama, Mistral, Olmo2, Qwen2, Qwen3
    from tryplicity_plugins.architectures.mamba import Jamba, Mamba
    from tryplicity_plugins.architectures.mixtures import Mixtral, OLMoE, Qwen2MoE, Qwen3MoE
    from tryplicity_plugins.architectures.side_by_side import LFM2, FalconH1
    from tryplicity_plugins.architectures.zamba import Zamba2

    return [Llama, Mistral, Qwen2, Qwen3, Olmo2, BitNet, Mixtral, Qwen2MoE, Qwen3MoE, OLMoE, Mamba2, Bamba,
            GraniteMoEHybrid, NemotronH, FalconH1, LFM2, Mamba, Jamba, Zamba2]
