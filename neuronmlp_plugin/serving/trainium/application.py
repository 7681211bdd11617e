"""NxDI's model and application classes with low-rank MLPs in them; identical to their bases for a model
without our block.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from neuronmlp_plugin.serving.trainium.config import (
    block_of,
    is_low_rank,
    low_rank_config,
    options_of,
    source_of,
)
from neuronmlp_plugin.serving.trainium.dispatch import (
    DECODE,
    FILE,
    PREFILL,
    RECORD,
    layer_decisions,
    logger,
    settle,
)
from neuronmlp_plugin.serving.trainium.low_rank_mlp import LowRankMLP
from neuronmlp_plugin.serving.trainium.metrics import publish
from neuronmlp_plugin.serving.trainium.state_dict import (
    State,
    lay_out_state,
    overlay_factors,
    read_factored,
)

_Base: Any = object  # the mixins below stand before an NxDI class, whose methods `super()` finds


@functools.cache
def low_rank_application(base: Any) -> Any:
    """The subclass of a NeuronBaseForCausalLM that also serves low-rank MLPs, with its model class."""
    # Ours first: their methods run, and `super()` inside them is NxDI's.
    model = type(f"LowRank{base._model_cls.__name__}", (LowRankModel, base._model_cls), {})
    return type(f"LowRank{base.__name__}", (LowRankApplication, base), {"_model_cls": model})


class LowRankModel(_Base):
    """Before a NeuronBaseModel: decoder layers get our MLP once NxDI has built them."""

    def init_model(self, config: Any) -> None:
        # Needs neuronx_distributed, which nothing else here does.
        from neuronmlp_plugin.serving.trainium.nxd import NxdParallel

        # NxDI has no seam for the MLP of every family, so its dense ones are built first: on the meta device
        # when it traces, in real memory only in its CPU mode.
        super().init_model(config)
        block = block_of(config)
        if block is not None:
            for index, (layer, decisions) in enumerate(
                zip(self.layers, layer_decisions(config), strict=True)
            ):
                layer.mlp = LowRankMLP(
                    block.layers[index],
                    NxdParallel(config),
                    decisions,
                    sequence_parallel=config.neuron_config.sequence_parallel_enabled,
                    prefill=config.neuron_config.is_prefill_stage,
                    layer=index,
                )


class LowRankApplication(_Base):
    """Before a NeuronBaseForCausalLM: reads, checks and shards factors, and counts what ran."""

    serves_low_rank = True

    def __init__(self, model_path: str, config: Any = None, *args: Any, **kwargs: Any) -> None:
        """As the base. Without a config NxDI reads the one of a compiled artifact, where all is settled."""
        if config is not None and is_low_rank(config):
            settle(config)
        super().__init__(model_path, config, *args, **kwargs)

    @classmethod
    def get_config_cls(cls) -> Any:
        return low_rank_config(super().get_config_cls())

    @classmethod
    def get_state_dict(cls, model_name_or_path: str, config: Any) -> State:
        """As the base, which cannot read a factored folder: its files are not named `model*` (FORMAT.md)."""
        # A factor file lies over an ordinary folder, which the base reads.
        if not is_low_rank(config) or options_of(config).factors:
            return super().get_state_dict(model_name_or_path, config)
        state = cls.convert_hf_to_neuron_state_dict(read_factored(model_name_or_path), config)
        if getattr(config, "tie_word_embeddings", False):
            cls.update_state_dict_for_tied_weights(state)
        return state

    @classmethod
    def convert_hf_to_neuron_state_dict(cls, state_dict: State, config: Any) -> State:
        """As the base, then the MLP tensors into the layout of the paths that their layers take."""
        state = super().convert_hf_to_neuron_state_dict(state_dict, config)
        block, options = block_of(config), options_of(config)
        if block is not None:
            if options.factors:
                overlay_factors(state, options.factors, config.__dict__)
            paths = [
                {decision.path for decision in decisions.values()} for decisions in layer_decisions(config)
            ]
            neuron = config.neuron_config
            lay_out_state(state, block, paths, neuron.tp_degree, neuron.torch_dtype, source_of(config))
        return state

    def compile(self, compiled_model_path: str, *args: Any, **kwargs: Any) -> None:
        """As the base, with the dispatch record beside the artifact; with `on_cpu` there is nothing to
        compile.
        """
        if not is_low_rank(self.config):
            super().compile(compiled_model_path, *args, **kwargs)
        elif self.neuron_config.on_cpu:
            self.config.save(os.fspath(compiled_model_path))
        else:
            super().compile(compiled_model_path, *args, **kwargs)
            RECORD.save(os.path.join(compiled_model_path, FILE))

    def load(self, compiled_model_path: str, *args: Any, **kwargs: Any) -> None:
        """As the base, with the dispatch record read and logged; with `on_cpu`, NxDI's own CPU mode."""
        if not is_low_rank(self.config):
            super().load(compiled_model_path, *args, **kwargs)
        elif self.neuron_config.on_cpu:
            self.to_cpu()
        else:
            super().load(compiled_model_path, *args, **kwargs)
            RECORD.restore(os.path.join(compiled_model_path, FILE))
            publish(RECORD.totals())
            _log_news()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, counted; with `on_cpu` each phase is first known, and logged, here."""
        output = super().forward(*args, **kwargs)
        if is_low_rank(self.config):
            input_ids = args[0] if args else kwargs["input_ids"]
            RECORD.ran(_phase(input_ids, kwargs.get("position_ids")), input_ids.numel())
            publish(RECORD.totals())
            _log_news()
        return output


def _phase(input_ids: Any, position_ids: Any) -> str:
    """Which graph ran: as NxDI's own `_is_prefill` says, since a prompt may be one token long; by the number
    of tokens where it cannot.
    """
    prefill = input_ids.shape[1] > 1 if position_ids is None else position_ids.min() == 0
    return PREFILL if prefill else DECODE


def _log_news() -> None:
    line = RECORD.news()
    if line is not None:
        logger.info(line)
