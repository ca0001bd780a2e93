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
LoadFormatFlag = Annotated[
    str | None,
    typer.Option("--load-format", help="auto, or dummy for random weights.", rich_help_panel=_MODEL),
]
Attention = Annotated[str | None, typer.Option("--attention", help="auto, sdpa or eager.", rich_help_panel=_MODEL)]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Commit or tag of the checkpoint.", rich_help_panel=_MODEL)
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code from the model's folder.", rich_help_panel=_MODEL),
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
MinStages = Annotated[int | None, typer.Option("--min-stages", help="Fewest stages.", rich_help_panel=_SEARCH)]
MaxStages = Annotated[int | None, typer.Option("--max-stages", help="Most stages.", rich_help_panel=_SEARCH)]
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
FinalistRounds = Annotated[int | None, typer.Option("--finalist-rounds", help="How often.", rich_help_panel=_SEARCH)]
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
