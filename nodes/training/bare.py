"""A MODEL as it is, without what SafeCFG put into it."""

from collections.abc import Iterable

from ..redirect.runs import KEY
from ..redirect.sampling_hooks import put_hooks


def without_safecfg(model, also: Iterable[str] = ()):
    """A clone of a MODEL without SafeCFG Apply, and without wrappers of the keys in `also`."""
    model = model.clone()
    model.remove_additional_models(KEY)
    for kind in list(model.wrappers):
        for key in (KEY, *also):
            model.remove_wrappers_with_key(kind, key)
    put_hooks(model.model_options, {})
    return model
