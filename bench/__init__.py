"""Measures one plan on real devices; knows nothing of search."""

from bench.launch import GenerationResult, ScoreResult
from bench.pipeline import Pipeline
from bench.spec import ModelSpec, Plan, Sampling, StagePlan

__all__ = ["GenerationResult", "ModelSpec", "Pipeline", "Plan", "Sampling", "ScoreResult", "StagePlan"]
