"""All of decoding's choices in one object, and the folder that keeps them."""

from decoding.policy.policy import Policy

__all__ = ["Policy"]
