"""Knows whether training is inside `with ddp.join():`, where ranks take different numbers of steps.

Torch sets the join configuration of a wrapper when the context is made and leaves it when the context ends; the end shows
only in the join hook's `post_hook`. A context that ends with an exception never calls it: the pause then stays, and masks
are held.
"""

from __future__ import annotations

from torch.distributed.algorithms.join import JoinHook


class JoinWatch:
    """`inside` from the making of a join context to its end on all ranks."""

    def __init__(self) -> None:
        self.inside = False

    def begins(self, hook: JoinHook) -> JoinHook:
        """A context is made with `hook`; use what is returned in its place."""
        self.inside = True
        return _Watched(hook, self)


class _Watched(JoinHook):
    def __init__(self, hook: JoinHook, watch: JoinWatch) -> None:
        self._hook = hook
        self._watch = watch

    def main_hook(self) -> None:
        self._hook.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        self._hook.post_hook(is_last_joiner)
        self._watch.inside = False
