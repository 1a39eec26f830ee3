"""Policies on the command line: a saved one, and what other options change of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from decoding.errors import DecodingError

if TYPE_CHECKING:
    from decoding.policy import Policy

_OF_STYLES = ("lambda_", "mode", "plausibility", "max_js", "entropy_gate", "steer_stop")
OF_POLICIES = ("style", *_OF_STYLES, "temperature")
"""Names of options that are fields of a policy."""
_OF_TRAINING = ("background", "field", "order", "smoothing", "unwrap", "allow_any_lambda")


def asked(ctx: click.Context) -> dict[str, Any]:
    """What a command's user wrote for fields of a policy, by their names; defaults are left out."""
    given = [name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
    return {name: ctx.params[name] for name in given if name in OF_POLICIES}


def require_no_training(ctx: click.Context) -> None:
    """Refuses options that say how a style is trained, beside a policy, which does not hold them.

    Raises:
        DecodingError: as said.
    """
    given = (name for name in _OF_TRAINING if name in ctx.params)
    if used := [name for name in given if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]:
        option = f"--{used[0].replace('_', '-')}"
        raise DecodingError(f"a policy does not hold {option}: leave it or --policy out, or save the style first")


def changed(policy: Policy, **changes: Any) -> Policy:
    """A policy with other fields. What goes with a style or a chosen temperature goes away with it.

    Args:
        policy: as it was.
        changes: fields; None switches one off. Temperature 0, for greedy search, is none.

    Raises:
        DecodingError: as of `Policy`.
    """
    if "temperature" in changes:
        changes["temperature"] = changes["temperature"] or None
        changes |= {} if changes["temperature"] == "auto" else {"selector": None}
        changes |= {} if changes["temperature"] else {"think_temperature": None}
    if "style" in changes and changes["style"] is None:
        changes = dict.fromkeys(_OF_STYLES) | changes
    return replace(policy, **changes)


def opened(name: str | None, changes: dict[str, Any]) -> Policy:
    """A saved policy, or an empty one, with changes.

    Raises:
        DecodingError: none there, or as `changed`.
    """
    from decoding.policy import Policy

    return changed(Policy() if name is None else Policy.from_pretrained(name), **changes)
