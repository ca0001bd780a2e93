"""A peer's process: holds the model, runs one pass per command line on stdin, and answers with a line on stdout.

Started as `python -P -m tests.evaluation.peers.worker`. Kinds: `hf` is `generate` on the whole model; `pp` is
transformers' own pipeline mode; `gpipe` is torch's `ScheduleGPipe`, forward only. Processes of a group meet at a
barrier before a pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pipetune.bench.worker.main import die_with_driver


class Peer:
    """A model in this process and what can be done with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import torch.distributed as dist

        from pipetune.bench.models.resolve import resolve_model
        from pipetune.bench.spec import ModelSpec

        torch.set_num_threads(args.threads)
        self.kind: str = args.kind
        self.rank: int = args.rank
        self.size: int = args.size
        if self.size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{args.rendezvous}", rank=self.rank, world_size=self.size
            )
        self.resolved = resolve_model(ModelSpec.model_validate_json(args.model))
        self.model = self._load()
        config = self.model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        self.pad_token_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
        self._layers = list(self.model.get_decoder().layers) if self.kind == "gpipe" else []
        self._schedules: dict[tuple[int, ...], Any] = {}

    def _load(self) -> Any:
        from pipetune.bench.runtime.stage.unsplit import load_unsplit

        if self.kind != "pp":
            # `gpipe` holds the whole model in both processes, so that another cut costs no loading.
            return load_unsplit(self.resolved, ("cpu:0",))
        from transformers import AutoModelForCausalLM
        from transformers.distributed.configuration_utils import DistributedConfig

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.resolved.folder,
            dtype=self.resolved.spec.dtype,
            use_safetensors=True,
            distributed_config=DistributedConfig(pp_size=self.size),
        )
        return model.eval()

    def do_save(self, folder: str) -> dict[str, Any]:
        """Writes the model as a checkpoint: for peers that cannot build dummy weights themselves."""
        self.model.save_pretrained(folder)
        return {}

    def do_generate(self, workload: dict[str, Any], rows: int, share: bool, together: bool) -> dict[str, Any]:
        """One pass of `generate` over the prompts.

        Args:
            workload: whose random prompts are used, longest first, padded on the left.
            rows: batch size.
            share: take this process's part of the prompts, not all.
            together: meet the other processes of the group before the pass.
        """
        import torch
        from transformers import GenerationConfig

        from pipetune.bench.runtime.job import MicroBatchInputs, sort_by_length

        prompts, output_len = self._prompts(workload)
        mine = list(range(self.rank, len(prompts), self.size)) if share else list(range(len(prompts)))
        order = [mine[place] for place in sort_by_length([prompts[index] for index in mine])]
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=output_len,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )
        # `generate` fills what the given config leaves open from the model's own.
        self.model.generation_config = config
        batches = []
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            inputs = MicroBatchInputs.build(
                [prompts[index] for index in chosen],
                output_len=0,
                pad_token_id=self.pad_token_id,
                device=torch.device("cpu"),
            )
            batches.append((chosen, inputs))
        tokens: dict[int, list[int]] = {}
        began = self._begin(together)
        for chosen, inputs in batches:
            with torch.inference_mode():
                output = self.model.generate(input_ids=inputs.ids, attention_mask=inputs.mask, generation_config=config)
            for index, row in zip(chosen, output[:, inputs.prompt_len :].tolist(), strict=True):
                tokens[index] = row
        return self._end(began, tokens=tokens)

    def do_score(self, workload: dict[str, Any], rows: int) -> dict[str, Any]:
        """Log-probabilities of the prompts' own tokens by the whole model, without cache."""
        import torch

        prompts, _ = self._prompts(workload)
        scores: list[list[float]] = []
        began = self._begin(together=False)
        with torch.inference_mode():
            for begin in range(0, len(prompts), rows):
                ids = torch.tensor(prompts[begin : begin + rows])
                logits = self.model(input_ids=ids, use_cache=False).logits
                scores += _log_probs(logits, ids).tolist()
        return self._end(began, scores=scores)

    def do_gpipe(self, workload: dict[str, Any], rows: int, cut: int) -> dict[str, Any]:
        """Log-probabilities of the prompts' own tokens by `ScheduleGPipe` in micro-batches of `rows`."""
        import torch

        prompts, _ = self._prompts(workload)
        assert len({len(prompt) for prompt in prompts}) == 1, "prompts of unlike length are not padded here"
        if len(prompts) % rows:
            raise ValueError(f"{len(prompts)} prompts cannot be cut into micro-batches of {rows}")
        ids = torch.tensor(prompts)
        schedule = self._schedule(cut, len(prompts) // rows, tuple(ids.shape))
        began = self._begin(together=True)
        with torch.no_grad():
            output = schedule.eval(ids) if self.rank == 0 else schedule.eval(targets=ids)
        scores = output.tolist() if self.rank == self.size - 1 else None
        return self._end(began, scores=scores)

    def _schedule(self, cut: int, num_micro_batches: int, shape: tuple[int, ...]) -> Any:
        """Made once for each cut and shape: the first run agrees on shapes, which is not what is measured."""
        import torch
        from torch import nn
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        if self.size != 2:
            raise ValueError(f"gpipe is set up for 2 processes, not {self.size}")
        decoder, model = self.model.get_decoder(), self.model
        key = (cut, num_micro_batches, *shape)
        if key not in self._schedules:
            layers = nn.ModuleList(self._layers[:cut] if self.rank == 0 else self._layers[cut:])

            class First(nn.Module):
                def forward(self, ids: torch.Tensor) -> Any:
                    return decoder(input_ids=ids, use_cache=False).last_hidden_state

            class Last(nn.Module):
                def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> Any:
                    return _log_probs(model(inputs_embeds=hidden, use_cache=False).logits, targets)

            stage = PipelineStage(First() if self.rank == 0 else Last(), self.rank, self.size, torch.device("cpu"))
            self._schedules[key] = (layers, ScheduleGPipe(stage, num_micro_batches))
        layers, schedule = self._schedules[key]
        decoder.layers = layers
        if self.rank == 0:
            # The norm belongs to the last stage.
            decoder.norm = nn.Identity()
        return schedule

    def _prompts(self, workload: dict[str, Any]) -> tuple[Sequence[Sequence[int]], int]:
        from pipetune.bench.spec import Workload
        from pipetune.bench.worker.prompts import random_prompts

        parsed = Workload.model_validate(workload)
        return random_prompts(parsed, self.vocab_size), parsed.output_len

    def _begin(self, together: bool) -> float:
        import torch.distributed as dist

        gc.collect()
        gc.disable()
        if together and self.size > 1:
            dist.barrier()
        return time.monotonic()

    def _end(self, began: float, **result: Any) -> dict[str, Any]:
        ended = time.monotonic()
        gc.enable()
        return {"began_s": began, "ended_s": ended, **result}


def _log_probs(logits: Any, ids: Any) -> Any:
    """`[rows, length - 1]`: of each token but the first, given those before it."""
    own = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return own - logits[:, :-1].logsumexp(-1)


def main(start: Callable[[argparse.Namespace], Peer] = Peer) -> None:
    """Serves commands until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("hf", "pp", "gpipe", "cb"), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--driver-pid", type=int, required=True)
    args = parser.parse_args()
    die_with_driver(args.driver_pid)
    # What libraries print goes to the log; answers alone go to the driver.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        peer = start(args)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(result=getattr(peer, f"do_{command['command']}")(**command["args"]))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
