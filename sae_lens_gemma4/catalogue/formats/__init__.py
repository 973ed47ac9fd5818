"""The forms in which public SAEs lie on disk, one module each, and how one is recognised.

Adding a form is a module with a `FORM` and a line in `FORMS`, most telling keys first.
"""

from __future__ import annotations

from sae_lens_gemma4.catalogue.formats import (
    dictionary_learning,
    ernos,
    linear,
    log_threshold,
    normalised,
    plain,
    sae_lens,
    sparsify,
)
from sae_lens_gemma4.catalogue.formats.base import Checkpoint, Form, Weights
from sae_lens_gemma4.errors import SAEError, check_name

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        sae_lens.FORM,
        normalised.FORM,
        log_threshold.FORM,
        dictionary_learning.MATRYOSHKA,
        dictionary_learning.FORM,
        sparsify.FORM,
        *linear.FORMS,
        plain.FORM,
        ernos.FORM,
    )
}


def form_of(checkpoint: Checkpoint, name: str | None = None) -> Form:
    """The form of that name, or the first that the keys fit.

    Raises:
        UnknownNameError: no form of that name.
        SAEError: no form fits; lists the keys and shapes that were found, and how to name one by hand.
    """
    if name is not None:
        return FORMS[check_name("form of SAE files", name, FORMS)]
    for form in FORMS.values():
        if form.fits(checkpoint):
            return form
    raise SAEError(
        f"{checkpoint.where} is of no form known here. It holds: {checkpoint.found()}. If it is one of "
        f"{', '.join(FORMS)} all the same, name it: converter=sae_lens_gemma4.converter('<form>')."
    )


__all__ = ["FORMS", "Checkpoint", "Form", "Weights", "form_of"]
