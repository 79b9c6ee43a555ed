"""falloff under a name among diffusers' attention backends, for those who ask for it."""

from __future__ import annotations

from diffusers.models.attention_dispatch import AttentionBackendName

from falloff.hosts.diffusers import KEY, NAME


def register_diffusers_backend() -> None:
    """Let ``model.set_attention_backend("falloff")`` and ``attention_backend("falloff")`` be said.

    diffusers takes only the names in its own list; this adds one to it, for all of this process. Serving programs that
    know attention by the name of a backend, and set it on every model they load, then leave ``falloff.enable`` in
    force instead of detaching it. The name alone makes nothing sparse: layers that no ``enable`` has marked, and all
    cross-attention, stay dense on diffusers' native backend. Saying it twice does no harm.
    """
    AttentionBackendName._member_map_[KEY._name_] = KEY
    AttentionBackendName._value2member_map_[NAME] = KEY
    if KEY._name_ not in AttentionBackendName._member_names_:
        AttentionBackendName._member_names_.append(KEY._name_)
