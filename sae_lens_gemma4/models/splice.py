"""SAEs behind the hook points of a bridge.

Stock puts a wrapper in the hook point's place (sae_lens/analysis/sae_transformer_bridge.py:188) and, when the SAE is
taken off, a new hook point (:248): the user's own hooks at that place are lost, and aliases lead to the old point.
Here the hook point stays where and what it is. While an SAE is attached, the point belongs to a class that hands on
what its own hooks leave: the SAE reads what every hook of the user's has seen and edited, and has hook points of its
own, `blocks.3.hook_resid_post.hook_sae_acts_post` and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.hook_points import HookPoint

from sae_lens_gemma4.errors import SAEError, check_name
from sae_lens_gemma4.models.cache import ByEitherName
from sae_lens_gemma4.models.hook_names import RESID, bridge_path, canonical_name, hook_of
from sae_lens_gemma4.models.interface import warn_if_base_sae

_ATTACHED: WeakKeyDictionary[SAE[Any], str] = WeakKeyDictionary()
"""Where each SAE is: its hook points bear the names of one place at a time."""


class SplicedHookPoint(HookPoint):
    """A hook point whose value an SAE's output replaces (`writer`), or that transcoders read (`readers`), or both."""

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        value = super().__call__(value)
        if (splice := self.__dict__["writer"]) is not None:
            value = splice.write(value)
        for splice in self.__dict__["readers"]:
            splice.wrapper.capture_input(value)
        return value


class Splice:
    """One SAE between two hook points, which are one but for a transcoder. Undone by `remove`.

    Attributes:
        wrapper: sae_lens's, which runs the SAE and its error term.
        path: the bridge's path of the hook point whose value is replaced.
        hooks: the hook points within the SAE, by their full paths.
    """

    def __init__(self, sae: SAE[Any], source: HookPoint, target: HookPoint, path: str, use_error_term: bool) -> None:
        self.wrapper = _SAEWrapper(sae, use_error_term=use_error_term)
        self.path = path
        self._source, self._target = source, target
        self._names = {hook: hook.name for hook in sae.hook_dict.values()}
        self.hooks: dict[str, HookPoint] = {}
        for name, hook in self.wrapper.named_modules():
            if isinstance(hook, HookPoint) and (use_error_term or name != "hook_sae_error"):
                hook.name = f"{path}.{name}"
                self.hooks[hook.name] = hook
        self._reshapes_z = bool(getattr(sae, "hook_z_reshaping_mode", False))
        if self._reshapes_z:  # a bridge's own value has no head axis (sae_transformer_bridge.py:163)
            sae.turn_off_forward_pass_hook_z_reshaping()
        if source is not target:
            _spliced(source)["readers"].append(self)
        _spliced(target)["writer"] = self
        _ATTACHED[sae] = canonical_name(path)

    def write(self, value: torch.Tensor) -> torch.Tensor:
        """The SAE's output in the place of `value`, in its dtype; to an SAE of that width, all heads are one axis."""
        reads = self.wrapper._captured_input if self._source is not self._target else value
        if reads is None:
            raise SAEError(
                f"The transcoder at {self.path} writes before {self._source.name}, which it reads, is computed."
            )
        d_in = self.wrapper.sae.cfg.d_in
        if reads.shape[-1] != d_in and reads.shape[2:].numel() == d_in and self._source is self._target:
            flat: torch.Tensor = self.wrapper(value.flatten(2))
            return flat.reshape(value.shape).to(value.dtype)
        if reads.shape[-1] != d_in or not reads.is_floating_point():
            kind = f"{reads.dtype} of {tuple(reads.shape)}"
            raise SAEError(f"The SAE at {self.path} reads {d_in} dimensions; {self._source.name} is {kind}.")
        written: torch.Tensor = self.wrapper(value)
        return written.to(value.dtype)

    def remove(self) -> None:
        _ATTACHED.pop(self.wrapper.sae, None)
        self._target.__dict__["writer"] = None
        if self._source is not self._target:
            self._source.__dict__["readers"].remove(self)
        for point in {self._source, self._target}:
            if not point.__dict__["readers"] and point.__dict__["writer"] is None:
                point.__class__ = HookPoint
                del point.__dict__["readers"], point.__dict__["writer"]
        for hook, name in self._names.items():
            hook.name = name
        if self._reshapes_z:
            self.wrapper.sae.turn_on_forward_pass_hook_z_reshaping()


def _spliced(point: HookPoint) -> dict[str, Any]:
    """The state of a spliced hook point; kept out of its modules, where it would change the names of hooks."""
    if not isinstance(point, SplicedHookPoint):
        point.__class__ = SplicedHookPoint
        point.__dict__.update(readers=[], writer=None)
    return point.__dict__


def _hook_read(sae: Any) -> str:
    if not isinstance(sae, SAE):
        raise SAEError(f"A {type(sae).__name__} cannot be attached; expected an SAE of sae_lens.")
    if not sae.cfg.metadata.hook_name:
        raise SAEError("This SAE's metadata has no hook_name: set sae.cfg.metadata.hook_name before attaching it.")
    return str(sae.cfg.metadata.hook_name)


