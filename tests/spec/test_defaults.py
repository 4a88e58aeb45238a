"""What a spec that leaves an option out means stays what it is: a default that changes makes other models of specs that
are written, and other runs of commands that were noted. Who changes one on purpose changes it here too."""

import dataclasses

import pytest

from tryplicity import load_plugins

PACKAGES = ("python", "torch", "numpy", "sympy", "networkx", "mpmath")
ROUTED = {"score": "sigmoid", "normalize": True, "bias_rate": 0.001, "balance_loss": 0.0001, "z_loss": 0.0,
          "inhibition": None}
DEFAULTS = {
    ("mixer", "gqa"): {"heads": 8, "kv_heads": None, "head_dim": None, "rope_base": 10000.0, "qk_norm": False,
                       "bias": False, "out_bias": False},
    ("mixer", "mamba2"): {"state_size": 128, "head_dim": 64, "expand": 2, "conv_width": 4, "groups": 1, "chunk": 64,
                          "dt_min": 0.001, "dt_max": 0.1, "dt_floor": 0.0001, "A_min": 1.0, "A_max": 16.0,
                          "norm_eps": 1e-05},
    ("feed_forward", "gated_mlp"): {"inner_size": None, "bias": False},
    ("feed_forward", "mlp"): {"inner_size": None, "bias": False},
    ("feed_forward", "moe"): {"experts": 8, "top_k": 2, "inner_size": 256, "shared_experts": 1,
                              "shared_inner_size": None},
    ("norm", "layernorm"): {"eps": 1e-05, "bias": False},
    ("norm", "rmsnorm"): {"eps": 1e-06},
    ("activation", "spike"): {"zero_rate": 0.7, "band": 0.1, "rate": 0.5, "threshold": 0.1, "bandwidth": 0.1},
    ("router", "top_k"): ROUTED,
    ("router", "dynamic_sparsity"): {**ROUTED, "min_experts": 4, "max_experts": 12, "mean_experts": 8.0},
    ("router", "lateral_inhibition"): {**ROUTED, "strength": 0.3, "refresh_steps": 20},
    ("residual", "add"): {"multiplier": 1.0},
    ("residual", "hyper_connections"): {"streams": 4, "dynamic": True},
    ("head", "multi_token_prediction"): {"tokens": 4, "weight": 0.5, "inner_size": None},
    ("objective", "hebbian_loss"): {"weight": 0.01, "layer_decay": 0.8, "decorrelation": 1.0, "sparsity": 0.1,
                                    "prediction": 0.1, "rank": 4, "tokens": 128},
    ("objective", "predictive_coding"): {"range": 0.5, "focus": 1.0, "keep": 1.0},
    ("brain", "sleep_consolidation"): {"every": None, "replay_steps": 20, "replay_learning_rate": 0.1,
                                       "reservoir": 256, "min_use": 0.1, "average": 2},
    ("optimizer", "adamw"): {"learning_rate": 0.001, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-08,
                             "weight_decay": 0.1},
    ("schedule", "wsd"): {"warmup_steps": 100, "decay": 0.2, "floor": 0.0},
    ("source", "files"): {"text_key": None, "domain": "text", "bad_rows": "error", "document_bytes": 65536},
    ("source", "huggingface"): {"name": None, "split": "train", "text_key": "text", "limit": None, "data_files": None,
                                "revision": None, "domain": "text", "bad_rows": "error"},
    ("source", "python-docs"): {"packages": PACKAGES},
    ("source", "python-docs-chat"): {"packages": PACKAGES, "phrasings": 3},
    ("source", "python-reference"): {"packages": PACKAGES},
    ("retriever", "passages"): {"index": None, "source": "python-reference"},
    ("retriever", "searxng"): {"timeout": 10.0, "language": None},
    ("retriever", "semantic"): {"index": None, "source": "python-reference", "model": None, "candidates": 30},
}


@pytest.fixture(scope="module")
def installed():
    return load_plugins().registry


@pytest.mark.parametrize("family, name", DEFAULTS, ids=lambda x: x)
def test_an_option_left_out_is_what_it_was(installed, family, name):
    config = installed.get(family, name).Config
    found = {field.name: field.default for field in dataclasses.fields(config)}
    assert {option: found.get(option, dataclasses.MISSING) for option in DEFAULTS[family, name]} == \
        DEFAULTS[family, name]


def test_a_curriculum_without_stages_is_the_one_that_it_was(installed):
    """Shares of the phase, of the context, grades, mixtures, rates and the Hebbian factor."""
    config = installed.get("brain", "neuro_curriculum").Config()
    told = [(s.name, s.share, s.context, s.max_grade, s.mixture, s.learning_rate_factor, s.tokens_per_step, s.factors)
            for s in config.stages]
    assert told == [
        ("infancy", 0.1, 0.125, 6.0, {"text": 0.9, "code": 0.1, "math": 0.0}, 0.5, None, {"hebbian_loss": 1.0}),
        ("childhood", 0.2, 0.5, 10.0, {"text": 0.75, "code": 0.15, "math": 0.1}, 1.0, None, {"hebbian_loss": 0.5}),
        ("adolescence", 0.3, 1.0, None, {"text": 0.65, "code": 0.2, "math": 0.15}, 1.0, None, {"hebbian_loss": 0.2}),
        ("mastery", 0.4, 1.0, None, {"text": 0.5, "code": 0.25, "math": 0.25}, 0.7, None, {"hebbian_loss": 0.1})]
    assert sum(stage.share for stage in config.stages) == pytest.approx(1)
