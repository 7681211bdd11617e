"""As much of NxDI's config and application classes as our subclasses touch, for machines without NxDI.
`test_nxdi.py` has the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch


class NeuronConfig:
    def __init__(self, **kwargs: Any) -> None:
        defaults = {
            "tp_degree": 1,
            "quantized": False,
            "lora_config": None,
            "mlp_cp_degree": 1,
            "fused_rmsnorm_skip_gamma": False,
            "seq_len": 128,
            "max_context_length": 128,
            "batch_size": 1,
            "on_cpu": False,
            "torch_dtype": "bfloat16",
            "attn_kernel_enabled": None,
        }
        for name, value in defaults.items():
            setattr(self, name, kwargs.pop(name, value))
        self.torch_dtype = getattr(torch, str(self.torch_dtype).removeprefix("torch."))
        self.unknown = sorted(kwargs)


class InferenceConfig:
    """NxDI's order of calls: load the Hugging Face values, then keyword arguments, derived values,
    validation.
    """

    def __init__(
        self,
        neuron_config: NeuronConfig,
        load_config: Callable[[InferenceConfig], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.neuron_config = neuron_config
        if load_config is not None:
            load_config(self)
        self.__dict__.update(kwargs)
        self.add_derived_config()
        self.validate_config()

    @classmethod
    def get_neuron_config_cls(cls) -> type[NeuronConfig]:
        return NeuronConfig

    def add_derived_config(self) -> None:
        self.num_cores_per_group = 1

    def validate_config(self) -> None:
        assert hasattr(self, "hidden_size")

    def to_json_string(self) -> str:
        values = {
            **self.__dict__,
            "neuron_config": {k: v for k, v in vars(self.neuron_config).items() if k != "unknown"},
        }
        return json.dumps(values, sort_keys=True, default=str)

    @classmethod
    def from_json_string(cls, text: str) -> InferenceConfig:
        values = json.loads(text)
        return cls(neuron_config=cls.get_neuron_config_cls()(**values.pop("neuron_config")), **values)


def load_values(values: dict[str, Any]) -> Callable[[InferenceConfig], None]:
    """What NxDI's `load_pretrained_config` returns: a function that puts a checkpoint's values in place."""
    return lambda config: config.__dict__.update(values)
