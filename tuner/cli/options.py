"""The flags, once for all commands; names as vLLM's where it has one, and no defaults: those are the config's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Model"
_WORKLOAD = "Workload"
_SEARCH = "Search"
_PLACE = "Study"
_OUTPUT = "Output"

Config = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file with any of the settings.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hugging Face id, local folder, or smollm2-135m.", rich_help_panel=_MODEL),
]
DtypeFlag = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.", rich_help_panel=_MODEL)]
StorageDtype = Annotated[
    str | None,
    typer.Option("--storage-dtype", help="Of the weights, if not --dtype: float32.", rich_help_panel=_MODEL),
]
LoadFormatFlag = Annotated[
    str | None,
    typer.Option("--load-format", help="auto, or dummy for random weights.", rich_help_panel=_MODEL),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention", help="auto, sdpa, eager, flash_attention_2 or flash_attention_3.", rich_help_panel=_MODEL
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Commit or tag of the checkpoint.", rich_help_panel=_MODEL)
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code from the model's folder.", rich_help_panel=_MODEL),
]
WorkloadKind = Annotated[
    str | None,
    typer.Option("--workload-kind", help="generate tokens, or score the texts given.", rich_help_panel=_WORKLOAD),
]
NumPrompts = Annotated[
    int | None, typer.Option("--num-prompts", help="Prompts in the workload.", rich_help_panel=_WORKLOAD)
]
InputLen = Annotated[
    int | None, typer.Option("--input-len", help="Tokens of each random prompt.", rich_help_panel=_WORKLOAD)
]
OutputLen = Annotated[
    int | None, typer.Option("--output-len", help="Tokens to generate for each.", rich_help_panel=_WORKLOAD)
]
RandomRangeRatio = Annotated[
    float | None,
    typer.Option("--random-range-ratio", help="Spread of random lengths, 0 to 1.", rich_help_panel=_WORKLOAD),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSONL: {"prompt": …} or {"prompt_token_ids": […]} a line.',
        rich_help_panel=_WORKLOAD,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="Draw tokens, instead of the likeliest one.", rich_help_panel=_WORKLOAD),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="… among the k likeliest alone.", rich_help_panel=_WORKLOAD)]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="… among the likeliest of that probability.", rich_help_panel=_WORKLOAD),
]
SamplingSeed = Annotated[
    int | None, typer.Option("--sampling-seed", help="… and by which seed.", rich_help_panel=_WORKLOAD)
]
NumIters = Annotated[int | None, typer.Option("--num-iters", help="Timed repetitions.", rich_help_panel=_WORKLOAD)]
NumItersWarmup = Annotated[
    int | None, typer.Option("--num-iters-warmup", help="Repetitions before them.", rich_help_panel=_WORKLOAD)
]
Check = Annotated[
    bool | None,
    typer.Option("--check/--no-check", help="Compare output with the unsplit model.", rich_help_panel=_WORKLOAD),
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="cpu:0-1, cuda:0,cuda:1 or auto.", rich_help_panel=_WORKLOAD),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Of search, random prompts and dummy weights.", rich_help_panel=_WORKLOAD),
]
NTrials = Annotated[int | None, typer.Option("--n-trials", help="Plans to run.", rich_help_panel=_SEARCH)]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Start no trial after so long.", rich_help_panel=_SEARCH),
]
Objective = Annotated[
    list[str] | None,
    typer.Option(
        "--objective", metavar="METRIC", help="What to make better; may be repeated.", rich_help_panel=_SEARCH
    ),
]
Constraint = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint", metavar="LIMIT", help='Such as "p90_ttft_ms<=500"; may be repeated.', rich_help_panel=_SEARCH
    ),
]
MicroBatchSizes = Annotated[
    str | None, typer.Option("--micro-batch-sizes", help="To choose among: 4,8,16.", rich_help_panel=_SEARCH)
]
PrefillMicroBatchSizes = Annotated[
    str | None,
    typer.Option("--prefill-micro-batch-sizes", help="To choose among, for prefill.", rich_help_panel=_SEARCH),
]
PrefillChunkSizes = Annotated[
    str | None,
    typer.Option(
        "--prefill-chunk-sizes", help="To choose among, tokens of a prompt: 64,whole.", rich_help_panel=_SEARCH
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option("--replicas", help="Pipelines side by side, to choose among: 1,2.", rich_help_panel=_SEARCH),
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile", metavar="WHEN", help="torch.compile: true, false or search (both).", rich_help_panel=_SEARCH
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="GPU: capture decode steps.", rich_help_panel=_SEARCH),
]
PackedWeights = Annotated[
    bool | None,
    typer.Option(
        "--packed-weights/--no-packed-weights", help="CPU: lay weights out for oneDNN.", rich_help_panel=_SEARCH
    ),
]
MinStages = Annotated[
    int | None, typer.Option("--min-stages", help="Fewest stages of a pipeline.", rich_help_panel=_SEARCH)
]
MaxStages = Annotated[
    int | None, typer.Option("--max-stages", help="Most stages of a pipeline.", rich_help_panel=_SEARCH)
]
MemoryFractions = Annotated[
    str | None, typer.Option("--memory-fractions", help="Caps to choose among: 0.7,0.9.", rich_help_panel=_SEARCH)
]
BaselineBatchSizes = Annotated[
    str | None,
    typer.Option("--baseline-batch-sizes", help="Of the un-pipelined model: 8,16,32.", rich_help_panel=_SEARCH),
]
Finalists = Annotated[
    int | None, typer.Option("--finalists", help="Best plans to measure again.", rich_help_panel=_SEARCH)
]
FinalistRounds = Annotated[
    int | None, typer.Option("--finalist-rounds", help="How often at least.", rich_help_panel=_SEARCH)
]
MaxFinalistRounds = Annotated[
    int | None,
    typer.Option("--max-finalist-rounds", help="… and at most, until one is the best.", rich_help_panel=_SEARCH),
]
DeviceOrder = Annotated[
    str | None,
    typer.Option("--device-order", help="auto: also other orders of unlike devices; given.", rich_help_panel=_SEARCH),
]
Profile = Annotated[
    bool | None,
    typer.Option("--profile/--no-profile", help="Time layers and links first.", rich_help_panel=_SEARCH),
]
WarmStart = Annotated[
    list[str] | None,
    typer.Option(
        "--warm-start", metavar="STUDY", help="An earlier study to learn from; may repeat.", rich_help_panel=_SEARCH
    ),
]
StopEarly = Annotated[
    bool | None,
    typer.Option("--stop-early/--no-stop-early", help="End when nothing better is predicted.", rich_help_panel=_SEARCH),
]
OutputDir = Annotated[
    str | None,
    typer.Option("--output-dir", "-o", metavar="FOLDER", help="Where the study goes.", rich_help_panel=_PLACE),
]
StudyName = Annotated[
    str | None, typer.Option("--study-name", help="… or its name under results/.", rich_help_panel=_PLACE)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a study.", rich_help_panel=_PLACE)]
Storage = Annotated[
    str | None, typer.Option("--storage", metavar="URL", help="Optuna database.", rich_help_panel=_PLACE)
]
SharedStudy = Annotated[
    str | None,
    typer.Option("--shared-study", metavar="NAME", help="Search it with others, in --storage.", rich_help_panel=_PLACE),
]
DeviceNames = Annotated[
    str | None,
    typer.Option("--device-names", help="Names for device maps: cuda:0,cuda:1.", rich_help_panel=_PLACE),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print all settings and their sources.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run.", rich_help_panel=_OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=_OUTPUT)]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Say nothing while working.", rich_help_panel=_OUTPUT)]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Folder of a study, or its name under results/.")]
