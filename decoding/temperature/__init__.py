"""Temperatures: fixed, by entropy, or chosen for each prompt."""

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
    "FixedTemperature",
    "Temperature",
    "TemperatureSelector",
]
