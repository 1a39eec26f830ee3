"""Temperatures: fixed, by entropy, by phase, or chosen for each prompt."""

from decoding.temperature.explained import Explained
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import (
    AutoTemperature,
    BoundTemperature,
    DynamicTemperature,
    EntropyDependentTemperature,
    FixedTemperature,
    Temperature,
)
from decoding.temperature.selector import TemperatureSelector

__all__ = [
    "AutoTemperature",
    "BoundTemperature",
    "DynamicTemperature",
    "EntropyDependentTemperature",
    "Explained",
    "FixedTemperature",
    "PhaseTemperature",
    "Temperature",
    "TemperatureSelector",
]