class SplicesSAEs(SAETransformerBridge):
    """`SAETransformerBridge` with its methods for SAEs, by splices. A bridge keeps its own in `_splices`."""

    _splices: ByEitherName
    """`Splice` by the name of the hook that it reads, in the order of attaching."""

    @property
    def _acts_to_saes(self) -> dict[str, _SAEWrapper]:  # type: ignore[override]
        return ByEitherName({name: splice.wrapper for name, splice in self._splices.items()})

    @property
    def acts_to_saes(self) -> dict[str, SAE[Any]]:
        """The attached SAEs by the canonical name of the hook that each reads; looked up by any of its names."""
        return ByEitherName({name: splice.wrapper.sae for name, splice in self._splices.items()})

    hook_point: Callable[..., HookPoint]

    def add_sae(self, sae: SAE[Any], use_error_term: bool | None = None) -> None:
        """Attach an SAE or transcoder until `reset_saes`; one that reads the same hook is replaced.

        Hooks at the hook point itself go on firing, before the SAE reads.

        Args:
            use_error_term: whether to add back what the SAE misses; the SAE's own setting if None.

        Raises:
            UnknownNameError: the model has no hook of the SAE's `hook_name` or `hook_name_out`.
            SAEError: the SAE names no hook, or another SAE already writes where this one would.
        """
        name_read = _hook_read(sae)
        metadata = sae.cfg.metadata
        hint = "The SAE's metadata names it."
        source = self.hook_point(name_read, hint)
        target = self.hook_point(metadata.hook_name_out or name_read, hint)
        replaced = self._splices.get(name_read)
        hook = hook_of(name_read)
        if hook is not None and hook.shape == RESID and sae.cfg.d_in != self.cfg.d_model:
            raise SAEError(f"{name_read} is {self.cfg.d_model} wide; this SAE reads {sae.cfg.d_in}.")
        if sae in _ATTACHED and not (replaced is not None and replaced.wrapper.sae is sae):
            where = _ATTACHED[sae]
            raise SAEError(f"This SAE is attached at {where} already: detach it there, or attach copy.deepcopy(sae).")
        for name, splice in self._splices.items():
            if splice is not replaced and splice._target is target:
                raise SAEError(f"The SAE attached as {name} already writes to {canonical_name(splice.path)}: reset it.")
        warn_if_base_sae(sae, self)
        if replaced is not None:
            self._detach(name_read)
        use_error_term = sae.use_error_term if use_error_term is None else use_error_term
        splice = Splice(sae, source, target, bridge_path(metadata.hook_name_out or name_read), use_error_term)
        self._splices[name_read] = splice
        self._hook_registry.update(splice.hooks)

    def reset_saes(self, act_names: str | list[str] | None = None) -> None:
        """Detach the SAEs that read these hooks, or all; `UnknownNameError` where none is attached."""
        names = [act_names] if isinstance(act_names, str) else list(self._splices) if act_names is None else act_names
        for name in names:
            check_name("attached SAE", canonical_name(name), self._splices)
        for name in dict.fromkeys(names):
            self._detach(name)

    @contextmanager
    def saes(
        self, saes: SAE[Any] | Sequence[SAE[Any]] = (), reset_saes_end: bool = True, use_error_term: bool | None = None
    ) -> Iterator[SplicesSAEs]:
        """Attach SAEs; at the end, unless `reset_saes_end` is False, let their hooks be as they were before."""
        before = dict(self._splices)
        attached: list[str] = []
        try:
            for sae in [saes] if isinstance(saes, SAE) else saes:
                name = canonical_name(_hook_read(sae))
                if name in attached:
                    raise SAEError(f"Two of these SAEs read {name}: attach one after the other.")
                self.add_sae(sae, use_error_term=use_error_term)
                attached.append(name)
            yield self
        finally:
            if reset_saes_end:
                for name in dict.fromkeys(attached):
                    if name in self._splices:
                        self._detach(name)
                    if name in before:
                        wrapper = before[name].wrapper
                        self.add_sae(wrapper.sae, use_error_term=wrapper.use_error_term)

    def run_with_hooks_with_saes(self, *args: Any, saes: SAE[Any] | Sequence[SAE[Any]] = (), **kwargs: Any) -> Any:
        """As `SAETransformerBridge.run_with_hooks_with_saes`, which forgets `use_error_term` (:379)."""
        attach = {k: kwargs.pop(k) for k in ("reset_saes_end", "use_error_term") if k in kwargs}
        with self.saes(saes=saes, **attach):
            return self.run_with_hooks(*args, **kwargs)

    def _detach(self, name: str) -> None:
        splice = self._splices.pop(name)
        splice.remove()
        for path in splice.hooks:
            self._hook_registry.pop(path, None)
