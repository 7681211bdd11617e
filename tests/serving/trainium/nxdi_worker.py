"""One rank of the real NxD Inference in its CPU mode.

    python -m tests.serving.trainium.nxdi_worker CASES.json RESULTS.pt [ours | stock | simulated]

`ours`: with our classes in NxDI's table. `stock`: without. `simulated`: with ours, and the kernels run by the
simulator.

The public sources of NxDI and NxD are on PYTHONPATH; neuron_wheels stands in for the closed wheels. Under
more than one rank the environment is torchrun's (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import json
import os
import sys

import torch

from tests.serving.trainium.nxdi_cases import NEW_TOKENS, PROMPT_LENGTHS, SEQ_LEN, Case


def prompts(vocab_size: int, batch: int) -> list[torch.Tensor]:
    """The same prompts in every process, of different lengths."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, vocab_size, (1, length), generator=generator) for length in PROMPT_LENGTHS[:batch]
    ]


def build(case: Case):
    from neuronx_distributed_inference.utils.constants import MODEL_TYPES
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    application = MODEL_TYPES[case.family]["causal-lm"]
    options = {} if case.neuronmlp is None else {"neuronmlp": case.neuronmlp}
    neuron_config = application.get_neuron_config_cls()(
        tp_degree=case.tp,
        batch_size=case.batch,
        ctx_batch_size=1,
        is_continuous_batching=True,
        max_context_length=SEQ_LEN,
        seq_len=SEQ_LEN,
        on_cpu=True,
        enable_bucketing=False,
        **options,
        **{"torch_dtype": "float32", **case.neuron},
    )
    config = application.get_config_cls()(neuron_config, load_config=load_pretrained_config(case.folder))
    return application(case.folder, config)


@torch.no_grad()
def greedy(model, starts: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per sequence: its tokens (prompt and NEW_TOKENS greedy ones) and the logits of each new token
    `[NEW_TOKENS, vocabulary]`.
    """
    rows, logits = list(starts), [[] for _ in starts]

    def take(index: int, new: torch.Tensor) -> None:
        logits[index].append(new.clone())
        rows[index] = torch.cat((rows[index], new.argmax()[None, None]), dim=1)

    for index, row in enumerate(starts):
        positions = torch.arange(row.shape[1])[None]
        take(index, step(model, row, torch.ones_like(row), positions, torch.tensor([index]))[0])
    for _ in range(NEW_TOKENS - 1):
        past = torch.tensor([[row.shape[1] - 1] for row in rows])
        mask = (torch.arange(int(past.max()))[None] < past).long()
        new = step(model, torch.cat([row[:, -1:] for row in rows]), mask, past, torch.arange(len(rows)))
        for index in range(len(rows)):
            take(index, new[index])
    return [(row[0], torch.stack(new)) for row, new in zip(rows, logits, strict=True)]


def step(
    model, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, seq_ids: torch.Tensor
) -> torch.Tensor:
    """Logits `[B, vocabulary]` of the last token of each row."""
    sampling = torch.ones(len(seq_ids), 3)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        seq_ids=seq_ids,
        sampling_params=sampling,
    )
    return output.logits[:, -1]


def run(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from neuronx_distributed.parallel_layers import parallel_state

    model = build(case)
    model.to_cpu()
    check_storage(model, case)
    # NxDI opens the default process group whenever it sees WORLD_SIZE; later cases share the first one's.
    os.environ.pop("WORLD_SIZE", None)
    results = greedy(model, prompts(model.config.vocab_size, case.batch))
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    return results


def check_storage(model, case: Case) -> None:
    """What each submodel of NxDI holds of its MLPs after its own loading: the dtypes that the case claims,
    and fp32 scales beside int8.
    """
    if case.mlp_dtypes is None:
        return
    for wrapper in model.models:
        held = {name: p.dtype for name, p in wrapper.model.named_parameters() if ".mlp." in name}
        weights = {str(dtype) for name, dtype in held.items() if name.endswith(".weight")}
        scales = {dtype for name, dtype in held.items() if name.endswith(".scale")}
        assert weights == {f"torch.{dtype}" for dtype in case.mlp_dtypes}, (case.name, weights)
        assert scales == ({torch.float32} if "int8" in case.mlp_dtypes else set()), (case.name, scales)


def run_kernels_in_the_simulator() -> None:
    """As if a device were there: layers decide for kernels, and a launch goes to the simulator."""
    from neuronmlp_plugin.serving.trainium import dispatch
    from neuronmlp_plugin.serving.trainium.kernel_path import KernelPath
    from tests.serving.trainium.sharded import simulated

    dispatch.kernels_unavailable = lambda *_: None
    dispatch.refusal = lambda *_: None  # there is no compiler to ask
    KernelPath.launch = staticmethod(simulated)


def main(cases_path: str, results_path: str, classes: str = "ours") -> None:
    import neuronmlp_plugin
    from tests.serving.trainium import neuron_wheels

    if classes == "simulated":
        import nki_kernels.backend  # noqa: F401  (before the stand-ins make it believe in a vendor's `nki`)
    neuron_wheels.install()
    if classes != "stock":
        neuronmlp_plugin.register()
    if classes == "simulated":
        run_kernels_in_the_simulator()
    with open(cases_path, encoding="utf-8") as handle:
        results = {values["name"]: run(Case(**values)) for values in json.load(handle)}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
