"""Experiment files: read, overridden, resolved into trials with a content hash, or refused.

Owns what an experiment file may say and what identifies a trial. Owns neither stages
(`harness.plan`) nor the meaning of a config (the algorithm's dataclass).
"""

from harness.spec.reading import parse_seeds, read_yaml
from harness.spec.resolution import claims_of, dataset_names, load_experiment
from harness.spec.types import (
    Claim,
    EvaluationSpec,
    Experiment,
    Origin,
    RunOptions,
    SpecError,
    TrialSpec,
    data_spec_class,
    data_to_dict,
)

__all__ = [
    "Claim",
    "EvaluationSpec",
    "Experiment",
    "Origin",
    "RunOptions",
    "SpecError",
    "TrialSpec",
    "claims_of",
    "data_spec_class",
    "data_to_dict",
    "dataset_names",
    "load_experiment",
    "parse_seeds",
    "read_yaml",
]
