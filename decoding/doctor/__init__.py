"""What works here, and with a model: ``decoding doctor``."""

from decoding.doctor.facts import ModelFacts, TokenizerFacts
from decoding.doctor.machine import Machine
from decoding.doctor.methods import Verdict
from decoding.doctor.report import Report, examine
from decoding.doctor.speed import Timing

__all__ = ["Machine", "ModelFacts", "Report", "Timing", "TokenizerFacts", "Verdict", "examine"]
