"""NxDI's model and application classes with low-rank MLPs in them; identical to their bases for a model without our block."""

from __future__ import annotations

import functools
import os
from typing import Any

from neuronmlp_plugin.serving.trainium.config import block_of, low_rank_config, options_of, source_of
from neuronmlp_plugin.serving.trainium.mlp import LowRankMLP
from neuronmlp_plugin.serving.trainium.nxd import NxdParallel
from neuronmlp_plugin.serving.trainium.state_dict import State, lay_out_state, overlay_factors, read_factored


@functools.cache
def low_rank_model(base: Any) -> Any:
    """A NeuronBaseModel subclass whose decoder layers get our MLP once the base has built them."""

    class LowRankModel(base):
        def init_model(self, config: Any) -> None:
            super().init_model(config)
            block = block_of(config)
            if block is None:
                return
            for layer, specs in zip(self.layers, block.layers, strict=True):
                layer.mlp = LowRankMLP(
                    specs,
                    block.shape,
                    NxdParallel(config),
                    options_of(config).tp_scheme,
                    config.neuron_config.sequence_parallel_enabled,
                )

    return LowRankModel


@functools.cache
def low_rank_application(base: Any) -> Any:
    """A NeuronBaseForCausalLM subclass that reads, checks and shards factors."""

    class LowRankForCausalLM(base):
        _model_cls = low_rank_model(base._model_cls)
        serves_low_rank = True

        @classmethod
        def get_config_cls(cls) -> Any:
            return low_rank_config(super().get_config_cls())

        @classmethod
        def get_state_dict(cls, model_name_or_path: str, config: Any) -> State:
            """As the base, which cannot read a factored folder: its files are not named `model*` (FORMAT.md)."""
            if block_of(config) is None or options_of(config).factors:
                return super().get_state_dict(model_name_or_path, config)
            state = cls.convert_hf_to_neuron_state_dict(read_factored(model_name_or_path), config)
            if getattr(config, "tie_word_embeddings", False):
                cls.update_state_dict_for_tied_weights(state)
            return state

        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: State, config: Any) -> State:
            state = base.convert_hf_to_neuron_state_dict(state_dict, config)
            block, options = block_of(config), options_of(config)
            if block is not None:
                if options.factors:
                    overlay_factors(state, options.factors, config.__dict__)
                lay_out_state(state, block, config.neuron_config.tp_degree, options.tp_scheme, source_of(config))
            return state

        def compile(self, compiled_model_path: str, *args: Any, **kwargs: Any) -> None:
            """As the base; with `on_cpu` there is nothing to compile, and only the config is saved."""
            if block_of(self.config) is None or not self.neuron_config.on_cpu:
                super().compile(compiled_model_path, *args, **kwargs)
                return
            self.config.save(os.path.normpath(compiled_model_path))

        def load(self, compiled_model_path: str, *args: Any, **kwargs: Any) -> None:
            """As the base; with `on_cpu`, NxDI's own CPU mode."""
            if block_of(self.config) is None or not self.neuron_config.on_cpu:
                super().load(compiled_model_path, *args, **kwargs)
                return
            self.to_cpu()

    return LowRankForCausalLM
