"""vLLM's scheduler, which ends a request with an error where its logits were not finite."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

logger = init_logger("vllm.neuronmlp")


class FiniteScheduler(Scheduler):
    """The other requests of the batch go on as they would."""

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
