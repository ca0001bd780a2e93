"""Measures one plan on real devices; knows nothing of search."""

from bench.launch import GenerationResult
from bench.pipeline import Pipeline
from bench.spec import ModelSpec, Plan, StagePlan

__all__ = ["GenerationResult", "ModelSpec", "Pipeline", "Plan", "StagePlan"]
