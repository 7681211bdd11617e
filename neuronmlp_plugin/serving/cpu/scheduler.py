"""vLLM's scheduler, which ends a request with an error where its logits were not finite."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import RequestStatus

logger = init_logger("vllm.neuronmlp")


class ZeroedCache(KVCacheConfig):
    """Has vLLM zero each block of the cache before a request gets it (vLLM does so by itself where a cache
    mixes precisions). Its attention multiplies places that nobody has filled by zero, and zero times NaN
    of an earlier request is NaN.
    """

    needs_kv_cache_zeroing = True


class FiniteScheduler(Scheduler):
    """The other requests of the batch, and those that come later, go on as they would."""

    def __init__(self, vllm_config: Any, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        fields = {f.name: getattr(kv_cache_config, f.name) for f in dataclasses.fields(kv_cache_config)}
        super().__init__(vllm_config, ZeroedCache(**fields), *args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        counts = model_runner_output.num_nans_in_logits or {}
        bad = [request_id for request_id, count in counts.items() if count]
        # Before vLLM looks at the step: what was sampled for a request that has ended is dropped.
        ended = self.finish_requests(bad, RequestStatus.FINISHED_ERROR) if bad else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            logger.error(
                "neuronmlp: request %s: expected finite logits, found NaN or Inf; it ends with an error",
                request.request_id,
            )
            made = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(made)
        return outputs
