"""Freezing policies: pure functions of numbers. `kgt_ddp.policy_spec` builds one from its text."""

from kgt_ddp.policies.policy import Decision, Observation, Policy

__all__ = ["Decision", "Observation", "Policy"]
